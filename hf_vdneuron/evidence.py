# SPDX-License-Identifier: Apache-2.0
r"""By how much the bound would fall without a unit, in closed form: what the data lose, less what the prior gains.

Around the weights of a fine-tuned model, removing the units :math:`S` of a sub-layer raises the loss of an example by

.. math:: \Delta(S) = \tfrac12\, 1_S^\top G\, 1_S, \qquad G = \mathbb E_n\, g_n g_n^\top

to second order, with the derivatives :math:`g_n` of the loss of example :math:`n` by the scales of the units. The
diagonal of :math:`G` alone, the Fisher information of a mask, takes units for strangers; but what one says, another
may say too, and then only one of them can go for free. All of :math:`G` believes every accident of a thousand
examples, and finds units whose derivatives cancel in them. So its off-diagonal part is shrunk (Schäfer and Strimmer
2005).

A unit that goes also takes the divergence of its weights along, which the prior had charged for it.

References:
    Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992,
    https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html

    Schäfer and Strimmer, "A Shrinkage Approach to Large-Scale Covariance Matrix Estimation and Implications for
    Functional Genomics", 2005, https://doi.org/10.2202/1544-6115.1175
"""

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.curvature import Curvature
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.laplace import fit_posterior_
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.schedules import PRETRAINING_EVIDENCE
from hf_vdneuron.sublayers import Sublayer


__all__ = ["closed_form_evidence", "removal_costs", "unit_evidence"]

#: How much of the products of different units is taken for accident. None at all is worse at 3x and 5x; more than half
#: is better at 3x, and not at 5x (method: Without training).
SHRINKAGE = 0.5

#: Largest share of a sub-layer whose turn comes at once.
TURN = 1 / 96


def closed_form_evidence(model: nn.Module, curvature: Curvature) -> dict[str, Tensor]:
    """Fit a posterior in closed form, in place, and measure what units are worth by it.

    Args:
        model: A patched model at its trained weights, group scales at 1.
        curvature: Curvature of its loss.

    Returns:
        As `unit_evidence`, with the number of examples that pretrained weights stand for.
    """
    fit_posterior_(model, curvature, num_data=PRETRAINING_EVIDENCE)
    return unit_evidence(model, curvature, num_data=PRETRAINING_EVIDENCE)


@torch.no_grad()
def unit_evidence(model: nn.Module, curvature: Curvature, *, num_data: float) -> dict[str, Tensor]:
    r"""Measure by how much the bound would fall without each unit, those that are worth less being gone already.

    .. math:: N\, \Delta_i - KL_i

    Args:
        model: A patched model with a posterior in closed form.
        curvature: Curvature of its loss.
        num_data: Number :math:`N` of examples that the bound counts.

    Returns:
        Path of each sub-layer -> nats, shape `(num_sides, num_units)`, the same for each side; below 0 for a unit that
        does not pay for itself, infinite for a side that is not variational.
    """
    evidence, alone, layers = {}, unit_relevance(model), variational_layers(model)
    for sublayer in find_sublayers(model):
        worth = torch.zeros(sublayer.num_units)
        # What reads a unit says most exactly what it is worth.
        sides = [side.slices[0].module for side in reversed(sublayer.sides) if side.slices[0].module in layers]
        if sides:
            worth = num_data * removal_costs(curvature.scores[sides[0]]).cpu() - _divergence(layers, sublayer)
        evidence[sublayer.path] = torch.where(alone[sublayer.path].isfinite(), worth, torch.inf)
    return evidence


def removal_costs(scores: Tensor, *, shrinkage: float = SHRINKAGE) -> Tensor:
    r"""Remove units one after the other, the one that costs least first, and note what each one costs.

    With the shrinkage :math:`\rho` and the units :math:`S` that are gone, unit :math:`i` costs

    .. math:: \tfrac12 G_{ii} + (1 - \rho) \sum_{j \in S} G_{ij}

    and never less than those before it. Some go at once in a large sub-layer.

    Args:
        scores: Derivatives of the loss of each example by the scale of each unit, shape `(num_examples, num_units)`.
        shrinkage: :math:`\rho`, in `[0, 1]`; with 1 every unit stands alone.

    Returns:
        Cost of each unit when its turn comes, shape `(num_units,)`.
    """
    num_examples, num_units = scores.shape
    scores = scores.float()
    alone, shared = scores.square().mean(0) / 2, torch.zeros(num_units, device=scores.device)
    costs, is_left = torch.full_like(alone, torch.inf), torch.ones_like(alone, dtype=torch.bool)
    at_once, highest = max(1, int(num_units * TURN)), alone.new_zeros(())
    for _ in range(0, num_units, at_once):
        now = torch.where(is_left, alone + (1 - shrinkage) * shared, torch.inf)
        values, units = now.topk(min(at_once, int(is_left.sum())), largest=False)
        costs[units] = values.clamp_min(highest).cummax(0).values
        highest = costs[units].amax()
        is_left[units] = False
        shared += scores.t() @ scores[:, units].sum(1) / num_examples
    return costs


def _divergence(layers: dict[str, VariationalLayer], sublayer: Sublayer) -> Tensor:
    """Sum the divergence of all weights that go with each unit, shape `(num_units,)`."""
    total = torch.zeros(sublayer.num_units)
    # A fused matrix stands for several slices.
    for path in dict.fromkeys(part.module for part in sublayer.matrices):
        layer = layers.get(path)
        if layer is not None and layer.prior.num_groups == sublayer.num_units:
            by_weight = layer.prior.kl_by_weight(*layer.posterior, layer.group_axis)
            total += layer.prior.sum_weights(by_weight, layer.group_axis).cpu()
    return total
