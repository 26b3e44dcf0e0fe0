# SPDX-License-Identifier: Apache-2.0
"""Other ways to choose what to keep, for `benchmark.py`: each gets counts per sub-layer and returns a mask.

They know the model as the method does, as coupled slices, so that only the choice differs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.layers import dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.sublayers import Sublayer


__all__ = ["SCORERS", "keep_best"]

#: Scores every unit of a sub-layer, shape `(num_units,)`; the larger, the more worth keeping.
Scorer = Callable[[nn.Module, Sublayer, torch.Generator], Tensor]


def magnitude(model: nn.Module, sublayer: Sublayer, generator: torch.Generator) -> Tensor:
    """Score a unit by the squared norm of its weights on both sides.

    Args:
        model: A dense model.
        sublayer: One of its sub-layers.
        generator: Not used.

    Returns:
        Scores, shape `(num_units,)`.
    """
    scores = torch.zeros(sublayer.num_units)
    units = torch.arange(sublayer.num_units)
    for part in (part for side in sublayer.sides for part in side.slices):
        layer = dense_layer(model, part.module)
        by_feature = (
            layer.weight.detach().float().square().movedim(feature_axis(layer, part.axis), 0).flatten(1).sum(1)
        )
        scores += by_feature.cpu()[part.features(units)].sum(1)
    return scores


def at_random(model: nn.Module, sublayer: Sublayer, generator: torch.Generator) -> Tensor:
    """Score units by chance: what every method has to beat.

    Args:
        model: Not used.
        sublayer: A sub-layer.
        generator: Source of the chance.

    Returns:
        Scores, shape `(num_units,)`.
    """
    return torch.rand(sublayer.num_units, generator=generator)


#: Name of a baseline -> how it scores units.
SCORERS: dict[str, Scorer] = {"magnitude": magnitude, "random": at_random}


def keep_best(model: nn.Module, scorer: Scorer, counts: Mapping[str, int], *, seed: int) -> RelevanceMask:
    """Keep the best units of each sub-layer, and end the others on both sides, so that no constant is left of them.

    Args:
        model: A dense model.
        scorer: How units are scored.
        counts: Path of each sub-layer -> number of units to keep.
        seed: Seed of whatever the scorer leaves to chance.

    Returns:
        The mask.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for sublayer in find_sublayers(model):
        best = scorer(model, sublayer, generator).topk(counts[sublayer.path]).indices
        kept = torch.zeros(sublayer.num_units, dtype=torch.bool).index_fill_(0, best, True)
        keep[sublayer.path] = kept.expand(len(sublayer.sides), -1)
    return RelevanceMask(keep)
