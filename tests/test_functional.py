"""Each formula against something that was not derived from it: a loop, a quadrature, a library, autograd."""

import math

import numpy as np
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from hf_vdneuron.functional import (
    Theta,
    dropout_rate,
    gaussian_kl,
    kl_bound,
    local_reparameterization,
    log_alpha,
    mixture_log_prob,
    optimal_prior_scale,
    relevance,
    responsibilities,
    second_moment,
    weight_kl,
)


# Mixture weights and scales.
MIXTURES = {
    "far_apart": ([0.3, 0.7], [2.0, 0.01]),
    "very_far_apart": ([0.5, 0.5], [1e10, 1.0]),
    "close": ([0.6, 0.4], [0.5, 0.4]),
    "rare_wide": ([1e-6, 1 - 1e-6], [1.0, 0.1]),
    "rare_narrow": ([1 - 1e-6, 1e-6], [1.0, 0.1]),
    "equal": ([0.4, 0.6], [0.3, 0.3]),
}
PRIORS = {"group": ([1.0], [0.7]), **MIXTURES}
prior_cases = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
mixture_cases = pytest.mark.parametrize("prior", MIXTURES.values(), ids=MIXTURES)

# Shape of a weight and the axis along which its groups lie.
LAYOUTS = {
    "rows": ((4, 3), 0),
    "columns": ((4, 3), 1),
    "last": ((4, 3), -1),
    "filters": ((4, 3, 2, 2), 0),
    "channels": ((4, 3, 2, 2), 1),
}
layout_cases = pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)

# Mean and standard deviation of a weight.
POSTERIORS = {
    "clear": (0.8, 0.1),
    "noisy": (0.05, 0.6),
    "zero_mean": (0.0, 0.2),
    "negative": (-0.4, 0.3),
    "sharp": (0.1, 1e-3),
    "broad": (1.0, 5.0),
}
posterior_cases = pytest.mark.parametrize(("mean", "std"), POSTERIORS.values(), ids=POSTERIORS)

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Prior = tuple[list[float], list[float]]


def random_posterior(shape: tuple[int, ...], *, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    mean = 0.5 * torch.randn(shape, dtype=torch.float64)
    log_var = torch.randn(shape, dtype=torch.float64) - 2
    return mean.requires_grad_(requires_grad), log_var.requires_grad_(requires_grad)


def theta_of(prior: Prior, num_features: int) -> Theta:
    """The prior for every feature, at a scale that differs from feature to feature."""
    mixture_weights, prior_scales = (torch.tensor(values, dtype=torch.float64).unsqueeze(1) for values in prior)
    factors = 1 + 0.2 * torch.arange(num_features, dtype=torch.float64)
    return Theta(mixture_weights.expand(-1, num_features), prior_scales * factors)


def posterior_and_theta(
    prior: Prior, shape: tuple[int, ...], axis: int, *, requires_grad: bool = False
) -> tuple[Tensor, Tensor, Theta]:
    return *random_posterior(shape, requires_grad=requires_grad), theta_of(prior, shape[axis])


def single_weight(mean: float, std: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([[mean]], dtype=torch.float64), 2 * torch.tensor([[std]], dtype=torch.float64).log()


def by_feature(values: Tensor, axis: int) -> list[list[float]]:
    """The weights of each feature along the axis."""
    return values.detach().movedim(axis, 0).flatten(1).tolist()


def prior_of(theta: Theta, feature: int) -> Prior:
    return theta.mixture_weights[:, feature].tolist(), theta.prior_scales[:, feature].tolist()


def naive_bound(mean: Tensor, log_var: Tensor, theta: Theta, axis: int) -> Tensor:
    """The bound (6) as differentiable torch operations: here the responsibilities depend on the posterior."""
    observation = (mean.square() + log_var.exp()).sqrt().movedim(axis, -1).unsqueeze(0)
    across = [1] * (mean.ndim - 1)
    weights, scales = (values.view(len(values), *across, -1) for values in theta)
    log_prob = (weights.log() + Normal(0.0, scales).log_prob(observation)).logsumexp(0)
    return -(2 * math.pi * math.e * log_var.exp()).log().sum() / 2 - log_prob.sum()


# Exact divergence of the group prior


@posterior_cases
@pytest.mark.parametrize("scale", [0.05, 1.0, 7.0])
def test_gaussian_kl_is_that_of_torch_and_of_quadrature(mean: float, std: float, scale: float) -> None:
    tensors = single_weight(mean, std)
    exact = gaussian_kl(*tensors, torch.tensor(scale, dtype=torch.float64)).item()
    torch_kl = kl_divergence(Normal(tensors[0], std), Normal(torch.zeros_like(tensors[0]), scale)).item()
    assert exact == pytest.approx(torch_kl, rel=1e-12)
    assert exact == pytest.approx(references.mixture_kl(mean, std, [1.0], [scale]), rel=1e-8)


@layout_cases
def test_bound_with_one_component_is_the_exact_divergence(shape: tuple[int, ...], axis: int) -> None:
    mean, log_var, theta = posterior_and_theta(PRIORS["group"], shape, axis)
    scales = theta.prior_scales[0].view(-1, *[1] * (len(shape) - 1)).movedim(0, axis)
    bound, _ = kl_bound(mean, log_var, theta, axis)
    torch.testing.assert_close(bound, kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, scales)).sum())
    torch.testing.assert_close(bound, gaussian_kl(mean, log_var, scales).sum())


def test_group_scale_in_closed_form_minimises_the_divergence() -> None:
    mean, log_var = random_posterior((3, 5))

    def divergence(log_scale: float) -> float:
        return gaussian_kl(mean, log_var, torch.tensor(log_scale, dtype=torch.float64).exp()).sum().item()

    best = minimize_scalar(divergence, bracket=(-2.0, 1.0), tol=1e-10)
    assert optimal_prior_scale(mean, log_var).log().item() == pytest.approx(best.x, abs=1e-6)


def test_divergence_has_its_short_form_at_the_best_group_scale() -> None:
    mean, log_var = random_posterior((3, 5))
    scale = optimal_prior_scale(mean, log_var)
    short = (scale.square() / log_var.exp()).log().sum() / 2
    torch.testing.assert_close(gaussian_kl(mean, log_var, scale).sum(), short)


# Exact divergence of the weight prior


@posterior_cases
def test_weight_kl_is_the_least_over_all_scales(mean: float, std: float) -> None:
    def divergence(log_scale: float) -> float:
        return references.mixture_kl(mean, std, [1.0], [math.exp(log_scale)])

    best = minimize_scalar(divergence, bracket=(math.log(std) - 1, math.log(std) + 1), tol=1e-10)
    assert weight_kl(*single_weight(mean, std)).item() == pytest.approx(best.fun, rel=1e-7, abs=1e-9)


@layout_cases
def test_weight_kl_is_the_loop_over_its_weights(shape: tuple[int, ...], axis: int) -> None:
    mean, log_var = random_posterior(shape)
    pairs = zip(mean.flatten().tolist(), log_var.flatten().tolist(), strict=True)
    expected = math.fsum(math.log1p(m**2 / math.exp(v)) / 2 for m, v in pairs)
    assert weight_kl(mean, log_var).item() == pytest.approx(expected, rel=1e-13)
    best = second_moment(mean, log_var).sqrt()
    torch.testing.assert_close(weight_kl(mean, log_var), gaussian_kl(mean, log_var, best).sum())


def test_gradient_of_weight_kl_is_that_of_autograd() -> None:
    mean, log_var = random_posterior((4, 3), requires_grad=True)
    naive = 3 * (1 + mean.square() / log_var.exp()).log().sum() / 2
    expected = torch.autograd.grad(naive, (mean, log_var))
    found = torch.autograd.grad(3 * weight_kl(mean, log_var), (mean, log_var))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(weight_kl, (mean, log_var))


@pytest.mark.parametrize("log_var", [-2000.0, -20.0, 0.0, 80.0])
def test_weights_at_zero_cost_nothing_and_stay_there(log_var: float) -> None:
    values = torch.zeros(3, requires_grad=True), torch.full((3,), log_var, requires_grad=True)
    kl = weight_kl(*values)
    kl.backward()
    assert kl.item() == 0
    assert [gradient.tolist() for gradient in (values[0].grad, values[1].grad)] == [[0, 0, 0]] * 2


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_half_precision_means_lose_only_their_rounding_in_weight_kl(dtype: torch.dtype) -> None:
    mean, log_var = random_posterior((4, 3))
    half = (mean.to(dtype).requires_grad_(), log_var.float().requires_grad_())
    full = tuple(values.detach().double().requires_grad_() for values in half)
    found, exact = weight_kl(*half), weight_kl(*full)
    (found + exact).backward()
    assert found.dtype is torch.float32
    assert [values.grad.dtype for values in half] == [dtype, torch.float32]
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(half[0].grad.double(), full[0].grad, rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(half[1].grad.double(), full[1].grad, rtol=1e-5, atol=0)


# The bound of the mixture prior


@prior_cases
@layout_cases
def test_bound_is_the_loop_over_its_weights(prior: Prior, shape: tuple[int, ...], axis: int) -> None:
    mean, log_var, theta = posterior_and_theta(prior, shape, axis)
    expected = math.fsum(
        references.kl_bound(m, v, *prior_of(theta, feature))
        for feature, posteriors in enumerate(zip(by_feature(mean, axis), by_feature(log_var, axis), strict=True))
        for m, v in zip(*posteriors, strict=True)
    )
    assert kl_bound(mean, log_var, theta, axis)[0].item() == pytest.approx(expected, rel=1e-13)


@prior_cases
@posterior_cases
def test_bound_holds_against_quadrature(prior: Prior, mean: float, std: float) -> None:
    bound = kl_bound(*single_weight(mean, std), theta_of(prior, 1), 0)[0].item()
    true_kl = references.mixture_kl(mean, std, *prior)
    assert true_kl > -1e-9
    assert bound >= true_kl - 1e-9


def test_bound_is_not_the_divergence_itself() -> None:
    bound = kl_bound(*single_weight(0.1, 0.3), theta_of(MIXTURES["far_apart"], 1), 0)[0].item()
    assert bound > references.mixture_kl(0.1, 0.3, *MIXTURES["far_apart"]) + 0.01


@given(
    mean=st.floats(-10, 10),
    log_var=st.floats(-30, 10),
    share=st.floats(1e-6, 1 - 1e-6),
    log_scale=st.floats(-15, 5),
    log_ratio=st.floats(0, 20),
)
def test_bound_is_never_negative(
    mean: float, log_var: float, share: float, log_scale: float, log_ratio: float
) -> None:
    prior = [share, 1 - share], [math.exp(log_scale), math.exp(log_scale - log_ratio)]
    bound, _ = kl_bound(*single_weight(mean, math.exp(log_var / 2)), theta_of(prior, 1), 0)
    assert bound.item() >= -1e-12


@pytest.mark.parametrize("share", [1e-6, 0.5, 0.9])
def test_bound_with_equal_components_is_the_exact_divergence(share: float) -> None:
    mean, log_var = random_posterior((4, 3))
    bound, _ = kl_bound(mean, log_var, theta_of(([share, 1 - share], [0.3, 0.3]), 4), 0)
    exact = gaussian_kl(mean, log_var, theta_of(([1.0], [0.3]), 4).prior_scales.view(-1, 1)).sum()
    torch.testing.assert_close(bound, exact)


# E step


@prior_cases
def test_responsibilities_and_likelihood_are_those_of_the_loop(prior: Prior) -> None:
    mean, log_var, theta = posterior_and_theta(prior, (6, 5), 1)
    moment = second_moment(mean, log_var)
    broadcastable = Theta(theta.mixture_weights[:, None], theta.prior_scales[:, None])
    found, log_prob = responsibilities(moment, broadcastable), mixture_log_prob(moment, broadcastable)
    for row, column in np.ndindex(6, 5):
        one, its_prior = moment[row, column].item(), prior_of(theta, column)
        assert found[:, row, column].tolist() == pytest.approx(references.responsibilities(one, *its_prior), rel=1e-12)
        assert log_prob[row, column].item() == pytest.approx(references.log_prob(one, *its_prior), rel=1e-12)


@prior_cases
@layout_cases
def test_statistics_are_the_sums_of_the_loop(prior: Prior, shape: tuple[int, ...], axis: int) -> None:
    mean, log_var, theta = posterior_and_theta(prior, shape, axis)
    _, statistics = kl_bound(mean, log_var, theta, axis)
    assert statistics.resp.shape == statistics.moment.shape == (len(prior[0]), shape[axis])
    for feature, moments in enumerate(by_feature(second_moment(mean, log_var), axis)):
        resp, resp_moment = references.e_step(moments, *prior_of(theta, feature))
        assert statistics.resp[:, feature].tolist() == pytest.approx(resp, rel=1e-9, abs=1e-14)
        assert statistics.moment[:, feature].tolist() == pytest.approx(resp_moment, rel=1e-9, abs=1e-14)


# Gradient


@prior_cases
@layout_cases
def test_gradient_is_that_of_autograd_through_the_bound(prior: Prior, shape: tuple[int, ...], axis: int) -> None:
    mean, log_var, theta = posterior_and_theta(prior, shape, axis, requires_grad=True)
    expected = torch.autograd.grad(3 * naive_bound(mean, log_var, theta, axis), (mean, log_var))
    found = torch.autograd.grad(3 * kl_bound(mean, log_var, theta, axis)[0], (mean, log_var))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@layout_cases
def test_gradient_passes_gradcheck(shape: tuple[int, ...], axis: int) -> None:
    mean, log_var, theta = posterior_and_theta(MIXTURES["close"], shape, axis, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, v: kl_bound(m, v, theta, axis)[0], (mean, log_var))


def test_neither_prior_nor_statistics_are_in_the_graph() -> None:
    mean, log_var, theta = posterior_and_theta(MIXTURES["close"], (4, 3), 0, requires_grad=True)
    theta = Theta(*(values.clone().requires_grad_() for values in theta))
    bound, statistics = kl_bound(mean, log_var, theta, 0)
    bound.backward()
    assert theta.mixture_weights.grad is theta.prior_scales.grad is None
    assert not statistics.resp.requires_grad
    assert not statistics.moment.requires_grad


def test_second_derivative_is_refused() -> None:
    mean, log_var, theta = posterior_and_theta(MIXTURES["close"], (4, 3), 0, requires_grad=True)
    bound, _ = kl_bound(mean, log_var, theta, 0)
    (gradient,) = torch.autograd.grad(bound.square(), mean, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@prior_cases
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_half_precision_means_lose_no_more_than_their_own_rounding(prior: Prior, dtype: torch.dtype) -> None:
    mean, log_var, theta = posterior_and_theta(prior, (4, 3), 0)
    half = (mean.to(dtype).requires_grad_(), log_var.float().requires_grad_())
    full = tuple(values.detach().double().requires_grad_() for values in half)
    bound, statistics = kl_bound(*half, Theta(*(values.float() for values in theta)), 0)
    exact, _ = kl_bound(*full, theta, 0)
    (bound + exact).backward()
    assert (bound.dtype, statistics.resp.dtype, statistics.moment.dtype) == (torch.float32,) * 3
    assert [values.grad.dtype for values in half] == [dtype, torch.float32]
    assert bound.item() == pytest.approx(exact.item(), rel=1e-5)
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}
    torch.testing.assert_close(half[0].grad.double(), full[0].grad, **rounding)
    torch.testing.assert_close(half[1].grad.double(), full[1].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e5])
def test_pull_on_a_wide_weight_survives_a_tiny_narrow_component_in_float32(ratio: float) -> None:
    prior = [0.5, 0.5], [0.05, 0.05 / ratio]
    exact = tuple(values.requires_grad_() for values in single_weight(0.07, 2e-3))
    single = tuple(values.detach().float().requires_grad_() for values in exact)
    kl_bound(*exact, theta_of(prior, 1), 0)[0].backward()
    kl_bound(*single, Theta(*(values.float() for values in theta_of(prior, 1))), 0)[0].backward()
    assert single[0].grad.item() == pytest.approx(exact[0].grad.item(), rel=1e-5)


# Irrelevance

MEANS = torch.cat([torch.logspace(-12, 12, 49, dtype=torch.float64), -torch.logspace(-3, 3, 7, dtype=torch.float64)])


@pytest.mark.parametrize("log_var", [-10.0, 0.0, 3.0])
def test_irrelevance_follows_its_definitions(log_var: float) -> None:
    log_vars = torch.full_like(MEANS, log_var)
    variance, square = math.exp(log_var), MEANS.square()
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(log_alpha(MEANS, log_vars), (variance / square).log(), **close)
    torch.testing.assert_close(dropout_rate(MEANS, log_vars), variance / (variance + square), rtol=1e-12, atol=0)
    torch.testing.assert_close(relevance(MEANS, log_vars), (square / variance).log1p() / 2, rtol=1e-12, atol=0)


def test_relevance_is_the_capacity_of_a_gaussian_channel() -> None:
    mean, log_var = random_posterior((20,))
    noise = (log_var / 2).exp()
    received = (mean.square() + noise.square()).sqrt()
    capacity = Normal(0.0, received).entropy() - Normal(0.0, noise).entropy()
    torch.testing.assert_close(relevance(mean, log_var), capacity)


def test_zero_mean_is_perfectly_irrelevant() -> None:
    mean, log_var = torch.zeros(3, dtype=torch.float64), torch.tensor([-20.0, 0.0, 20.0], dtype=torch.float64)
    assert dropout_rate(mean, log_var).tolist() == [1, 1, 1]
    assert relevance(mean, log_var).tolist() == [0, 0, 0]
    assert log_alpha(mean, log_var).tolist() == [math.inf] * 3


def test_irrelevance_rises_with_noise_and_falls_with_signal() -> None:
    signal = torch.linspace(0, 3, 50, dtype=torch.float64)
    log_noise = torch.linspace(-8, 4, 50, dtype=torch.float64)
    for measure, rising in ((dropout_rate, 1), (relevance, -1)):
        by_signal = measure(signal, torch.zeros_like(signal)).diff()
        by_noise = measure(torch.ones_like(log_noise), log_noise).diff()
        assert (rising * by_signal < 0).all()
        assert (rising * by_noise > 0).all()


# Local reparameterization


def test_samples_have_the_mean_and_variance_they_were_given() -> None:
    draws = 100_000
    mean = torch.tensor([-3.0, 0.0, 10.0], dtype=torch.float64)
    variance = torch.tensor([1e-4, 1.0, 25.0], dtype=torch.float64)
    samples = local_reparameterization(mean.expand(draws, -1), variance.expand(draws, -1))
    # Five standard errors: one false alarm in 300,000 seeds.
    assert ((samples.mean(0) - mean).abs() < 5 * (variance / draws).sqrt()).all()
    assert ((samples.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / (draws - 1))).all()
    assert torch.corrcoef(samples.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(draws)


def test_zero_variance_gives_the_mean_and_a_finite_gradient() -> None:
    mean = torch.tensor([-2.0, 0.0, 5.0], requires_grad=True)
    variance = torch.zeros(3, requires_grad=True)
    sample = local_reparameterization(mean, variance)
    torch.testing.assert_close(sample, mean, rtol=0, atol=1e-14)
    sample.sum().backward()
    assert mean.grad.tolist() == [1, 1, 1]
    assert variance.grad.isfinite().all()


@pytest.mark.parametrize("variance", [1e-12, 1e-4, 4.0])
def test_gradient_of_a_sample_is_that_of_mean_plus_noise_times_std(variance: float) -> None:
    mean = torch.randn(5, dtype=torch.float64).requires_grad_()
    output_var = torch.full((5,), variance, dtype=torch.float64, requires_grad=True)
    sample = local_reparameterization(mean, output_var)
    sample.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones_like(mean))
    torch.testing.assert_close(output_var.grad, (sample - mean).detach() / (2 * variance), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [*HALF.values(), torch.float32, torch.float64], ids=[*HALF, "float32", "float64"])
def test_sample_keeps_the_dtype_of_the_mean(dtype: torch.dtype) -> None:
    variance = torch.ones(4, dtype=torch.promote_types(dtype, torch.float32))
    assert local_reparameterization(torch.zeros(4, dtype=dtype), variance).dtype == dtype
