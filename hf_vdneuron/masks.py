# SPDX-License-Identifier: Apache-2.0
"""Masks over heads and neurons: which end, on which side, and how a model looks with them ended."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.experts import set_weight_
from hf_vdneuron.layers import DenseLayer, VariationalLayer, dense_layer, feature_axis
from hf_vdneuron.sublayers import Axis, Side, Slice, Sublayer


__all__ = ["RelevanceMask", "end_units", "mask_model_", "most_relevant", "read_mask"]


@dataclass(frozen=True)
class RelevanceMask:
    """Which units of a model are kept, and on which side the others end.

    A mask names the side that it zeroes. *In-side zeroed*: the unit's own weights vanish and it still emits the
    constant its bias makes. *Out-side zeroed*: nothing reads it, and it contributes nothing.

    Args:
        keep: Path of a sub-layer -> bool of shape `(num_sides, num_units)`, in the order of `Sublayer.sides`, True =
            keep. A unit is kept if all its sides are. Sub-layers that are missing keep everything.
    """

    keep: Mapping[str, Tensor]

    def kept_units(self, sublayer: Sublayer) -> Tensor:
        """List the units of a sub-layer that stay.

        Args:
            sublayer: A sub-layer of the masked model.

        Returns:
            Their indices in order, integer, shape `(num_kept,)`.
        """
        keep = self.keep.get(sublayer.path)
        return torch.arange(sublayer.num_units) if keep is None else keep.all(0).nonzero().flatten().cpu()

    def units_left(self, sublayer: Sublayer) -> Tensor:
        """List the units of a sub-layer that stay in the model once it is cut.

        One parameter holds all experts of a layer, so all of them keep as many as the one that keeps most: the others
        keep units that nothing reads, too.

        Args:
            sublayer: A sub-layer of the masked model.

        Returns:
            Their indices in order, integer, shape `(num_left,)`; without experts those of `kept_units`.
        """
        kept = torch.zeros(sublayer.num_units, dtype=torch.bool).index_fill_(0, self.kept_units(sublayer), True)
        by_expert = kept.view(sublayer.num_experts, sublayer.num_units // sublayer.num_experts)
        # Those that are kept come first.
        first = (~by_expert).to(torch.int8).argsort(dim=1, stable=True)[:, : int(by_expert.sum(1).max())]
        return torch.zeros_like(by_expert).scatter(1, first, True).flatten().nonzero().flatten()

    def __and__(self, other: "RelevanceMask") -> "RelevanceMask":
        """Keep what both masks keep.

        Args:
            other: Another mask of the same model.

        Returns:
            The mask.
        """
        both = {path: keep & other.keep[path] for path, keep in self.keep.items() if path in other.keep}
        return RelevanceMask({**other.keep, **self.keep, **both})

    def require_fits(self, sublayers: Iterable[Sublayer]) -> None:
        """Check the mask against the sub-layers of a model.

        Args:
            sublayers: All sub-layers of the model.

        Raises:
            ValueError: If it names an unknown sub-layer, has another shape or dtype, or ends a unit on the in-side
                alone where its constant cannot be folded.
        """
        known = {sublayer.path: sublayer for sublayer in sublayers}
        unknown = sorted(set(self.keep) - set(known))
        if unknown:
            raise ValueError(f"The mask names `{unknown[0]}`, which the model lacks. It has: {', '.join(known)}.")
        for path, keep in self.keep.items():
            sublayer = known[path]
            shape = (len(sublayer.sides), sublayer.num_units)
            if keep.shape != shape or keep.dtype != torch.bool:
                raise ValueError(
                    f"The mask of `{path}` has shape {tuple(keep.shape)} and dtype {keep.dtype}: expected {shape} "
                    "(sides, units) and torch.bool, True = keep."
                )
            if not sublayer.foldable and bool((keep[-1] & ~keep.all(0)).any()):
                raise ValueError(
                    f"The mask of `{path}` zeroes units on the in-side, but the constant they emit cannot be folded "
                    "there. Zero the out-side (the last row) instead."
                )


def _slice_masks(model: nn.Module, side: Side, keep: Tensor) -> Iterable[tuple[DenseLayer, Axis, Tensor]]:
    """Spread a mask over the features of each slice of one side."""
    for part in side.slices:
        module = dense_layer(model, part.module)
        num_features = module.weight.shape[feature_axis(module, part.axis)]
        spread = part.spread(keep.cpu(), num_features, elsewhere=True)
        yield module, part.axis, spread.to(module.weight.device)


@torch.no_grad()
def mask_model_(model: nn.Module, mask: RelevanceMask) -> nn.Module:
    """End units in place, without changing a shape.

    Variational layers take the mask into their buffers, replacing the one they had, and train on under it. Weights of
    dense layers are set to zero, and nothing keeps training from moving them again.

    Args:
        model: A patched or dense model.
        mask: What to keep.

    Returns:
        The same model.

    Raises:
        ValueError: If the mask does not fit the model.
    """
    sublayers = find_sublayers(model)
    mask.require_fits(sublayers)
    by_feature: dict[tuple[DenseLayer, Axis], Tensor] = {}  # two sides can have a slice in common
    for sublayer in sublayers:
        if sublayer.path not in mask.keep:
            continue
        for side, keep in zip(sublayer.sides, mask.keep[sublayer.path], strict=True):
            for module, axis, spread in _slice_masks(model, side, keep):
                by_feature[module, axis] = spread & by_feature.get((module, axis), spread)
    for (module, axis), keep in by_feature.items():
        _zero_(module, axis, keep)
    return model


def _buffer(module: DenseLayer, axis: Axis) -> Tensor | None:
    if not isinstance(module, VariationalLayer):
        return None
    return module.keep_out if axis is Axis.OUT else module.keep_in


def _zero_(module: DenseLayer, axis: Axis, keep: Tensor) -> None:
    buffer = _buffer(module, axis)
    if buffer is not None:
        buffer.copy_(keep)
    else:
        set_weight_(module, module.weight.index_fill(feature_axis(module, axis), (~keep).nonzero().flatten(), 0))


def read_mask(model: nn.Module) -> RelevanceMask:
    """Read back the mask that a patched model carries.

    Args:
        model: A patched model.

    Returns:
        The mask of every sub-layer with a variational layer; empty for a dense model. Where a slice is not
        variational, units without any weight left in it count as ended.
    """
    return RelevanceMask({
        sublayer.path: torch.stack([_read_side(model, side, sublayer.num_units) for side in sublayer.sides])
        for sublayer in find_sublayers(model)
        if any(_carried_mask(model, part) is not None for side in sublayer.sides for part in side.slices)
    })


def _carried_mask(model: nn.Module, part: Slice) -> Tensor | None:
    return _buffer(dense_layer(model, part.module), part.axis)


def _read_side(model: nn.Module, side: Side, num_units: int) -> Tensor:
    kept = torch.zeros(num_units, dtype=torch.bool)  # a side ends where all of its slices do
    for part in side.slices:
        by_feature = _carried_mask(model, part)
        if by_feature is None:
            layer = dense_layer(model, part.module)
            by_feature = layer.weight.movedim(feature_axis(layer, part.axis), 0).flatten(1).any(1)
        kept |= by_feature.cpu()[part.features(torch.arange(num_units))].any(1)
    return kept


def end_units(sublayer: Sublayer, ended: Tensor) -> Tensor:
    """Turn "this side is irrelevant" into a mask, on the out-side where the in-side's constant cannot be folded.

    Args:
        sublayer: A sub-layer.
        ended: Bool of shape `(num_sides, num_units)`, True where a side ends the unit.

    Returns:
        The sub-layer's mask, bool, same shape, True = keep.
    """
    keep = ~ended
    if not sublayer.foldable:
        keep = torch.ones_like(keep)
        keep[-1] = ~ended.any(0)
    return keep


def most_relevant(relevance: Tensor, minimum: int) -> Tensor:
    """List the units that have to stay where a block cannot run without some.

    Args:
        relevance: One value per unit, shape `(num_units,)`.
        minimum: How many of them; at most all are.

    Returns:
        Indices of the most relevant ones, integer, shape `(min(minimum, num_units),)`; of equals, the first.
    """
    return relevance.argsort(descending=True, stable=True)[:minimum]
