# SPDX-License-Identifier: Apache-2.0
r"""The evidence lower bound of a whole model: its KL term, its prior, its noise.

.. math:: ELBO = \mathbb E_q \log p(Y | W, X) - KL(q \| p_\theta)

It is minimised per example, as `nll + kl_weight * kl / num_data` (1). A training loop calls, per optimizer step:
`kl_divergence` after the forward, and `em_step_` after the optimizer.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_vdneuron.functional import PriorStatistics
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.priors import GroupPrior


__all__ = [
    "em_step_",
    "init_priors_",
    "kl_divergence",
    "num_weights",
    "set_variational_",
    "variational_layers",
    "variational_parameters",
]


def variational_layers(model: nn.Module) -> dict[str, VariationalLayer]:
    """List a model's variational layers; a layer that is used several times counts once.

    Args:
        model: Any model.

    Returns:
        Path of each layer, and the layer.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, VariationalLayer)}


def variational_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Collect the parameters that only the posterior has: log-variances and group scales.

    Args:
        model: Any model.

    Returns:
        They, empty for a dense model.
    """
    own = ((layer.log_var, layer.group_scale) for layer in variational_layers(model).values())
    return {parameter for parameters in own for parameter in parameters if parameter is not None}


def num_weights(model: nn.Module) -> int:
    """Count the weights that have a posterior.

    Args:
        model: Any model.

    Returns:
        Their number, 0 for a dense model.
    """
    return sum(layer.log_var.numel() for layer in variational_layers(model).values())


def set_variational_(model: nn.Module, *, noise: bool, collect_kl: bool, frozen: bool = False) -> None:
    """Switch noise, KL and the posterior's own parameters on or off in all layers, in place.

    Args:
        model: A patched model.
        noise: Whether training draws weights from the posterior.
        collect_kl: Whether a training forward computes its KL and the statistics of the E step.
        frozen: Whether log-variances and group scales stand still, with a gradient of zero.
    """
    for layer in variational_layers(model).values():
        layer.noise, layer.collect_kl, layer.frozen = noise, collect_kl, frozen
        layer.kl, layer.statistics = None, None


def kl_divergence(model: nn.Module) -> Tensor:
    """Take the KL bound (6) that the latest training forward left in each layer, and sum it.

    Each layer forgets its share, so that no divergence is counted twice and no graph outlives its step.

    Args:
        model: A patched model.

    Returns:
        Scalar in nats, differentiable once.

    Raises:
        RuntimeError: If a layer has none.
    """
    divergences = []
    for name, layer in variational_layers(model).items():
        if layer.kl is None:
            raise RuntimeError(
                f"Layer `{name}` has no KL: call `set_variational_(model, noise=True, collect_kl=True)`, then run a "
                "forward in training mode. If the model drops whole layers in training, set `config.layerdrop` to 0."
            )
        divergences.append(layer.kl)
        layer.kl = None
    if not divergences:
        raise RuntimeError("The model has no variational layer: call `patch_model_` first.")
    return torch.stack(divergences).sum()


def em_step_(model: nn.Module) -> None:
    r"""Move the prior of every layer by one step of EM (7, 8), in place, and forget the statistics it used.

    Call it once per optimizer step: the statistics are those of the latest training forward. Layers without any are
    left alone.

    Args:
        model: A patched model.
    """
    _update_priors_(model, lambda layer, _: layer.statistics, GroupPrior.m_step_)
    for layer in variational_layers(model).values():
        layer.statistics = None


def init_priors_(model: nn.Module) -> None:
    """Start the prior of every layer from its weights, in place; a prior without parameters has no start.

    Args:
        model: A patched model.
    """
    _update_priors_(model, lambda layer, prior: prior.pool(layer.initial_statistics()), GroupPrior.init_)


def _update_priors_(
    model: nn.Module,
    collect: Callable[[VariationalLayer, GroupPrior], PriorStatistics | None],
    update_: Callable[[GroupPrior, PriorStatistics], object],
) -> None:
    """Sum statistics over the layers that share a prior, then hand every one of them the same sums."""
    sharing: dict[str, list[tuple[VariationalLayer, GroupPrior]]] = defaultdict(list)
    for layer in variational_layers(model).values():
        if isinstance(layer.prior, GroupPrior):
            sharing[layer.prior.key].append((layer, layer.prior))
    for sharers in sharing.values():
        collected = [sums for layer, prior in sharers if (sums := collect(layer, prior)) is not None]
        if len(collected) == len(sharers):
            total = PriorStatistics(*(torch.stack(parts).sum(0) for parts in zip(*collected, strict=True)))
            for _, prior in sharers:
                update_(prior, total)
