# SPDX-License-Identifier: Apache-2.0
"""From the trained posterior to what is kept: dropout rates, relevance, the 0.99 rule."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.elbo import num_weights, variational_layers
from hf_vdneuron.functional import dropout_rate, log_alpha, relevance
from hf_vdneuron.layers import VariationalLayer, dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask, end_units, most_relevant
from hf_vdneuron.sublayers import Slice, Sublayer, Unit


__all__ = [
    "DROPOUT_RATE_THRESHOLD",
    "expected_units",
    "irrelevant_weight_share",
    "log_alpha_histogram",
    "relevance_mask",
    "unit_relevance",
]

#: A weight is irrelevant if its dropout rate is above this (method: Irrelevance); ties are kept.
DROPOUT_RATE_THRESHOLD = 0.99


def _irrelevant(layer: VariationalLayer, threshold: float) -> Tensor:
    return dropout_rate(*layer.posterior) > threshold


def _nats(layer: VariationalLayer) -> Tensor:
    return relevance(*layer.posterior)


def _sum_slice(model: nn.Module, part: Slice, num_units: int, measure: Callable[[VariationalLayer], Tensor]) -> Tensor:
    """Sum a measure of each weight over the weights of each unit in one slice, shape `(num_units,)`."""
    layer = dense_layer(model, part.module)
    if not isinstance(layer, VariationalLayer):
        return torch.full((num_units,), torch.inf)
    by_feature = measure(layer).movedim(feature_axis(layer, part.axis), 0).flatten(1).sum(1).cpu()
    return by_feature[part.features(torch.arange(num_units))].sum(1)


def _sum_sides(model: nn.Module, sublayer: Sublayer, measure: Callable[[VariationalLayer], Tensor]) -> Tensor:
    """Sum a measure of each weight over each side of each unit, infinite where a side is not wholly variational."""
    sides = [
        torch.stack([_sum_slice(model, part, sublayer.num_units, measure) for part in side.slices]).sum(0)
        for side in sublayer.sides
    ]
    return torch.stack(sides)


@torch.no_grad()
def unit_relevance(model: nn.Module) -> dict[str, Tensor]:
    r"""Measure what each side of each unit says beyond its noise, :math:`\tfrac12 \sum \log(1 + \mu^2 / s^2)`.

    A unit's relevance is the smallest over its sides, as either can end it.

    Args:
        model: A patched model.

    Returns:
        Path of each sub-layer -> relevance in nats, shape `(num_sides, num_units)`; infinite for a side that is not
        variational.
    """
    return {sublayer.path: _sum_sides(model, sublayer, _nats) for sublayer in find_sublayers(model)}


@torch.no_grad()
def relevance_mask(model: nn.Module, threshold: float = DROPOUT_RATE_THRESHOLD) -> RelevanceMask:
    """Apply the rule: a unit is irrelevant if every weight of one of its sides has a dropout rate above a threshold.

    Args:
        model: A patched model.
        threshold: Dropout rate above which a weight is irrelevant, in `(0, 1)`.

    Returns:
        A mask over every sub-layer of the model. A block that cannot run without units keeps the most relevant ones.

    Raises:
        ValueError: If the threshold is out of range, or the model is not patched.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` is {threshold}: expected a dropout rate between 0 and 1, such as 0.99.")
    if not variational_layers(model):
        raise ValueError("The model has no posterior to judge by: call `patch_model_` and train it first.")

    def relevant(layer: VariationalLayer) -> Tensor:
        return (~_irrelevant(layer, threshold)).to(layer.log_var.dtype)

    ended = {sublayer: _sum_sides(model, sublayer, relevant) == 0 for sublayer in find_sublayers(model)}
    for sublayer, sides in ended.items():
        if int((~sides.any(0)).sum()) < sublayer.minimum:
            sides[:, most_relevant(_sum_sides(model, sublayer, _nats).amin(0), sublayer.minimum)] = False
    return RelevanceMask({sublayer.path: end_units(sublayer, sides) for sublayer, sides in ended.items()})


@torch.no_grad()
def expected_units(model: nn.Module) -> dict[str, float]:
    r"""Tell how many units a posterior is about to keep: each weight counts with its keep rate, :math:`1 - d_{ij}`.

    Until the last weight of a side is irrelevant the rule keeps a unit whole. This sees it go from the first step on.

    Args:
        model: A patched model.

    Returns:
        Path of each sub-layer -> the sum over its units of the mean keep rate, on the side where it is least. A side
        that is not variational keeps its units.
    """
    expected = {}
    for sublayer in find_sublayers(model):
        kept, weights = (_sum_sides(model, sublayer, measure) for measure in (_keep_rate, _ones))
        rates = torch.where(kept.isfinite(), kept / weights, 1.0)
        expected[sublayer.path] = rates.amin(0).sum().item()
    return expected


def _keep_rate(layer: VariationalLayer) -> Tensor:
    return 1 - dropout_rate(*layer.posterior)


def _ones(layer: VariationalLayer) -> Tensor:
    return torch.ones_like(layer.posterior[1])


@torch.no_grad()
def irrelevant_weight_share(model: nn.Module, threshold: float = DROPOUT_RATE_THRESHOLD) -> float:
    """Measure which part of the variational weights is irrelevant.

    Args:
        model: A patched model.
        threshold: Dropout rate above which a weight is irrelevant, in `(0, 1)`.

    Returns:
        Share in `[0, 1]`; 0 for a dense model.
    """
    count = sum(int(_irrelevant(layer, threshold).sum()) for layer in variational_layers(model).values())
    return count / max(1, num_weights(model))


@torch.no_grad()
def log_alpha_histogram(model: nn.Module, edges: Tensor) -> dict[Unit, Tensor]:
    r"""Count the variational weights by their :math:`\log \alpha`, the logit of the dropout rate.

    Args:
        model: A patched model.
        edges: Edges of the bins, increasing, shape `(num_bins + 1,)`.

    Returns:
        Kind of unit -> number of its weights in each bin, integer, shape `(num_bins,)`; kinds without a variational
        weight are missing. What lies beyond the edges counts to the first or the last bin. A weight that several
        sub-layers share counts to the first.
    """
    layers = variational_layers(model)
    counts: dict[Unit, Tensor] = {}
    for sublayer in find_sublayers(model):
        for path in dict.fromkeys(part.module for part in sublayer.slices):
            layer = layers.pop(path, None)
            if layer is None:
                continue
            values = log_alpha(*layer.posterior).flatten()
            bins = torch.bucketize(values, edges[1:-1].to(values))  # ties count below, as they are kept
            in_layer = torch.bincount(bins, minlength=len(edges) - 1).cpu()
            counts[sublayer.unit] = counts.get(sublayer.unit, torch.zeros_like(in_layer)) + in_layer
    return counts
