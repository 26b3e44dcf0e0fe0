# SPDX-License-Identifier: Apache-2.0
r"""Let what is left of a sub-layer make up for what is gone, by least squares and without any training.

The layer that reads the remaining heads or neurons gets the weights with which its outputs are closest to those that
the dense model has at the same place:

.. math::
    \min_{W, b}\; \mathbb E \| W x + b - y \|^2 + \rho\, \bar a\, \| W - W_0 \|^2

over the attended positions of some examples, for inputs :math:`x` in the pruned model and outputs :math:`y` of the
dense one. :math:`\bar a` is the mean variance of an input, so that :math:`\rho` has no unit.

References:
    He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, section 3.1,
    https://arxiv.org/abs/1707.06168
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.functional import add_whole_, whole
from hf_vdneuron.layers import DenseLayer, VariationalLayer, dense_layer, feature_axis
from hf_vdneuron.masks import read_mask
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.sharding import dense_copy
from hf_vdneuron.sublayers import Axis, Sublayer


__all__ = ["Corrections", "correct_", "corrections", "reconstruct_"]

#: Path of a layer that reads units -> what its weight gains by `weight` and its bias by `bias`.
Corrections = dict[str, dict[str, Tensor]]

#: Runs a model on a batch; what it returns does not matter.
Forward = Callable[[nn.Module, Mapping[str, Any]], object]

#: Positions that are read for each input of a layer: with as many, a fit misses a sixteenth more than the best one.
POSITIONS_PER_INPUT = 16

#: How strongly weights are held where they were, relative to the variance of an input.
RIDGE = 1e-2


def _run(model: nn.Module, batch: Mapping[str, Any]) -> object:
    return model(**batch)


@torch.no_grad()
def reconstruct_(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    ridge: float = RIDGE,
    forward: Forward = _run,
) -> nn.Module:
    """Fit the layers that read heads and neurons anew, one after the other from the input to the output, in place.

    Sub-layers ahead of the first that lost something, with nothing left, without a bias to correct, or read by a
    convolution stay as they are.

    Args:
        model: A pruned model; put into evaluation mode.
        dense: The model that it was cut from; likewise.
        batches: Keyword arguments of a forward of both, labels not needed; each sub-layer reads as many as it needs.
        ridge: How strongly weights are held where they were, above 0.
        forward: Runs a model on a batch; what it returns does not matter.

    Returns:
        The pruned model.

    Raises:
        ValueError: If there is no attended position, or a batch does not come to every sub-layer.
    """
    model.eval()
    dense.eval()
    has_changed = False
    for sublayer, complete in zip(find_sublayers(model), find_sublayers(dense), strict=True):
        has_changed |= sublayer.num_units < complete.num_units
        if not has_changed:
            continue
        part = sublayer.out_side.slices[0]
        reader, original = dense_layer(model, part.module), dense_layer(dense, part.module)
        if sublayer.num_units and isinstance(reader, nn.Linear | Conv1D) and reader.bias is not None:
            moments = _Moments(reader)
            for batch in batches:
                if moments.count >= POSITIONS_PER_INPUT * len(moments.input):
                    break
                made, wanted = (
                    _passes(*one, partial(forward, one[0], batch), sublayer.repeats)
                    for one in ((model, reader), (dense, original))
                )
                for (inputs, _), (_, outputs) in zip(made, wanted, strict=True):
                    attended = _attended(batch, inputs)
                    moments.add(inputs[attended], outputs[attended])
            moments.solve_(reader, ridge)
    return model


@torch.no_grad()
def corrections(
    model: nn.Module, dense: nn.Module, batches: Sequence[Mapping[str, Any]], *, forward: Forward = _run
) -> Corrections:
    """Find what a masked model would gain by being reconstructed, by a copy of it that is cut.

    Args:
        model: A patched, masked model; it is left alone. If it is sharded, every process has to call this.
        dense: The model before it was masked; put into evaluation mode.
        batches: As `reconstruct_` takes them.
        forward: Likewise.

    Returns:
        The corrections, of readers that can be fitted alone, on the CPU.
    """
    mask = read_mask(model)
    pruned = prune_model_(dense_copy(model), mask)
    readers = {part.path: _reader(pruned, part) for part in find_sublayers(pruned)}
    before = {path: deepcopy(dict(reader.named_parameters())) for path, reader in readers.items()}
    reconstruct_(pruned, dense, batches, forward=forward)
    found: Corrections = {}
    for sublayer in find_sublayers(model):
        part, reader = sublayer.out_side.slices[0], readers[sublayer.path]
        changes = {name: value - before[sublayer.path][name] for name, value in reader.named_parameters()}
        if not any(change.any() for change in changes.values()):
            continue
        axis, features = feature_axis(reader, Axis.IN), part.features(mask.units_left(sublayer)).flatten()
        everywhere = torch.zeros_like(dense_layer(dense, part.module).weight)
        changes["weight"] = everywhere.index_copy_(axis, features.to(everywhere.device), changes["weight"])
        found[part.module] = {name: change.cpu() for name, change in changes.items()}
    return found


@torch.no_grad()
def correct_(model: nn.Module, corrections: Corrections) -> nn.Module:
    """Let a masked model have its corrections, in place.

    Args:
        model: The model that they were found for. If it is sharded, every process has to call this.
        corrections: The corrections, the same in every process.

    Returns:
        The same model.
    """
    for path, changes in corrections.items():
        layer, change = dense_layer(model, path), changes["weight"]
        if isinstance(layer, VariationalLayer) and layer.group_scale is not None:
            # The weight is what the scale of its group multiplies; one of 0 has ended it.
            scale = whole(layer.group_scale)[layer.prior.feature_group].to(change)
            per_feature = [1] * change.ndim
            per_feature[layer.group_axis] = -1
            change = change / torch.where(scale == 0, torch.inf, scale).view(per_feature)
        add_whole_(layer.weight, change)
        add_whole_(layer.bias, changes["bias"])  # type: ignore[arg-type]  # without a bias there is no correction
    return model


def _reader(model: nn.Module, sublayer: Sublayer) -> DenseLayer:
    """The layer that reads the units of a sub-layer."""
    return dense_layer(model, sublayer.out_side.slices[0].module)


class _Moments:
    """Second moments of a layer's inputs and the outputs that it should have, in float64.

    Args:
        reader: The layer.
    """

    def __init__(self, reader: DenseLayer) -> None:
        weight = _weight(reader)
        num_outputs, num_inputs = weight.shape
        self.count = 0
        self.input = weight.new_zeros(num_inputs, dtype=torch.float64)
        self.output = weight.new_zeros(num_outputs, dtype=torch.float64)
        self.input_input = weight.new_zeros(num_inputs, num_inputs, dtype=torch.float64)
        self.input_output = weight.new_zeros(num_inputs, num_outputs, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count positions in, shapes `(num_positions, num_inputs)` and `(num_positions, num_outputs)`."""
        inputs, outputs = inputs.float(), outputs.float()
        self.count += len(inputs)
        self.input += inputs.sum(0)
        self.output += outputs.sum(0)
        self.input_input += inputs.t() @ inputs
        self.input_output += inputs.t() @ outputs

    def solve_(self, reader: DenseLayer, ridge: float) -> None:
        """Give the layer the weights and the bias that fit best."""
        if self.count == 0:
            raise ValueError("There is no attended position to fit to: expected batches that can be read many times.")
        mean_input, mean_output = self.input / self.count, self.output / self.count
        covariance = self.input_input / self.count - torch.outer(mean_input, mean_input)
        crossed = self.input_output / self.count - torch.outer(mean_input, mean_output)
        held = ridge * covariance.diagonal().mean()
        before = _weight(reader).double().t()
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        # Inputs that never vary say nothing of their weights.
        weight = torch.linalg.solve(covariance + held * identity, crossed + held * before) if held > 0 else before
        _weight(reader).copy_(weight.t())
        reader.bias.copy_(mean_output - weight.t() @ mean_input)  # type: ignore[union-attr]  # the caller has checked


def _weight(reader: DenseLayer) -> Tensor:
    """A view of the weight, shape `(num_outputs, num_inputs)`."""
    return reader.weight.t() if isinstance(reader, Conv1D) else reader.weight


class _Reached(Exception):  # no error: it ends a forward where all that was asked of it is known
    """What went into a layer, and what came out of it, is known for all of its passes."""


def _passes(
    model: nn.Module, layer: DenseLayer, run: Callable[[], object], repeats: int
) -> list[tuple[Tensor, Tensor]]:
    """Run a batch as far as the last pass through a layer, and catch what goes into it and what comes out."""
    passes: list[tuple[Tensor, Tensor]] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        passes.append((inputs[0], outputs))
        if len(passes) == repeats:
            raise _Reached

    with layer.register_forward_hook(catch):
        try:
            run()
        except _Reached:
            return passes
    raise ValueError(
        f"A forward of `{type(model).__name__}` never comes to `{layer}`: expected batches that it reads."
    )


def _attended(batch: Mapping[str, Any], inputs: Tensor) -> Tensor:
    """Tell which positions count, bool in the shape of the inputs without their features."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == inputs.shape[:-1]:
        return mask.bool()
    return torch.ones(inputs.shape[:-1], dtype=torch.bool, device=inputs.device)
