# SPDX-License-Identifier: Apache-2.0
"""Other ways to choose what to keep, for `benchmark.py`: each gets a number of heads and neurons and returns a mask.

They know the model as the method does, as coupled slices, so that only the choice differs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.layers import dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.sublayers import Sublayer, Unit


__all__ = ["SCORERS", "keep_best"]

#: Scores every unit of a sub-layer, shape `(num_units,)`; the larger, the more worth keeping.
Scorer = Callable[[nn.Module, Sublayer, torch.Generator], Tensor]


def magnitude(model: nn.Module, sublayer: Sublayer, generator: torch.Generator) -> Tensor:
    """Score a unit by the squared norm of all its weights, those of queries and keys too.

    By values and outputs alone, the first two layers of MiniLM would keep no head, and chance would do better.

    Args:
        model: A dense model.
        sublayer: One of its sub-layers.
        generator: Not used.

    Returns:
        Scores, shape `(num_units,)`.
    """
    scores = torch.zeros(sublayer.num_units)
    units = torch.arange(sublayer.num_units)
    for part in sublayer.matrices:
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


def keep_best(model: nn.Module, scorer: Scorer, counts: Mapping[Unit, int], *, seed: int) -> RelevanceMask:
    """Keep the best heads and the best neurons of a whole model, and end the others on both sides.

    Where in the model they lie is the scorer's choice too: told the counts of each layer, magnitude would be no better
    than chance. Ended on both sides, a unit leaves no constant behind.

    Args:
        model: A dense model.
        scorer: How units are scored.
        counts: Number of units of each kind to keep.
        seed: Seed of whatever the scorer leaves to chance.

    Returns:
        The mask.
    """
    generator = torch.Generator().manual_seed(seed)
    sublayers = find_sublayers(model)
    scores = {sublayer.path: scorer(model, sublayer, generator) for sublayer in sublayers}
    keep: dict[str, Tensor] = {}
    for unit, count in counts.items():
        paths = [sublayer.path for sublayer in sublayers if sublayer.unit is unit]
        everywhere = torch.cat([scores[path] for path in paths])
        kept = torch.zeros_like(everywhere, dtype=torch.bool).index_fill_(0, everywhere.topk(count).indices, True)
        keep |= dict(zip(paths, kept.split([len(scores[path]) for path in paths]), strict=True))
    num_sides = {sublayer.path: len(sublayer.sides) for sublayer in sublayers}
    return RelevanceMask({path: kept.expand(num_sides[path], -1) for path, kept in keep.items()})
