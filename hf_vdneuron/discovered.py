# SPDX-License-Identifier: Apache-2.0
"""What was found in a model whose type has no row in the table of architectures: it stays with the model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_vdneuron.layers import dense_layer, feature_axis
from hf_vdneuron.sublayers import Side, Slice, Sublayer


__all__ = ["Discovery", "remember_", "remembered", "share_"]

#: Attribute that holds it; copies of the model have it too.
_ATTRIBUTE = "_vdneuron_discovery"


@dataclass(frozen=True)
class Discovery:
    """Where a model keeps its heads and neurons, and a way to try it.

    Args:
        sublayers: The sub-layers, as they were when they were found.
        inputs: Keyword arguments of the forward pass.
    """

    sublayers: tuple[Sublayer, ...]
    inputs: Mapping[str, Any]

    def sublayers_now(self, model: nn.Module) -> list[Sublayer]:
        """Say where the units are that a model has by now.

        Args:
            model: The model, pruned since or not.

        Returns:
            Its sub-layers, in the order of the forward pass.
        """
        return [_resized(sublayer, _num_units(model, sublayer)) for sublayer in self.sublayers]


def remember_(model: nn.Module, discovery: Discovery) -> None:
    """Leave a discovery with a model, in place of an earlier one.

    Args:
        model: The model.
        discovery: What was found in it.
    """
    vars(model)[_ATTRIBUTE] = discovery


def share_(model: nn.Module, other: nn.Module) -> None:
    """Leave with another model of the same native class and config what the first one remembers, if anything.

    Args:
        model: The model.
        other: The other model.
    """
    discovery = remembered(model)
    if discovery is not None:
        remember_(other, discovery)


def remembered(model: nn.Module) -> Discovery | None:
    """Look up what was found in a model.

    Args:
        model: The model.

    Returns:
        The discovery, or None.
    """
    return vars(model).get(_ATTRIBUTE)


def _num_units(model: nn.Module, sublayer: Sublayer) -> int:
    """Count the units that are left by the features of the layer that reads them."""
    columns = sublayer.out_side.slices[0]
    layer = dense_layer(model, columns.module)
    return layer.weight.shape[feature_axis(layer, columns.axis)] // columns.size


def _resized(sublayer: Sublayer, num_units: int) -> Sublayer:
    """Say where the units of a sub-layer are when there are more or fewer of them."""

    def moved(part: Slice) -> Slice:
        # Where all of one kind lie before all of another, that one starts earlier.
        is_behind = part.offset >= (part.size if part.stride is None else part.stride)
        offset = part.offset * num_units // sublayer.num_units if is_behind else part.offset
        return replace(part, offset=offset)

    return replace(
        sublayer,
        num_units=num_units,
        sides=tuple(Side(side.name, tuple(map(moved, side.slices))) for side in sublayer.sides),
        companions=tuple(map(moved, sublayer.companions)),
    )
