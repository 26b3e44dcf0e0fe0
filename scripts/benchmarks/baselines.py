# SPDX-License-Identifier: Apache-2.0
"""Other ways to choose what to keep, for `benchmark.py`: each scores the heads and neurons of a dense model.

They keep what the budget allows as the method does, so that only the choice differs. All but `torch_pruning` know the
model as it does too, as coupled slices.

References:
    Michel et al., "Are Sixteen Heads Really Better than One?", 2019, https://arxiv.org/abs/1905.10650

    Sajjad et al., "On the Effect of Dropping Layers of Pre-trained Transformer Models", 2020,
    https://arxiv.org/abs/2004.03844

    Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, https://arxiv.org/abs/2301.12900
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gates import gate_gradients
from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Budget
from hf_vdneuron.layers import dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.selection import keep_within, unit_prices
from hf_vdneuron.sublayers import Slice, Unit


__all__ = ["RANKINGS", "SCORERS", "TORCH_PRUNING", "Batches", "Scorer", "Scores", "keep_affordable", "keep_best"]

#: The baseline that needs the package of the same name.
TORCH_PRUNING = "torch_pruning"

#: Keyword arguments of a forward, batch by batch.
Batches = Iterable[Mapping[str, Any]]

#: Path of a sub-layer -> scores of its units, shape `(num_units,)`; the larger, the more worth keeping.
Scores = Mapping[str, Tensor]

#: Scores every unit of a dense model, by its weights, by batches of training rows, or by chance.
Scorer = Callable[[nn.Module, Batches, torch.Generator], Scores]


def magnitude(model: nn.Module, batches: Batches, generator: torch.Generator) -> Scores:
    """Score a unit by the squared norm of all its weights, those of queries and keys too.

    By values and outputs alone, the first two layers of MiniLM would keep no head, and chance would do better.

    Args:
        model: A dense model.
        batches: Not used.
        generator: Not used.

    Returns:
        The scores.
    """
    return {
        sublayer.path: torch.stack([
            _squared_norms(model, part, sublayer.num_units) for part in sublayer.matrices
        ]).sum(0)
        for sublayer in find_sublayers(model)
    }


def _squared_norms(model: nn.Module, part: Slice, num_units: int) -> Tensor:
    layer = dense_layer(model, part.module)
    by_feature = layer.weight.detach().float().square().movedim(feature_axis(layer, part.axis), 0).flatten(1).sum(1)
    return by_feature.cpu()[part.features(torch.arange(num_units))].sum(1)


def at_random(model: nn.Module, batches: Batches, generator: torch.Generator) -> Scores:
    """Score units by chance: what every method has to beat.

    Args:
        model: A dense model.
        batches: Not used.
        generator: Source of the chance.

    Returns:
        The scores.
    """
    return {sublayer.path: torch.rand(sublayer.num_units, generator=generator) for sublayer in find_sublayers(model)}


def layers(model: nn.Module, batches: Batches, generator: torch.Generator) -> Scores:
    """Drop layers from the top: what is left is a shallower dense model (Sajjad 2020, section 3.1).

    Args:
        model: A dense model.
        batches: Not used.
        generator: Not used.

    Returns:
        The scores. Where a target falls between two depths, part of the layer in question stays.
    """
    sublayers = find_sublayers(model)
    depth = {path: index for index, path in enumerate(dict.fromkeys(_layer_of(part.path) for part in sublayers))}
    return {part.path: torch.full((part.num_units,), 1.0 / (1 + depth[_layer_of(part.path)])) for part in sublayers}


def _layer_of(path: str) -> str:
    """Cut a path behind its last number: `encoder.layer.3.attention` lies in `encoder.layer.3`."""
    parts = path.split(".")
    return ".".join(parts[: 1 + max(index for index, part in enumerate(parts) if part.isdigit())])


def taylor(model: nn.Module, batches: Batches, generator: torch.Generator) -> Scores:
    r"""Score a unit by how much the loss of an example depends on its gate.

    Slopes of first order do not add up, so that a head's is not worth those of the 64 neurons that cost as much: by
    slope per cost MiniLM made three times as fast would keep one head, and chance would do better. So heads and
    neurons are scaled to be worth the same per weight, on average.

    Args:
        model: A dense model.
        batches: Training rows.
        generator: Not used.

    Returns:
        :math:`\mathbb E_i |\partial L_i / \partial m_u|` (Michel 2019, eq. 2), scaled to add up to the number of
        weights for either kind of unit.
    """
    slopes = {path: gradients.abs().mean(0) for path, gradients in gate_gradients(model, batches).items()}
    weights, totals = (dict.fromkeys(Unit, 0.0) for _ in range(2))
    sublayers = find_sublayers(model)
    for part in sublayers:
        weights[part.unit] += sum(dense_layer(model, matrix.module).weight.numel() for matrix in part.matrices)
        totals[part.unit] += slopes[part.path].sum().item()
    return {part.path: slopes[part.path] * (weights[part.unit] / totals[part.unit]) for part in sublayers}


def torch_pruning(model: nn.Module, batches: Batches, generator: torch.Generator) -> Scores:
    """Score a unit by the first-order importance of Torch-Pruning, over the group that its dependency graph finds.

    Args:
        model: A dense model whose queries, keys and values are layers of their own.
        batches: Training rows.
        generator: Not used.

    Returns:
        The scores, of a head as the mean over its features. The package sets them relative to those of the layer.

    References:
        https://github.com/VainF/Torch-Pruning
    """
    import torch_pruning as tp  # type: ignore[import-untyped]  # an optional extra

    model.eval()
    all_batches = [*batches]
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=all_batches[0], output_transform=lambda outputs: outputs.logits, verbose=False
    )
    for batch in all_batches:
        model(**batch).loss.backward()
    importance = tp.importance.GroupTaylorImportance()
    scores = {}
    for sublayer in find_sublayers(model):
        made = sublayer.sides[0].slices[0]
        layer = dense_layer(model, made.module)
        num_features = layer.weight.shape[feature_axis(layer, made.axis)]
        pruner = graph.get_pruner_of_module(layer)  # a convolution's group has its norm and what reads it
        group = graph.get_pruning_group(layer, pruner.prune_out_channels, idxs=[*range(num_features)])
        scores[sublayer.path] = importance(group).cpu()[made.features(torch.arange(sublayer.num_units))].mean(1)
    model.zero_grad()
    return scores


#: Name of a baseline -> how it scores units.
SCORERS: dict[str, Scorer] = {
    "magnitude": magnitude,
    "taylor": taylor,
    TORCH_PRUNING: torch_pruning,
    "layers": layers,
    "random": at_random,
}


#: Baselines whose scores say which unit goes first whatever it costs.
RANKINGS = frozenset({TORCH_PRUNING, "layers", "random"})


def keep_affordable(
    model: nn.Module, scores: Scores, budget: Budget, *, whatever_it_costs: bool = False
) -> RelevanceMask:
    """Keep the best units that a budget allows, by their scores per cost, and end the others on both sides.

    Ended on both sides, a unit leaves no constant behind.

    Args:
        model: A dense model.
        scores: What its units are worth.
        budget: What may be kept.
        whatever_it_costs: Whether the scores alone say which units go first.

    Returns:
        The mask.
    """
    sublayers = find_sublayers(model)
    if whatever_it_costs:
        prices = unit_prices(sublayers, budget)
        scores = {path: prices[path] * values for path, values in scores.items()}
    # Both sides of a unit are worth the same, so that both end with it.
    worth = {part.path: scores[part.path].expand(len(part.sides), -1) for part in sublayers}
    return keep_within(sublayers, worth, budget)


def keep_best(model: nn.Module, scores: Scores, counts: Mapping[Unit, int]) -> RelevanceMask:
    """Keep a number of heads and of neurons, the best of the whole model, and end the others on both sides.

    Where in the model they lie is the scorer's choice too: told the counts of each layer, magnitude would be no better
    than chance.

    Args:
        model: A dense model.
        scores: What its units are worth.
        counts: Number of units of each kind to keep.

    Returns:
        The mask.
    """
    sublayers = find_sublayers(model)
    keep: dict[str, Tensor] = {}
    for unit, count in counts.items():
        parts = [part for part in sublayers if part.unit is unit]
        if not parts:  # convolutional nets have no heads
            continue
        everywhere = torch.cat([scores[part.path] for part in parts])
        kept = torch.zeros_like(everywhere, dtype=torch.bool).index_fill_(0, everywhere.topk(count).indices, True)
        by_part = zip(parts, kept.split([part.num_units for part in parts]), strict=True)
        keep |= {part.path: own.expand(len(part.sides), -1) for part, own in by_part}
    return RelevanceMask(keep)
