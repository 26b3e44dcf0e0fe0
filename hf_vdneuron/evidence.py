# SPDX-License-Identifier: Apache-2.0
r"""By how much the bound would fall without a unit, in closed form: what the data lose, less what the prior gains.

Around the weights of a fine-tuned model, removing unit :math:`i` raises the loss of an example by

.. math:: \Delta_i = \tfrac12 H_i

to second order, with the curvature :math:`H_i` of the loss by the scale of what reads the unit, whose bias says what
is constant (11). A unit that goes also takes the divergence of its weights along, which the prior had charged for it.

References:
    Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992,
    https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html
"""

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.curvature import Curvature
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.laplace import fit_posterior_
from hf_vdneuron.layers import VariationalLayer, feature_axis
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.schedules import PRETRAINING_EVIDENCE
from hf_vdneuron.sublayers import Slice, Sublayer


__all__ = ["closed_form_evidence", "unit_evidence"]


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
    r"""Measure by how much the bound would fall without each unit, all others being there.

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
        speakers = [side.slices[0] for side in reversed(sublayer.sides)]
        speakers = [part for part in speakers if _has_groups_of(sublayer, layers, part)]
        if speakers:
            worth = num_data / 2 * curvature.scales[speakers[0].module].cpu() - _divergence(layers, sublayer)
        evidence[sublayer.path] = torch.where(alone[sublayer.path].isfinite(), worth, torch.inf)
    return evidence


def _has_groups_of(sublayer: Sublayer, layers: dict[str, VariationalLayer], part: Slice) -> bool:
    """Tell whether the groups of a layer are units of a sub-layer: in a chain, it reads some and makes others."""
    layer = layers.get(part.module)
    if layer is None or layer.group_axis != feature_axis(layer, part.axis):
        return False
    return layer.prior.num_groups == sublayer.num_units


def _divergence(layers: dict[str, VariationalLayer], sublayer: Sublayer) -> Tensor:
    """Sum the divergence of all weights that go with each unit, shape `(num_units,)`."""
    total = torch.zeros(sublayer.num_units)
    own = [part.module for part in sublayer.matrices if _has_groups_of(sublayer, layers, part)]
    # A fused matrix stands for several slices.
    for layer in (layers[path] for path in dict.fromkeys(own)):
        by_weight = layer.prior.kl_by_weight(*layer.posterior, layer.group_axis)
        total += layer.prior.sum_weights(by_weight, layer.group_axis).cpu()
    return total
