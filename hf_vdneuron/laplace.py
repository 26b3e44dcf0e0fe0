# SPDX-License-Identifier: Apache-2.0
r"""A posterior without training: the bound in closed form, where the loss is as curved as at the trained weights.

With the loss of an example expanded around the trained weights (`curvature`), the negative bound of :math:`N` examples
is

.. math::
    F = \tfrac N2 \Big[ \sum_g H_g (\gamma_g - 1)^2 + \sum_{ij} h_{ij} s_{ij}^2 \Big] + KL(q \| p_\theta)

and each of its three parts has a closed form while the others stand still. With the precision
:math:`\lambda_{ij} = r_{ij} / \sigma_1^2 + (1 - r_{ij}) / \sigma_2^2` of (9),

.. math::
    s_{ij}^2 = \frac1{N h_{ij} + \lambda_{ij}}, \qquad
    \gamma_g = \frac{N H_g}{N H_g + \sum_{ij \in g} \lambda_{ij} v_{ij}^2}

and EM (7, 8) moves :math:`\theta`. A group whose curvature is too low for its weights shrinks with its prior until
nothing is left of it, as in sparse Bayesian learning.

References:
    MacKay, "Bayesian Interpolation", 1992, https://doi.org/10.1162/neco.1992.4.3.415

    Tipping, "Sparse Bayesian Learning and the Relevance Vector Machine", 2001,
    https://www.jmlr.org/papers/v1/tipping01a.html
"""

import torch
from torch import Tensor, nn

from hf_vdneuron.curvature import Curvature
from hf_vdneuron.elbo import em_step_, init_priors_, variational_layers


__all__ = ["fit_posterior_", "negative_bound"]

#: Rounds over variances, scales and prior. Relevances keep their order from the twentieth on.
ROUNDS = 40


@torch.no_grad()
def fit_posterior_(model: nn.Module, curvature: Curvature, *, num_data: float, rounds: int = ROUNDS) -> nn.Module:
    """Fit variances, group scales and priors to the curvature, in place. No round raises the negative bound.

    Args:
        model: A patched model at its trained weights, group scales at 1.
        curvature: Curvature of its loss.
        num_data: Number :math:`N` of examples that the bound counts, above 0.
        rounds: Rounds over all three.

    Returns:
        The same model.
    """
    init_priors_(model)
    for _ in range(rounds):
        for path, layer in variational_layers(model).items():
            precision = layer.prior.precision(*layer.posterior, layer.group_axis)
            layer.log_var.copy_(-(num_data * curvature.weights[path] + precision).log())
            if layer.group_scale is not None:
                pulled = precision * layer.direction.to(precision.dtype).square()
                pull = layer.prior.sum_weights(pulled, layer.group_axis)
                held = num_data * curvature.scales[path]
                # A group that nothing holds goes; one that nothing pulls at either stays as it is.
                layer.group_scale.copy_(torch.where(held + pull > 0, held / (held + pull), layer.group_scale))
            _, layer.statistics = layer.prior.kl_bound(*layer.posterior, layer.group_axis)
        em_step_(model)
    return model


@torch.no_grad()
def negative_bound(model: nn.Module, curvature: Curvature, *, num_data: float) -> Tensor:
    r"""Evaluate :math:`F`, up to the loss at the trained weights.

    Args:
        model: A patched model.
        curvature: Curvature of its loss at the trained weights.
        num_data: Number :math:`N` of examples that the bound counts.

    Returns:
        Scalar in nats.
    """
    total = torch.zeros((), dtype=torch.float64)
    for path, layer in variational_layers(model).items():
        mean, log_var = layer.posterior
        loss = (curvature.weights[path].double() * log_var.double().exp()).sum()
        if layer.group_scale is not None:
            loss += (curvature.scales[path].double() * (layer.group_scale.double() - 1).square()).sum()
        divergence, _ = layer.prior.kl_bound(mean.double(), log_var.double(), layer.group_axis)
        total += (num_data / 2 * loss + divergence).cpu()
    return total
