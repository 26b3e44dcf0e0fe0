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
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
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

#: Positions that are read at least, for the mean.
LEAST_POSITIONS = 1024

#: How strongly weights are held where they were, relative to the variance of an input.
RIDGE = 1e-2

#: Bytes of the dense model's outputs that are kept at a time: those of a small model all fit, so that one forward of
#: it serves every layer.
KEPT_BYTES = 2**29

#: Adds up a tensor over all processes.
Pool = Callable[[Tensor], Tensor]


def _alone(values: Tensor) -> Tensor:
    return values


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
    pool: Pool = _alone,
) -> nn.Module:
    """Fit the layers that read heads and neurons anew, one after the other from the input to the output, in place.

    Sub-layers ahead of the first that lost something stay as they are, and so do those without a bias to correct,
    those that a convolution reads, and those that lost nothing and that the batches do not come to. Where nothing is
    left of one, its bias is fitted: the layer is not called any more.

    Args:
        model: A pruned model; put into evaluation mode.
        dense: The model that it was cut from; likewise.
        batches: Keyword arguments of a forward of both, labels not needed; each sub-layer reads as many as it needs.
        ridge: How strongly weights are held where they were, above 0.
        forward: Runs a model on a batch; what it returns does not matter.
        pool: Adds up a tensor of sums over all processes.

    Returns:
        The pruned model.

    Raises:
        ValueError: If no attended position of any batch comes to a sub-layer that lost something.
    """
    model.eval()
    dense.eval()
    fits = _fits(model, dense)
    wanted = _DenseOutputs(fits, batches, dense, forward)
    # Batches may come sorted, by length or by class, and some layers read only a few.
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    for fit in fits:
        moments = _Moments(fit.reader)
        for number in order:
            if moments.count >= fit.num_positions:
                break
            targets = wanted.pop(fit, number)
            # With nothing left, a layer is not called: it has no inputs, and is its bias.
            inputs = [target[:, :0] for target in targets]
            if fit.is_called:
                inputs = _passes({fit.reader: fit.repeats}, forward, model, batches[number], Axis.IN)[fit.reader]
            for read, target in zip(inputs, targets, strict=True):
                moments.add(read, target)
        moments.pool_(pool)
        if moments.count:
            moments.solve_(fit.reader, ridge)
        elif fit.has_lost:
            raise ValueError(
                f"No attended position of any batch comes to {fit.reader}, which has lost something: expected batches "
                "that the whole model reads, and that can be read many times."
            )
    return model


@dataclass(frozen=True, eq=False)
class _Fit:
    """A layer that is to be fitted.

    Args:
        reader: The layer in the pruned model.
        original: The same one in the dense model.
        repeats: Passes through it in a forward.
        has_lost: Whether its own sub-layer has lost something, or only those ahead of it.
    """

    reader: DenseLayer
    original: DenseLayer
    repeats: int
    has_lost: bool

    @property
    def is_called(self) -> bool:
        """Whether there is anything left to read."""
        return _weight(self.reader).shape[1] > 0

    @property
    def num_positions(self) -> int:
        """Positions to read, if there are as many."""
        return max(POSITIONS_PER_INPUT * _weight(self.reader).shape[1], LEAST_POSITIONS)

    @property
    def num_bytes(self) -> int:
        """Bytes of outputs that this takes."""
        weight = _weight(self.original)
        return self.num_positions * weight.shape[0] * weight.element_size()


def _fits(model: nn.Module, dense: nn.Module) -> list[_Fit]:
    """List the layers to fit, from the input to the output."""
    fits, has_changed = [], False
    for sublayer, complete in zip(find_sublayers(model), find_sublayers(dense), strict=True):
        has_lost = sublayer.num_units < complete.num_units
        has_changed |= has_lost
        reader, original = _reader(model, sublayer), _reader(dense, complete)
        if has_changed and _can_be_fitted(reader, original):
            fits.append(_Fit(reader, original, sublayer.repeats, has_lost))
    return fits


def _can_be_fitted(reader: DenseLayer, original: DenseLayer) -> bool:
    """Tell whether a layer has a bias and all its outputs; in a chain, the next cut may have taken some."""
    if not isinstance(reader, nn.Linear | Conv1D) or reader.bias is None:
        return False
    return len(_weight(reader)) == len(_weight(original))


@torch.no_grad()
def corrections(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    forward: Forward = _run,
    pool: Pool = _alone,
) -> Corrections:
    """Find what a masked model would gain by being reconstructed, by a copy of it that is cut.

    Args:
        model: A patched, masked model; it is left alone. If it is sharded, every process has to call this.
        dense: The model before it was masked; put into evaluation mode.
        batches: As `reconstruct_` takes them.
        forward: Likewise.
        pool: Likewise.

    Returns:
        The corrections, of readers that can be fitted alone, on the CPU.
    """
    mask = read_mask(model)
    pruned = prune_model_(dense_copy(model), mask)
    readers = {part.path: _reader(pruned, part) for part in find_sublayers(pruned)}
    before = {path: deepcopy(dict(reader.named_parameters())) for path, reader in readers.items()}
    reconstruct_(pruned, dense, batches, forward=forward, pool=pool)
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
        wide = torch.float32 if weight.device.type == "mps" else torch.float64  # which it does not have
        self.count = 0
        self.input = weight.new_zeros(num_inputs, dtype=wide)
        self.output = weight.new_zeros(num_outputs, dtype=wide)
        self.input_input = weight.new_zeros(num_inputs, num_inputs, dtype=wide)
        self.input_output = weight.new_zeros(num_inputs, num_outputs, dtype=wide)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count positions in, shapes `(num_positions, num_inputs)` and `(num_positions, num_outputs)`."""
        inputs, outputs = inputs.float(), outputs.float()
        self.count += len(inputs)
        self.input += inputs.sum(0)
        self.output += outputs.sum(0)
        self.input_input += inputs.t() @ inputs
        self.input_output += inputs.t() @ outputs

    def pool_(self, pool: Pool) -> None:
        """Add up what all processes have counted."""
        self.count = int(pool(torch.tensor(self.count, device=self.input.device)).item())
        for name in ("input", "output", "input_input", "input_output"):
            setattr(self, name, pool(getattr(self, name)))

    def solve_(self, reader: DenseLayer, ridge: float) -> None:
        """Give the layer the weights and the bias that fit best."""
        mean_input, mean_output = self.input / self.count, self.output / self.count
        covariance = self.input_input / self.count - torch.outer(mean_input, mean_input)
        crossed = self.input_output / self.count - torch.outer(mean_input, mean_output)
        held = ridge * covariance.diagonal().mean()
        before = _weight(reader).to(covariance.dtype).t()
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        # Inputs that never vary say nothing of their weights.
        weight = torch.linalg.solve(covariance + held * identity, crossed + held * before) if held > 0 else before
        _weight(reader).copy_(weight.t())
        reader.bias.copy_(mean_output - weight.t() @ mean_input)  # type: ignore[union-attr]  # the caller has checked


def _weight(reader: DenseLayer) -> Tensor:
    """A view of the weight, shape `(num_outputs, num_inputs)`."""
    return reader.weight.t() if isinstance(reader, Conv1D) else reader.weight


class _DenseOutputs:
    """What layers of the dense model give at attended positions, each asked for once, batch by batch.

    Args:
        fits: The layers, in the order in which they are asked for, which is that of a forward.
        batches: Keyword arguments of a forward.
        dense: The dense model.
        forward: Runs it on a batch.
    """

    def __init__(
        self, fits: Sequence[_Fit], batches: Sequence[Mapping[str, Any]], dense: nn.Module, forward: Forward
    ) -> None:
        self.fits = fits
        self.batches = batches
        self.dense = dense
        self.forward = forward
        self.kept: dict[tuple[_Fit, int], list[Tensor]] = {}
        self.num_positions = dict.fromkeys(fits, 0)

    def pop(self, fit: _Fit, number: int) -> list[Tensor]:
        """Give the outputs of one layer for one batch, pass by pass, shapes `(num_positions, num_outputs)`."""
        if (fit, number) not in self.kept:
            self._keep_(fit, number)
        return self.kept.pop((fit, number))

    def _keep_(self, first: _Fit, number: int) -> None:
        """Run a batch, for the first layer and as many behind it as there is room for."""
        behind = self.fits[self.fits.index(first) :]
        filled = accumulate(fit.num_bytes for fit in behind)
        chosen = [
            fit
            for fit, num_bytes in zip(behind, filled, strict=True)
            if fit is first or (num_bytes <= KEPT_BYTES and self.num_positions[fit] < fit.num_positions)
        ]
        repeats = {fit.original: fit.repeats for fit in chosen}
        outputs = _passes(repeats, self.forward, self.dense, self.batches[number], Axis.OUT)
        for fit in chosen:
            self.kept[fit, number] = outputs[fit.original]
            self.num_positions[fit] += sum(map(len, outputs[fit.original]))


class _Reached(Exception):  # no error: it ends a forward where all that was asked of it is known
    """What went into a layer, and what came out of it, is known for all of its passes."""


def _passes(
    repeats: Mapping[DenseLayer, int],
    forward: Forward,
    model: nn.Module,
    batch: Mapping[str, Any],
    end: Axis,
) -> dict[DenseLayer, list[Tensor]]:
    """Run a model as far as the last pass through some layers; return what goes in or comes out where attended."""
    passes: dict[DenseLayer, list[Tensor]] = {layer: [] for layer in repeats}

    def catch(layer: DenseLayer, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        if len(passes[layer]) < repeats[layer]:
            signal = inputs[0] if end is Axis.IN else outputs
            passes[layer].append(signal[_attended(batch, signal)])  # a copy, as what comes next may work in place
        if all(len(its) == repeats[layer] for layer, its in passes.items()):
            raise _Reached

    with ExitStack() as hooks, suppress(_Reached):
        for layer in repeats:
            hooks.callback(layer.register_forward_hook(catch).remove)
        forward(model, batch)
    return passes


def _attended(batch: Mapping[str, Any], inputs: Tensor) -> Tensor:
    """Tell which positions count, bool in the shape of the inputs without their features."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == inputs.shape[:-1]:
        return mask.bool()
    return torch.ones(inputs.shape[:-1], dtype=torch.bool, device=inputs.device)
