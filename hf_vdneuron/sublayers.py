# SPDX-License-Identifier: Apache-2.0
"""The unit of pruning: heads and neurons as coupled slices of weight matrices.

A *sub-layer* is one attention block or one feed-forward block. Its *units* (heads, neurons, channels) are what can be
removed. A unit lives in several weight matrices at once: rows of the matrices that make it, columns of the matrix that
reads it. Patching, relevance, budget, pruning and reporting all speak of these objects; only `architectures` and
`chains` know where they lie in a model.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


__all__ = ["Axis", "RelativePositions", "Role", "Side", "SideName", "Slice", "Sublayer", "Unit"]


class Axis(StrEnum):
    """Which features of a weight matrix a slice runs over."""

    OUT = "out"
    """Output features: rows of a linear layer, filters of a convolution."""
    IN = "in"
    """Input features: columns of a linear layer, input channels of a convolution."""


class Role(StrEnum):
    """Position of a weight matrix in its sub-layer."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention_output"
    INTERMEDIATE = "intermediate"
    OUTPUT = "output"
    GATE = "gate"
    """What a gated feed-forward block multiplies its neurons by."""
    POSITION = "position"
    """Projection of relative positions to queries or keys."""
    BIAS = "bias"
    """A bias that lies outside of its projection; its last axis runs over the features."""
    NORM = "norm"
    DEPTHWISE = "depthwise"
    """A convolution of each neuron with itself alone."""


class Unit(StrEnum):
    """What a sub-layer is made of, and loses."""

    HEAD = "head"
    NEURON = "neuron"


class SideName(StrEnum):
    """The two ends of a unit; either alone makes it contribute nothing but a constant."""

    IN = "in"
    """What makes the unit: value rows of a head, intermediate rows of a neuron."""
    OUT = "out"
    """The matrix that reads the unit: columns of the output projection."""


@dataclass(frozen=True)
class Slice:
    """The features of one weight matrix that belong to the units of a sub-layer.

    A matrix can hold several slices: a fused projection makes the queries, keys and values of its heads. Unit `k` owns
    features `offset + k * stride, ..., offset + k * stride + size - 1` along `axis`.

    Args:
        module: Path of the module that holds the weight, from the root of the model.
        role: Position of that weight in the sub-layer.
        axis: Whether the features are outputs (rows) or inputs (columns) of the module.
        size: Features per unit, at least 1: the head size, times the heads that share a key; 1 for a neuron.
        stride: Distance between the first features of neighbouring units; `size` when units are packed.
        offset: First feature of unit 0 (fused matrices hold several slices behind one another).
        parameter: Name of the weight in the module.
    """

    module: str
    role: Role
    axis: Axis
    size: int = 1
    stride: int | None = None
    offset: int = 0
    parameter: str = "weight"

    def features(self, units: Tensor) -> Tensor:
        """Return the features that the given units own.

        Args:
            units: Unit indices, shape `(num,)`, integer.

        Returns:
            Feature indices, shape `(num, size)`, in the order of `units`.
        """
        stride = self.size if self.stride is None else self.stride
        first = self.offset + units.unsqueeze(-1) * stride
        return first + torch.arange(self.size, device=units.device)

    def spread(self, values: Tensor, num_features: int, *, elsewhere: float) -> Tensor:
        """Give each feature the value of the unit that owns it.

        Args:
            values: One value per unit, shape `(..., num_units)`.
            num_features: Features of the weight matrix along `axis`.
            elsewhere: Value of features that no unit owns.

        Returns:
            One value per feature, shape `(..., num_features)`, in the dtype and on the device of `values`.
        """
        features = self.features(torch.arange(values.shape[-1], device=values.device)).flatten()
        empty = values.new_full((*values.shape[:-1], num_features), elsewhere)
        return empty.index_copy(-1, features, values.repeat_interleave(self.size, dim=-1))


@dataclass(frozen=True)
class Side:
    """One end of the units of a sub-layer.

    Zeroing all of a unit's weights in all `slices` of one side ends the unit (method: Irrelevance).

    Args:
        name: Which end this is.
        slices: The slices that must vanish together; the first holds what the side is named for.
    """

    name: SideName
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class RelativePositions:
    """Embeddings of relative positions that queries, keys or both are compared with (He 2021, section 3.1).

    Args:
        span: How far they reach to either side.
        comparisons: How many of queries and keys are compared with them.
        follow_length: Whether those that reach beyond the sequence are left out.
        are_shared: Whether the projections to queries and keys make them too, and none of their own.

    References:
        He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", 2021,
        https://arxiv.org/abs/2006.03654
    """

    span: int
    comparisons: int
    follow_length: bool
    are_shared: bool

    def number(self, length: float) -> float:
        """Count them for a sequence.

        Args:
            length: Its tokens.

        Returns:
            Their number.
        """
        return 2 * (min(self.span, length) if self.follow_length else self.span)


@dataclass(frozen=True)
class Sublayer:
    """A block whose units can be removed.

    Args:
        path: Path of the block from the root of the model, unique within it.
        unit: What the block is made of.
        num_units: How many units it has now, at least 0. Heads that share a key and a value are one unit.
        sides: The ends of its units. A unit is irrelevant as soon as one side is. The last one is the out-side.
        companions: Slices that are removed with a unit but cannot end it (query and key rows, gates, norms, biases
            that lie outside of their projection).
        activations: Paths of the modules between in-side and out-side, in order. Applied to the in-side's bias they
            give the constant that a unit with zero in-side weights still emits. Empty for heads: their attention
            weights sum to one, so the constant is the value bias itself.
        foldable: Whether that constant can be added exactly to the out-projection's bias. Where it cannot (no bias,
            zero-padded convolution), units are masked on the out-side instead.
        attributes: Integer attributes that follow the number of units, as `(path of module, attribute, factor)`:
            the attribute is `factor * num_units`.
        attention: Path of the module that cannot run without a head and is replaced when none is left, or None.
        constant: The slice that holds the bias of the in-side where its own layer does not, or None.
        repeats: How often the block runs in one forward pass: layers can share it.
        positions: At how many positions it runs for each position of the first blocks, where maps get smaller.
        length: Positions of the first blocks, where these are not tokens of the text, or None.
        relative: Relative positions that its queries and keys are compared with, or None.
        window: Side of the square of a map's positions that each query looks at, or None if at all of them.
        reduction: How many positions share one key and one value. Not together with a window.
        memory: Positions that keys and values are made from, or None if those that make queries, or as many.
        minimum: How many units have to stay, as the block cannot run with fewer.
        num_experts: How many experts share the units out, each having as many as any other; 1 where there are none.
            Unit `k` of expert `e` is number `e * num_units / num_experts + k`.
        experts_per_token: How many of them each token is sent to.
    """

    path: str
    unit: Unit
    num_units: int
    sides: tuple[Side, ...]
    companions: tuple[Slice, ...] = ()
    activations: tuple[str, ...] = ()
    foldable: bool = True
    attributes: tuple[tuple[str, str, int], ...] = ()
    attention: str | None = None
    constant: Slice | None = None
    repeats: int = 1
    positions: float = 1.0
    length: int | None = None
    relative: RelativePositions | None = None
    window: int | None = None
    reduction: int = 1
    memory: int | None = None
    minimum: int = 0
    num_experts: int = 1
    experts_per_token: int = 1

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All slices that a unit loses when it is removed: those of every side, then the companions, each once."""
        return tuple(dict.fromkeys((*(part for side in self.sides for part in side.slices), *self.companions)))

    @property
    def matrices(self) -> tuple[Slice, ...]:
        """Those slices that are weight matrices."""
        return tuple(part for part in self.slices if part.role not in (Role.NORM, Role.BIAS))

    @property
    def out_side(self) -> Side:
        """The side that reads the units."""
        return self.sides[-1]
