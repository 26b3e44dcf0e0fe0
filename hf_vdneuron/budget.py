# SPDX-License-Identifier: Apache-2.0
"""What a structure costs, and what it may cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf, prod, sqrt

from torch import nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.elbo import variational_parameters
from hf_vdneuron.layers import dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.sublayers import Axis, Role, Slice, Sublayer, Unit


__all__ = [
    "BodyCost",
    "Budget",
    "Costs",
    "UnitCounts",
    "body_cost",
    "cost_ratio",
    "speedup",
    "unit_counts",
    "units_left",
]

#: Path of a sub-layer -> units left in it; not whole where it is an expectation. Those that are missing are complete.
UnitCounts = Mapping[str, float]

#: Sub-layers that take features from a layer, and which ones.
_Losses = tuple[tuple[Sublayer, Slice], ...]

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


@dataclass(frozen=True)
class _Layer:
    """A layer, and which sub-layers take features from it.

    Args:
        features: Number of its features along each axis.
        per_pair: Weights per pair of an output and an input feature: the kernel's size; 0 for a norm.
        per_output: Parameters per output feature: its bias, or what a norm holds.
        losses: Sub-layers, and the features that their units own.
        runs: How often it runs for one sequence, in positions.
    """

    features: Mapping[Axis, int]
    per_pair: int
    per_output: int
    losses: _Losses
    runs: float

    def left(self, counts: UnitCounts) -> Mapping[Axis, float]:
        """Number of features left along each axis."""
        left: dict[Axis, float] = dict(self.features)
        for sublayer, part in self.losses:
            left[part.axis] -= (sublayer.num_units - counts.get(sublayer.path, sublayer.num_units)) * part.size
        return left

    def weights(self, counts: UnitCounts) -> float:
        """Weights left, those of norms and biases not among them."""
        return self.per_pair * prod(self.left(counts).values())

    def products(self, counts: UnitCounts) -> float:
        """Multiply-accumulates left for one sequence."""
        return self.weights(counts) * self.runs

    def parameters(self, counts: UnitCounts) -> float:
        """Parameters left."""
        return self.weights(counts) + self.per_output * self.left(counts)[Axis.OUT]


class Costs:
    """What the structures of a model cost, as functions of the units that they keep.

    Args:
        model: A dense, patched or pruned model. It is looked at once, here.
        length: Tokens of one sequence, of an encoder and a decoder alike; of a map its positions, where the first
            blocks read it, as if it were square. What a model reads beside a text, an image of CLIP or a sound of
            Whisper, has the positions that its config says.

    Attributes:
        sublayers: Its sub-layers, in order.
    """

    def __init__(self, model: nn.Module, *, length: int) -> None:
        self.length = length
        self.sublayers = find_sublayers(model)
        losses: dict[tuple[str, str], list[tuple[Sublayer, Slice]]] = {}
        for sublayer in self.sublayers:
            for part in sublayer.slices:
                losses.setdefault((part.module, part.parameter), []).append((sublayer, part))
        self._layers = [_layer(model, tuple(parts), length) for parts in losses.values()]
        own = variational_parameters(model)
        total = sum(parameter.numel() for parameter in model.parameters() if parameter not in own)
        self._elsewhere = total - sum(layer.parameters({}) for layer in self._layers)

    def weights(self, counts: UnitCounts) -> float:
        """Count the weights of heads and neurons.

        Args:
            counts: Units left.

        Returns:
            Their number.
        """
        return sum(layer.weights(counts) for layer in self._layers)

    def parameters(self, counts: UnitCounts) -> float:
        """Count the parameters of the whole model, as `num_parameters` does once it is pruned.

        Args:
            counts: Units left.

        Returns:
            Their number.
        """
        return self._elsewhere + sum(layer.parameters(counts) for layer in self._layers)

    def macs(self, counts: UnitCounts) -> float:
        """Count the multiply-accumulates of heads and neurons, as torch's `FlopCounterMode` does of eager attention.

        What goes with the last unit of a block, such as a convolution that halves its keys, is none of theirs.
        Attention adds, per head, one product of queries with keys, one of attention weights with values, and those of
        either with relative positions, if it is told of any.

        Args:
            counts: Units left.

        Returns:
            Their number for one sequence by itself.
        """
        products = sum(layer.products(counts) for layer in self._layers)
        return products + sum(
            counts.get(part.path, part.num_units) * part.out_side.slices[0].size * part.repeats * self._compared(part)
            for part in self.sublayers
            if part.unit is Unit.HEAD
        )

    def _compared(self, attention: Sublayer) -> float:
        """Count what queries, keys and attention weights are multiplied with."""
        queries, relative = _positions(attention, self.length), attention.relative
        keys = min(_keys(attention, self.length), attention.window**2 if attention.window else inf)
        return queries * (2 * keys + (relative.comparisons * relative.number(queries) if relative else 0))


def _positions(sublayer: Sublayer, length: int) -> float:
    """Count the positions of one sequence at which a sub-layer runs once."""
    positions = (sublayer.length or length) * sublayer.positions
    side = sqrt(positions)
    if sublayer.window is None or side <= sublayer.window:
        return positions
    return (ceil(side / sublayer.window) * sublayer.window) ** 2  # a map is padded to whole windows


def _keys(attention: Sublayer, length: int) -> float:
    """Count the keys of one sequence."""
    return attention.memory or _positions(attention, length) / attention.reduction


def _layer(model: nn.Module, losses: _Losses, length: int) -> _Layer:
    part = losses[0][1]
    runs = max(_runs(model, sublayer, its, length) for sublayer, its in losses)
    if part.role in (Role.NORM, Role.BIAS):
        module = model.get_submodule(part.module)
        held = list(module.parameters()) if part.role is Role.NORM else [module.get_parameter(part.parameter)]
        per_feature = sum(prod(parameter.shape[:-1]) for parameter in held)
        return _Layer({Axis.OUT: held[0].shape[-1] if held else 0}, 0, per_feature, losses, runs)
    layer = dense_layer(model, part.module)
    features = {axis: layer.weight.shape[feature_axis(layer, axis)] for axis in Axis}
    return _Layer(features, prod(layer.weight.shape[2:]), int(layer.bias is not None), losses, runs)


def _runs(model: nn.Module, sublayer: Sublayer, part: Slice, length: int) -> float:
    """Count the positions of one sequence at which a layer runs."""
    positions = _positions(sublayer, length)
    relative = sublayer.relative.number(positions) if sublayer.relative else 0
    if part.role is Role.POSITION:
        positions = relative
    elif part.role in (Role.QUERY, Role.KEY, Role.VALUE):
        is_shared = sublayer.relative is not None and sublayer.relative.are_shared and part.role is not Role.VALUE
        positions = (positions if part.role is Role.QUERY else _keys(sublayer, length)) + is_shared * relative
    elif part.axis is Axis.OUT:  # units are made at all positions, and read at fewer by a convolution with a stride
        reader = dense_layer(model, sublayer.out_side.slices[0].module)
        positions *= prod(reader.stride) if isinstance(reader, nn.Conv1d | nn.Conv2d) else 1
    return positions * sublayer.repeats * sublayer.experts_per_token / sublayer.num_experts


def unit_counts(sublayers: list[Sublayer], mask: RelevanceMask) -> dict[str, int]:
    """Count what a mask leaves in a model once it is cut.

    Args:
        sublayers: The sub-layers of a model.
        mask: What is kept of them.

    Returns:
        Path of each sub-layer -> its units left.
    """
    return {sublayer.path: len(mask.units_left(sublayer)) for sublayer in sublayers}


def body_cost(model: nn.Module, *, length: int, mask: RelevanceMask = _KEEP_ALL) -> BodyCost:
    """Count what a model's heads and neurons cost.

    Args:
        model: A dense, patched or pruned model.
        length: Tokens of one sequence; of a map its positions, where the first blocks read it.
        mask: What is kept; everything by default.

    Returns:
        Weights and multiply-accumulates.
    """
    costs = Costs(model, length=length)
    counts = unit_counts(costs.sublayers, mask)
    return BodyCost(int(costs.weights(counts)), int(costs.macs(counts)))


def speedup(model: nn.Module, mask: RelevanceMask, *, length: int) -> float:
    """Predict the speed-up of a body by its multiply-accumulates.

    Args:
        model: A dense or patched model.
        mask: What is kept.
        length: Tokens of one sequence.

    Returns:
        Dense over pruned multiply-accumulates, at least 1; infinite if nothing is left.
    """
    costs = Costs(model, length=length)
    return cost_ratio(costs.macs({}), costs.macs(unit_counts(costs.sublayers, mask)))


def cost_ratio(dense: float, left: float) -> float:
    """Compare two costs.

    Args:
        dense: Cost of a complete model.
        left: Cost of what is left of it.

    Returns:
        The first over the second; infinite if nothing is left.
    """
    return dense / left if left else inf


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
        left[sublayer.unit].append(len(mask.units_left(sublayer)))
    return left


# ---- From a target to what may be kept ----


@dataclass(frozen=True)
class Budget:
    """What a structure may cost.

    Args:
        name: Name of the option that asked for it.
        asked: Its value.
        cost: Function from units left to their cost; it never falls when units are added.
        limit: Highest cost that meets the target.
        achieved: Function from a cost to what the option would be for it.
        digits: How its values are written, as a format.
    """

    name: str
    asked: float
    cost: Callable[[UnitCounts], float]
    limit: float
    achieved: Callable[[float], float]
    digits: str = ".4g"

    def require_reachable(self, least: UnitCounts) -> None:
        """Refuse a target that no structure meets, or that the whole model does.

        Args:
            least: Units left when all that can be removed is.

        Raises:
            ValueError: If even that costs more than the limit, or the complete model no more.
        """
        asked, most, now = (
            format(value, self.digits)
            for value in (self.asked, self.achieved(self.cost(least)), self.achieved(self.cost({})))
        )
        if self.cost(least) > self.limit:
            raise ValueError(
                f"`{self.name}` is {asked}, out of reach: with every patched head and neuron gone it is {most}. Stay "
                f"on this side of that, or let `VDConfig` patch more."
            )
        if self.cost({}) <= self.limit:
            raise ValueError(
                f"`{self.name}` is {asked}, which the complete model meets: it has {now}. Set it between that and "
                f"{most}, or leave it out."
            )
