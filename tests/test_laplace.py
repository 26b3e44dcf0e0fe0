"""The posterior in closed form: it never gets worse, and ends where the bound stands still."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model
from torch import Tensor, nn

from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.curvature import Curvature
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.laplace import fit_posterior_, negative_bound
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.priors import WeightPrior


def random_curvature(model: nn.Module, seed: int, *, level: float = 1.0) -> Curvature:
    """Curvatures over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return level * torch.exp(2 * torch.randn(like.shape, generator=generator, dtype=like.dtype) - 4)

    layers = variational_layers(model)
    return Curvature(
        {name: draw(layer.log_var) for name, layer in layers.items()},
        # Of a single example, whose squares they are.
        {name: draw(layer.log_var.new_empty(1, layer.prior.num_groups)).sqrt() for name, layer in layers.items()},
    )


def patched(**options: object) -> nn.Module:
    return patch_model_(tiny_model("bert").double(), VDConfig(**options))


@settings(max_examples=8, deadline=None)
@given(
    prior=st.sampled_from(PriorType),
    grouping=st.sampled_from(Grouping),
    group_scale=st.booleans(),
    num_data=st.sampled_from([1.0, 1e3, 1e6]),
    seed=st.integers(0, 99),
)
def test_no_round_raises_the_negative_bound(
    prior: PriorType, grouping: Grouping, group_scale: bool, num_data: float, seed: int
) -> None:
    model = patched(prior=prior, grouping=grouping, group_scale=group_scale)
    curvature = random_curvature(model, seed)
    before = math.inf
    for rounds in (1, 2, 3, 8):
        fresh = patched(prior=prior, grouping=grouping, group_scale=group_scale)
        bound = negative_bound(
            fit_posterior_(fresh, curvature, num_data=num_data, rounds=rounds), curvature, num_data=num_data
        )
        assert bound <= before + 1e-7 * abs(before if math.isfinite(before) else 1)
        before = bound.item()


def loss_and_divergence(layer: VariationalLayer, name: str, curvature: Curvature, num_data: float) -> Tensor:
    """The negative bound of a layer, written down again: with a density of the mixture and all in the graph."""
    mean, log_var = layer.mean, layer.log_var
    loss = (curvature.weights[name] * log_var.exp()).sum() + (
        curvature.scales[name] * (layer.group_scale - 1) ** 2
    ).sum()
    if isinstance(layer.prior, WeightPrior):
        return num_data / 2 * loss + (1 + mean**2 / log_var.exp()).log().sum() / 2
    moment = (mean.square() + log_var.exp()).movedim(layer.group_axis, -1)
    weights, scales = (
        values[:, layer.prior.feature_group] for values in (layer.prior.mixture_weights, layer.prior.prior_scales)
    )
    density = sum(
        p * torch.exp(-moment / (2 * scale**2)) / (scale * math.sqrt(2 * math.pi))
        for p, scale in zip(weights, scales, strict=True)
    )
    divergence = -(log_var + math.log(2 * math.pi * math.e)).sum() / 2 - density.log().sum()
    return num_data / 2 * loss + divergence


@pytest.mark.parametrize("prior", list(PriorType), ids=str)
def test_the_end_is_a_stationary_point(prior: PriorType) -> None:
    model, num_data = patched(prior=prior), 1e5
    curvature = random_curvature(model, 0, level=10.0)
    fit_posterior_(model, curvature, num_data=num_data, rounds=400)
    for name, layer in variational_layers(model).items():
        value = loss_and_divergence(layer, name, curvature, num_data)
        by_log_var, by_scale = torch.autograd.grad(value, [layer.log_var, layer.group_scale])
        # In nats per unit of log-variance and of scale; a weight's own share is 1/2.
        assert by_log_var.abs().max() < 1e-3
        assert by_scale.abs().max() < 1e-3 * num_data * curvature.scales[name].max()


def test_the_negative_bound_is_what_it_says() -> None:
    model = patched()
    curvature = random_curvature(model, 1)
    fit_posterior_(model, curvature, num_data=1e3, rounds=2)
    expected = sum(
        loss_and_divergence(layer, name, curvature, 1e3) for name, layer in variational_layers(model).items()
    )
    assert negative_bound(model, curvature, num_data=1e3).item() == pytest.approx(
        expected.item(), rel=1e-7
    )  # scales of the prior are float32


def test_more_data_keep_more() -> None:
    def mean_scale(num_data: float) -> float:
        model = patched()
        fit_posterior_(model, random_curvature(model, 2), num_data=num_data)
        return torch.cat([layer.group_scale for layer in variational_layers(model).values()]).mean().item()

    scales = [mean_scale(num_data) for num_data in (1e1, 1e3, 1e5, 1e7)]
    assert scales == sorted(scales)
    assert scales[0] < 0.2 < 0.9 < scales[-1]


def test_a_group_that_nothing_holds_goes() -> None:
    model = patched()
    curvature = random_curvature(model, 3, level=1e3)
    name, layer = next(iter(variational_layers(model).items()))
    curvature.scores[name][:, 0] = 0.0
    curvature.weights[name][layer.prior.feature_group == 0] = 0.0
    fit_posterior_(model, curvature, num_data=1e6)
    assert layer.group_scale[0] == 0
    assert layer.group_scale[1:].min() > 0.5
