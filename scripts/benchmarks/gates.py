# SPDX-License-Identifier: Apache-2.0
"""A gate on every head and neuron: a number that multiplies what it emits.

What a loss says about its gate is what it says about a unit. Baselines that score by gradients, and those that learn
gates, put them here.

References:
    Michel et al., "Are Sixteen Heads Really Better than One?", 2019, https://arxiv.org/abs/1905.10650
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.layers import DenseLayer, dense_layer, feature_axis
from hf_vdneuron.sublayers import Axis, Slice


__all__ = ["fold_gates_", "gate_gradients", "gated"]


@contextmanager
def gated(model: nn.Module, gates: Mapping[str, Tensor]) -> Generator[None]:
    """Let gates multiply what units emit, for as long as the context lasts.

    Args:
        model: A dense or patched model.
        gates: Path of a sub-layer -> gates of its units, shape `(num_units,)`, or `(batch_size, num_units)` for a
            gate per example. Looked up in every forward, so that they may change between two.

    Yields:
        Nothing.
    """
    with ExitStack() as hooks:
        for sublayer in find_sublayers(model):
            for part in sublayer.out_side.slices:
                hook = partial(_apply_gates, part=part, path=sublayer.path, gates=gates)
                hooks.callback(dense_layer(model, part.module).register_forward_pre_hook(hook).remove)
        yield


def _apply_gates(
    reader: DenseLayer, inputs: tuple[Tensor, ...], *, part: Slice, path: str, gates: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    own = gates.get(path)
    if own is None:
        return inputs
    (signal,) = inputs
    axis = 1 if isinstance(reader, nn.Conv1d | nn.Conv2d) else signal.ndim - 1
    per_feature = part.spread(own, signal.shape[axis], elsewhere=1)
    shape = [1] * signal.ndim
    shape[axis] = -1
    if own.ndim > 1:
        shape[0] = len(own)
    return (signal * per_feature.view(shape).to(signal.dtype),)


@torch.no_grad()
def fold_gates_(model: nn.Module, gates: Mapping[str, Tensor]) -> nn.Module:
    """Multiply gates into the weights that read the units, in place: the model computes what it did behind them.

    Args:
        model: A dense model.
        gates: Path of a sub-layer -> gates of its units, shape `(num_units,)`.

    Returns:
        The same model.
    """
    for sublayer in find_sublayers(model):
        if sublayer.path not in gates:
            continue
        for part in sublayer.out_side.slices:
            layer = dense_layer(model, part.module)
            axis = feature_axis(layer, Axis.IN)
            factor = part.spread(gates[sublayer.path], layer.weight.shape[axis], elsewhere=1)
            layer.weight.transpose(axis, -1).mul_(factor)
    return model


def gate_gradients(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    r"""Differentiate the loss of each example by the gates of an intact model.

    One backward pass gives the gradients of a whole batch, as each example has gates of its own.

    Args:
        model: A dense model whose forward returns the mean `loss` of its batch; put into evaluation mode.
        batches: Keyword arguments of its forward, tensors with the batch along their first axis.

    Returns:
        Path of each sub-layer -> :math:`\partial L_i / \partial m_u` for example :math:`i` and unit :math:`u`, shape
        `(num_examples, num_units)`.
    """
    model.eval()
    sublayers = find_sublayers(model)
    rows: dict[str, list[Tensor]] = {sublayer.path: [] for sublayer in sublayers}
    for batch in batches:
        size = len(next(iter(batch.values())))
        device = next(model.parameters()).device
        gates = {part.path: torch.ones(size, part.num_units, device=device, requires_grad=True) for part in sublayers}
        with gated(model, gates):
            loss = model(**batch).loss
        # The loss is a mean, and that of one example depends on its own gates only.
        gradients = torch.autograd.grad(size * loss, list(gates.values()))
        for path, gradient in zip(gates, gradients, strict=True):
            rows[path].append(gradient.cpu())
    return {path: torch.cat(parts) for path, parts in rows.items()}
