# SPDX-License-Identifier: Apache-2.0
"""What a structure costs: weights and multiply-accumulates of the heads and neurons that are left."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, prod

from torch import nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.layers import dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.sublayers import Axis, Sublayer, Unit


__all__ = ["BodyCost", "body_cost", "speedup", "units_left"]

_KEEP_ALL = RelevanceMask({})


@dataclass(frozen=True)
class BodyCost:
    """Cost of a model's body: everything between embeddings and head that heads and neurons own.

    Args:
        weights: Weights of all heads and neurons.
        macs: Multiply-accumulates of one sequence.
    """

    weights: int
    macs: int


def _sizes(model: nn.Module, sublayers: list[Sublayer], mask: RelevanceMask) -> Iterator[int]:
    """Yield the number of weights that each matrix keeps; a matrix between two sub-layers loses rows and columns."""
    left: dict[str, dict[Axis, int]] = {}
    for sublayer in sublayers:
        num_removed = sublayer.num_units - len(mask.kept_units(sublayer))
        for part in sublayer.matrices:
            layer = dense_layer(model, part.module)
            full = {axis: layer.weight.shape[feature_axis(layer, axis)] for axis in Axis}
            left.setdefault(part.module, full)[part.axis] -= num_removed * part.size
    for path, kept in left.items():
        yield kept[Axis.OUT] * kept[Axis.IN] * prod(dense_layer(model, path).weight.shape[2:])


def body_cost(model: nn.Module, *, length: int, mask: RelevanceMask = _KEEP_ALL) -> BodyCost:
    """Count what a model's heads and neurons cost.

    Args:
        model: A dense, patched or pruned model.
        length: Tokens of one sequence (positions of a map, for a chain with convolutions).
        mask: What is kept; everything by default.

    Returns:
        Weights and multiply-accumulates. Attention adds, per head, one product of queries with keys and one of
        attention weights with values.
    """
    sublayers = find_sublayers(model)
    weights = sum(_sizes(model, sublayers, mask))
    heads = (
        (len(mask.kept_units(part)) * part.sides[0].slices[0].size) for part in sublayers if part.unit is Unit.HEAD
    )
    return BodyCost(weights, length * weights + 2 * length**2 * sum(heads))


def speedup(model: nn.Module, mask: RelevanceMask, *, length: int) -> float:
    """Predict the speed-up of a body by its multiply-accumulates.

    Args:
        model: A dense or patched model.
        mask: What is kept.
        length: Tokens of one sequence.

    Returns:
        Dense over pruned multiply-accumulates, at least 1; infinite if nothing is left.
    """
    pruned = body_cost(model, length=length, mask=mask).macs
    return body_cost(model, length=length).macs / pruned if pruned else inf


def units_left(model: nn.Module, mask: RelevanceMask = _KEEP_ALL) -> dict[Unit, list[int]]:
    """Count the heads and neurons of each layer.

    Args:
        model: A dense, patched or pruned model.
        mask: What is kept; everything by default.

    Returns:
        Number of units left in each sub-layer, in order, by kind of unit.
    """
    left: dict[Unit, list[int]] = {unit: [] for unit in Unit}
    for sublayer in find_sublayers(model):
        left[sublayer.unit].append(len(mask.kept_units(sublayer)))
    return left
