# SPDX-License-Identifier: Apache-2.0
r"""Layers with a Gaussian posterior over their weights: linear layers and convolutions.

A variational layer *is* the dense layer it came from: same object, same parameters, same hooks. `make_variational_`
swaps its class for a subclass and adds the log-variances; `make_dense_` swaps it back and leaves the posterior mean.
"""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from hf_vdneuron.experts import ExpertMatrix, find_module, set_weight_
from hf_vdneuron.functional import PriorStatistics, local_reparameterization, second_moment, whole
from hf_vdneuron.precision import at_least_float32, with_range_of_float32
from hf_vdneuron.priors import Prior
from hf_vdneuron.sublayers import Axis


__all__ = [
    "DenseLayer",
    "VDConv1d",
    "VDConv2d",
    "VDExpertMatrix",
    "VDFalconLinear",
    "VDLinear",
    "VDTransposedLinear",
    "VariationalLayer",
    "dense_layer",
    "feature_axis",
    "make_dense_",
    "make_variational_",
]

#: Layers that can hold a posterior.
DenseLayer = nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | ExpertMatrix


class VariationalLayer(nn.Module):
    r"""What all variational layers share; mixed into a dense layer class.

    The posterior mean is :math:`\mu = \gamma_g v`, where :math:`v` is the parameter `weight` and :math:`\gamma_g`,
    `group_scale`, is one scalar per group (1 without it). A group needs a scale of its own: its gradient sums the
    evidence of all the group's weights, for and against. In everything that leaves the layer (`state_dict`, a saved
    checkpoint, `make_dense_`) `weight` is the mean itself, and the parameter travels beside it as `direction`.

    Attributes:
        log_var: Posterior log-variance of each weight, a float32 parameter in the shape of `weight`.
        group_scale: Scale of each group's means, a parameter of shape `(num_groups,)`, or None.
        prior: Prior of the weights; knows which feature belongs to which group.
        group_axis: Axis of `weight` along which groups lie.
        keep_out: Mask of the output features' weights, bool, shape `(out_features,)`, or None where no unit owns rows
            here. The bias is never masked.
        keep_in: Mask of the input features' weights, bool, shape `(in_features,)`, or None likewise.
        frozen: Whether `log_var` and `group_scale` stand still: they stay in the graph, with a gradient of zero.
        noise: Whether training draws weights from the posterior. Evaluation always uses the mean.
        collect_kl: Whether a training forward leaves `kl` and `statistics` behind.
        kl: Bound (6) of the latest training forward, float32 scalar in nats, or None.
        statistics: Its sums per group for the M step (8), or None.
    """

    weight: Tensor
    bias: Tensor | None
    log_var: nn.Parameter
    group_scale: nn.Parameter | None
    prior: Prior
    group_axis: int
    keep_out: Tensor | None
    keep_in: Tensor | None
    frozen: bool
    noise: bool
    collect_kl: bool
    kl: Tensor | None
    statistics: PriorStatistics | None

    @property
    def mean(self) -> Tensor:
        """Posterior mean under the masks, in the shape and dtype of `weight`."""
        weight = self.weight  # of experts, put together anew each time
        mean = whole(weight)
        for axis in (self.group_axis, 1 - self.group_axis):
            factor = self._factor(axis)
            if factor is not None:
                mean = mean * self._broadcast(factor, axis)
        return mean.to(weight.dtype)

    @property
    def direction(self) -> Tensor:
        """What the group scale scales, under its name in a state dict."""
        return self.weight

    @property
    def posterior(self) -> tuple[Tensor, Tensor]:
        """Posterior mean under the masks and log-variance, in the shape of `weight`, float32 or wider."""
        log_var = whole(self.log_var)
        return self.mean.to(log_var.dtype), log_var

    @property
    def var(self) -> Tensor:
        """Posterior variance under the masks, in the shape of `weight`, float32."""
        var = self._shape_parameter(self.log_var).exp()
        for axis in (0, 1):
            mask = self._mask(axis)
            if mask is not None:
                var = var * self._broadcast(mask, axis)
        return var

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer: with sampled pre-activations in noisy training, with the mean otherwise.

        Args:
            inputs: Inputs as the dense layer takes them.

        Returns:
            Outputs as the dense layer gives them.
        """
        mean = self.presented_mean()
        output_mean = self.keep_in_graph(self._product(inputs, mean, self.bias))
        return self.add_noise(output_mean, inputs, self.var) if self.training and self.noise else output_mean

    def presented_mean(self) -> Tensor:
        """Return the mean for a forward pass, which in training leaves its divergence behind if that is collected."""
        mean = self.mean
        if self.training and self.collect_kl:
            log_var = self._shape_parameter(self.log_var)
            self.kl, self.statistics = self.prior.kl_bound(mean, log_var, self.group_axis)
        return mean

    def keep_in_graph(self, outputs: Tensor) -> Tensor:
        """Let outputs depend on all parameters in training: distributed data parallelism stops at any other."""
        if self.training and (self.frozen or not self.noise) and self.log_var.requires_grad:
            outputs = outputs + 0 * self.log_var.sum()
            if self.group_scale is not None:
                outputs = outputs + 0 * self.group_scale.sum()
        return outputs

    def add_noise(self, output_mean: Tensor, inputs: Tensor, var: Tensor) -> Tensor:
        """Draw outputs around their mean, for weights of the given variance."""
        # Noise needs few digits, but squares twice the exponents.
        dtype = with_range_of_float32(output_mean.dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            output_var = self._product(inputs.to(dtype).square(), var.to(dtype), None)
        return local_reparameterization(output_mean, output_var)

    def weight_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Differentiate the dense layer's map by its weights.

        Args:
            inputs: Inputs as the dense layer takes them, or their squares, in the dtype of `log_var`.
            output_gradient: Gradient of the outputs, likewise.

        Returns:
            Gradient in the shape of `weight`; of squares, what a variance of each weight adds.
        """
        weight = torch.zeros_like(self.log_var, requires_grad=True)
        with torch.enable_grad():
            outputs = self._product(inputs, weight, None)
        return torch.autograd.grad(outputs, weight, output_gradient)[0]

    @torch.no_grad()
    def initial_statistics(self) -> PriorStatistics:
        r"""Sum the second moments of each feature, to start a prior that learns.

        Returns:
            Number of weights and sum of :math:`\tilde W^2` per feature along the group axis, shape
            `(1, num_features)`.
        """
        moment = second_moment(*self.posterior)
        across = [dim for dim in range(moment.ndim) if dim != self.group_axis]
        sums = moment.sum(across)
        count = torch.full_like(sums, moment.numel() / sums.numel())
        return PriorStatistics(count[None], sums[None])

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the dense layer's map with other weights."""
        raise NotImplementedError(f"`{type(self).__name__}` does not say how it multiplies.")

    def _shape_parameter(self, parameter: Tensor) -> Tensor:
        """Give a log-variance or group scale, without a gradient if they stand still."""
        parameter = whole(parameter)
        return parameter.detach() if self.frozen else parameter

    def _broadcast(self, per_feature: Tensor, axis: int) -> Tensor:
        shape = [1] * self.log_var.ndim
        shape[axis] = -1
        return per_feature.view(shape)

    def _mask(self, axis: int) -> Tensor | None:
        return self.keep_out if axis == feature_axis(self, Axis.OUT) else self.keep_in

    def _factor(self, axis: int) -> Tensor | None:
        """Group scale times mask along one axis, so that one product over the weights applies both."""
        mask = self._mask(axis)
        if self.group_scale is None or axis != self.group_axis:
            return mask
        scale = self._shape_parameter(self.group_scale)[self.prior.feature_group]
        return scale if mask is None else scale * mask

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a cast or move of the model, without losing precision of the posterior's own parameters."""
        own = [parameter for parameter in (self.log_var, self.group_scale) if parameter is not None]
        wide = [*own, *(parameter.grad for parameter in own)]
        fn_wide = at_least_float32(fn)

        def convert(tensor: Tensor) -> Tensor:
            return fn_wide(tensor) if any(tensor is one for one in wide) else fn(tensor)

        super()._apply(convert, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the latest forward's graph behind, so that a layer can be copied in the middle of training."""
        return {**self.__dict__, "kl": None, "statistics": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.group_scale is not None:
            destination[f"{prefix}direction"] = destination[f"{prefix}weight"]
        destination[f"{prefix}weight"] = self.mean if keep_vars else self.mean.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        direction = state_dict.pop(f"{prefix}direction", None)
        if direction is not None:
            state_dict[f"{prefix}weight"] = direction
        elif self.group_scale is not None:
            # A dense checkpoint: its weight is the mean.
            state_dict.setdefault(f"{prefix}group_scale", torch.ones_like(self.group_scale))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _VDMatrix(VariationalLayer):
    """What layers share that multiply all features by a matrix of shape `(out_features, in_features)`."""

    def weight_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Differentiate the map by its weights, as the base class does but without a forward."""
        return output_gradient.flatten(0, -2).t() @ inputs.flatten(0, -2)

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(inputs, weight, bias)


class VDLinear(_VDMatrix, nn.Linear):  # type: ignore[misc]  # the dense class types its bias more loosely
    """Linear layer with a posterior; `weight` has shape `(out_features, in_features)`."""


class VDFalconLinear(_VDMatrix, FalconLinear):  # type: ignore[misc]  # as above
    """Falcon's linear layer with a posterior: it adds its bias in a step of its own, and computes the same."""


class VDTransposedLinear(_VDMatrix, Conv1D):  # type: ignore[misc]  # the dense class types its bias more loosely
    """GPT-2's `Conv1D` with a posterior: a linear layer whose `weight` has shape `(in_features, out_features)`."""

    def weight_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Differentiate the map by its weights, which lie the other way round."""
        return super().weight_gradient(inputs, output_gradient).t()

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._product(inputs, weight.t(), bias)


class VDConv1d(VariationalLayer, nn.Conv1d):
    """One-dimensional convolution with a posterior; `weight` has shape `(out, in, kernel)`."""

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(inputs, weight, bias)


class VDConv2d(VariationalLayer, nn.Conv2d):
    """Two-dimensional convolution with a posterior; `weight` has shape `(out, in, height, width)`."""

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(inputs, weight, bias)


class VDExpertMatrix(_VDMatrix, ExpertMatrix):
    """One matrix of all experts of a layer, with a posterior. The experts, who own its weight, save and load that."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


#: Dense class -> variational class. Exact classes only: a subclass may compute something else.
VARIATIONAL_CLASSES: dict[type[nn.Module], type[VariationalLayer]] = {
    nn.Linear: VDLinear,
    FalconLinear: VDFalconLinear,
    Conv1D: VDTransposedLinear,
    nn.Conv1d: VDConv1d,
    nn.Conv2d: VDConv2d,
    ExpertMatrix: VDExpertMatrix,
}


def feature_axis(module: nn.Module, axis: Axis) -> int:
    """Tell along which axis of its weight a module's output or input features run.

    Args:
        module: A linear layer or convolution, dense or variational.
        axis: Output or input features.

    Returns:
        0 or 1.
    """
    transposed = isinstance(module, Conv1D)
    return int((axis is Axis.IN) != transposed)


def dense_layer(model: nn.Module, path: str) -> DenseLayer:
    """Look up a layer that holds, or can hold, a posterior.

    Args:
        model: Any model.
        path: Path of the layer in it.

    Returns:
        The layer, dense or variational.

    Raises:
        TypeError: If the module there is of another class.
    """
    module = find_module(model, path)
    if not isinstance(module, DenseLayer):
        raise TypeError(f"Module `{path}` is a `{type(module).__name__}`: expected one of {_known_classes()}.")
    return module


def make_variational_(
    layer: DenseLayer,
    prior: Prior,
    *,
    group_axis: int,
    log_var: float,
    group_scale: bool,
    masked: tuple[Axis, ...],
) -> VariationalLayer:
    """Give a dense layer a posterior, in place: it keeps its identity, parameters, hooks and device.

    Noise and KL are off, the masks keep everything, so the layer still computes what it did.

    Args:
        layer: Layer of exactly one of the supported dense classes.
        prior: Prior over its weights, not initialised yet.
        group_axis: Axis of the weight along which the prior's features lie.
        log_var: Initial posterior log-variance of every weight.
        group_scale: Whether each group's means get a scale of their own.
        masked: Features that a mask may end.

    Returns:
        The same object, now variational.

    Raises:
        TypeError: If the layer has no variational counterpart.
    """
    if type(layer) not in VARIATIONAL_CLASSES:
        raise TypeError(
            f"Cannot make a `{type(layer).__name__}` variational: expected exactly one of {_known_classes()}, as a "
            "subclass may compute something else."
        )
    layer.__class__ = VARIATIONAL_CLASSES[type(layer)]  # type: ignore[assignment]  # the swap is the point
    variational = cast(VariationalLayer, layer)
    variational.prior = prior
    variational.group_axis = group_axis
    variational.frozen, variational.noise, variational.collect_kl = False, False, False
    variational.kl, variational.statistics = None, None
    weight = variational.weight
    # Log-variances and scales stay in float32 whatever the dtype of the model: they move in small relative steps.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    variational.log_var = nn.Parameter(torch.full_like(weight, log_var, dtype=dtype))
    ones = torch.ones(prior.num_groups, dtype=dtype, device=weight.device)
    variational.register_parameter("group_scale", nn.Parameter(ones) if group_scale else None)
    for axis in Axis:
        num_features = weight.shape[feature_axis(variational, axis)]
        keep = torch.ones(num_features, dtype=torch.bool, device=weight.device)
        variational.register_buffer(f"keep_{axis}", keep if axis in masked else None)
    return variational


@torch.no_grad()
def make_dense_(layer: VariationalLayer) -> DenseLayer:
    """Take the posterior away again, in place; `weight` becomes the posterior mean under the masks.

    Args:
        layer: A variational layer.

    Returns:
        The same object, now an ordinary dense layer.
    """
    set_weight_(layer, layer.mean)
    for name in VariationalLayer.__annotations__.keys() - {"weight", "bias"}:
        delattr(layer, name)
    dense = {variational: dense for dense, variational in VARIATIONAL_CLASSES.items()}
    layer.__class__ = dense[type(layer)]  # type: ignore[assignment]  # the swap is the point
    return cast(DenseLayer, layer)


def _known_classes() -> str:
    return ", ".join(sorted(cls.__name__ for cls in VARIATIONAL_CLASSES))
