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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.layers import DenseLayer, dense_layer


__all__ = ["reconstruct_"]

#: How strongly weights are held where they were, relative to the variance of an input.
RIDGE = 1e-2


@torch.no_grad()
def reconstruct_(
    model: nn.Module, dense: nn.Module, batches: Sequence[Mapping[str, Any]], *, ridge: float = RIDGE
) -> nn.Module:
    """Fit the layers that read heads and neurons anew, one after the other from the input to the output, in place.

    Sub-layers ahead of the first that lost something, with nothing left, without a bias to correct, or read by a
    convolution stay as they are.

    Args:
        model: A pruned model; put into evaluation mode.
        dense: The model that it was cut from; likewise.
        batches: Keyword arguments of a forward of both, labels not needed; read once per sub-layer.
        ridge: How strongly weights are held where they were, above 0.

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
                made, wanted = (_passes(*one, batch, sublayer.repeats) for one in ((model, reader), (dense, original)))
                for (inputs, _), (_, outputs) in zip(made, wanted, strict=True):
                    attended = _attended(batch, inputs)
                    moments.add(inputs[attended], outputs[attended])
            moments.solve_(reader, ridge)
    return model


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
    model: nn.Module, layer: DenseLayer, batch: Mapping[str, Any], repeats: int
) -> list[tuple[Tensor, Tensor]]:
    """Run a batch as far as the last pass through a layer, and catch what goes into it and what comes out."""
    passes: list[tuple[Tensor, Tensor]] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        passes.append((inputs[0], outputs))
        if len(passes) == repeats:
            raise _Reached

    with layer.register_forward_hook(catch):
        try:
            model(**batch)
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
