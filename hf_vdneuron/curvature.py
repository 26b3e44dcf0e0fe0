# SPDX-License-Identifier: Apache-2.0
r"""How sharply the loss of a fine-tuned model depends on its weights, and on the scales of its heads and neurons.

Near a minimum the expected loss of a posterior around it is that of the minimum plus
:math:`\tfrac12 \sum h\, s^2` over weights and :math:`\tfrac12 \sum H_g (\gamma_g - 1)^2` over groups. Both curvatures
are estimated by squared gradients of single examples, the diagonal of the empirical Fisher information.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.layers import VariationalLayer, feature_axis
from hf_vdneuron.sublayers import Axis
from hf_vdneuron.variational_experts import all_experts


__all__ = ["Batches", "Curvature", "Loss", "estimate_curvature"]

#: Keyword arguments of a forward, labels among them, batch by batch; tensors have the batch along their first axis.
Batches = Iterable[Mapping[str, Any]]

#: Function `(model, batch) -> loss`, a scalar that is a mean over the examples of the batch.
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Curvature:
    """Second derivatives of the loss of one example, mean over examples, from first ones.

    Args:
        weights: Path of each variational layer -> second derivative by each of its weights, in their shape, not
            negative.
        scores: Path of each variational layer -> first derivative of each example's loss by the scale of each group's
            means, shape `(num_examples, num_groups)`.
    """

    weights: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """Path of each variational layer -> second derivative by each scale, shape `(num_groups,)`."""
        return {path: scores.square().mean(0) for path, scores in self.scores.items()}


@dataclass(frozen=True)
class _Call:
    """One use of a layer in a forward."""

    path: str
    layer: VariationalLayer
    inputs: Tensor
    outputs: Tensor


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Let a model compute the loss of its batch.

    Args:
        model: The model.
        batch: Keyword arguments of its forward, labels among them.

    Returns:
        The loss.

    Raises:
        ValueError: If it gives none.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"A batch with {', '.join(batch)} gives no loss: expected `labels` in every batch.")
    return loss


def estimate_curvature(model: nn.Module, batches: Batches, *, loss: Loss = own_loss) -> Curvature:
    r"""Estimate the curvature of the loss from gradients of single examples.

    .. math::
        h_{ij} = \mathbb E_n \sum_t \delta_{nti}^2 x_{ntj}^2, \qquad
        H_g = \mathbb E_n \Big( \sum_{ij \in g} \mu_{ij} \frac{\partial L_n}{\partial \mu_{ij}} \Big)^2

    for inputs :math:`x` and gradients :math:`\delta` of the outputs at position :math:`t` of example :math:`n`. Over
    positions the squares are summed, as noise is drawn per position in training (Kingma 2015).

    Args:
        model: A patched model; put into evaluation mode.
        batches: Examples with labels.
        loss: Its loss of a batch; by default what its forward returns as `loss`. A mean over tokens counts long
            examples for more.

    Returns:
        The curvature of every variational layer.

    Raises:
        ValueError: If there is no batch, or one gives no loss.

    References:
        Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022,
        https://arxiv.org/abs/2204.09656, whose diagonal Fisher information of masks is :math:`H_g` on the out-side.
    """
    model.eval()
    layers = variational_layers(model)
    weights = {path: torch.zeros_like(layer.log_var, requires_grad=False) for path, layer in layers.items()}
    scores: dict[str, list[Tensor]] = {path: [] for path in layers}
    count = 0
    for batch in batches:
        calls, total, size = _forward(model, layers, batch, loss)
        # The loss of one example depends on its own activations only.
        gradients = torch.autograd.grad(total, [call.outputs for call in calls])
        by_example: dict[str, Tensor] = {}
        for call, gradient in zip(calls, gradients, strict=True):
            weights[call.path] += _squared(call, gradient)
            scale = _by_scale(call, gradient, size)
            by_example[call.path] = by_example[call.path] + scale if call.path in by_example else scale
        for path, scores_of_batch in by_example.items():
            scores[path].append(scores_of_batch)
        count += size
    if count == 0:
        raise ValueError("There is no batch: expected at least one, and a few hundred examples in all.")
    return Curvature(
        {path: total / count for path, total in weights.items()},
        {path: torch.cat(parts) for path, parts in scores.items()},
    )


def _forward(
    model: nn.Module, layers: Mapping[str, VariationalLayer], batch: Mapping[str, Any], loss: Loss
) -> tuple[list[_Call], Tensor, int]:
    """Run a batch, and note what goes through each layer, the loss summed over examples, and their number."""
    calls: list[_Call] = []

    def note(layer: VariationalLayer, inputs: tuple[Tensor], outputs: Tensor, *, path: str) -> Tensor:
        # Of frozen layers too; and what comes next may work in place, so it gets a copy.
        noted = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
        calls.append(_Call(path, layer, inputs[0].detach(), noted))
        return noted.clone()

    with ExitStack() as hooks, torch.enable_grad(), all_experts(model):
        for path, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(note, path=path)).remove)
        mean = loss(model, batch)
        size = next(len(values) for values in batch.values() if isinstance(values, Tensor) and values.ndim)
        return calls, size * mean, size


def _squared(call: _Call, gradient: Tensor) -> Tensor:
    """Sum the products of squared inputs and squared gradients, in the shape of the weight."""
    variances = torch.zeros_like(call.layer.log_var, requires_grad=True)
    with torch.enable_grad():
        # How the layer spreads variances says where each one goes, whatever kind of layer it is.
        spread = call.layer.multiply(call.inputs.to(variances.dtype).square(), variances)
    (squared,) = torch.autograd.grad(spread, variances, gradient.to(spread.dtype).square())
    return squared


def _by_scale(call: _Call, gradient: Tensor, batch_size: int) -> Tensor:
    """Differentiate the loss of each example by the scale of each group, shape `(batch_size, num_groups)`."""
    layer, mean = call.layer, call.layer.mean.detach()
    # In mixed precision they are narrower than the weights.
    inputs, gradient = call.inputs.to(mean.dtype).requires_grad_(), gradient.to(mean.dtype)
    with torch.enable_grad():
        outputs = layer.multiply(inputs, mean)
    if layer.group_axis == feature_axis(layer, Axis.OUT):
        signal = outputs.detach() * gradient
    else:
        (back,) = torch.autograd.grad(outputs, inputs, gradient)
        signal = inputs.detach() * back
    axis = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d) else signal.ndim - 1
    by_feature = signal.movedim(axis, 1).unsqueeze(-1).flatten(2).sum(2)
    if len(by_feature) % batch_size == 0:  # tokens or windows of all examples can lie along one axis
        by_feature = by_feature.unflatten(0, (batch_size, len(by_feature) // batch_size)).sum(1)
    return layer.prior.sum_groups(by_feature).to(layer.log_var.dtype)
