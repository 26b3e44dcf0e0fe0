"""EM moves the prior as a loop and scikit-learn do, never downhill, and stays finite wherever it is sent."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from hf_vdneuron.functional import PriorStatistics, kl_bound, second_moment
from hf_vdneuron.priors import (
    MIXTURE_WEIGHT_FLOOR,
    GaussianMixturePrior,
    GroupGaussianPrior,
    GroupPrior,
    Prior,
    WeightPrior,
    variance_floor,
)


PRIORS = {"group": GroupGaussianPrior, "mixture": GaussianMixturePrior}
prior_cases = pytest.mark.parametrize("prior_class", PRIORS.values(), ids=PRIORS)

#: Largest power of ten that weights are drawn at: far beyond any network, well inside what a square can hold.
EXPONENTS = {torch.float32: 12, torch.float64: 20}
dtype_cases = pytest.mark.parametrize("dtype", EXPONENTS, ids=["float32", "float64"])

# Features of a weight's group axis dealt out to three groups: one by one, packed, interleaved, of unequal size.
FEATURE_GROUPS = {
    "neurons": [0, 1, 2],
    "heads": [0, 0, 1, 1, 2, 2],
    "interleaved": [0, 1, 2, 0, 1, 2],
    "unequal": [2, 0, 2, 2, 1, 1],
}
NUM_GROUPS = 3


class Posterior(NamedTuple):
    mean: Tensor
    log_var: Tensor

    @property
    def moment(self) -> Tensor:
        return second_moment(*self)


def random_posterior(num_features: int, fan_in: int = 7) -> Posterior:
    """Weights of two kinds, so that a mixture has something to find."""
    kinds = 0.05 + 0.95 * (torch.rand(num_features, fan_in) < 0.3).double()
    return Posterior(kinds * torch.randn_like(kinds), torch.randn_like(kinds) - 8)


def start(prior_class: type[GroupPrior], posterior: Posterior, feature_group: list[int]) -> GroupPrior:
    """A prior started from the weights, as a patched model starts it."""
    groups = torch.tensor(feature_group)
    prior = prior_class(groups, num_groups=max(feature_group) + 1, key="test", dtype=posterior.mean.dtype)
    sums = posterior.moment.sum(1)
    return prior.init_(prior.pool(PriorStatistics(torch.full_like(sums, posterior.mean.shape[1])[None], sums[None])))


def em_step_(prior: GroupPrior, posterior: Posterior) -> Tensor:
    """One step of EM, as a training step takes it; returns the bound before it."""
    bound, statistics = kl_bound(*posterior, prior.theta(), axis=0)
    prior.m_step_(prior.pool(statistics))
    return bound


def parameters(prior: GroupPrior, group: int) -> tuple[list[float], list[float]]:
    return prior.mixture_weights[:, group].tolist(), prior.prior_scales[:, group].tolist()


def members(posterior: Posterior, feature_group: list[int], group: int) -> list[float]:
    return posterior.moment[torch.tensor(feature_group) == group].flatten().tolist()


# Against oracles


@prior_cases
@pytest.mark.parametrize("feature_group", FEATURE_GROUPS.values(), ids=FEATURE_GROUPS)
def test_em_is_the_loop_over_a_groups_weights(prior_class: type[GroupPrior], feature_group: list[int]) -> None:
    posterior = random_posterior(len(feature_group))
    prior = start(prior_class, posterior, feature_group)
    for group in range(NUM_GROUPS):
        expected = parameters(prior, group)
        moments = members(posterior, feature_group, group)
        for _ in range(5):
            expected = references.em_step(moments, *expected)
        stepped = start(prior_class, posterior, feature_group)
        for _ in range(5):
            em_step_(stepped, posterior)
        for found, wanted in zip(parameters(stepped, group), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_em_is_that_of_scikit_learn(steps: int) -> None:
    posterior = random_posterior(1, fan_in=60)
    prior = start(GaussianMixturePrior, posterior, [0])
    observations = posterior.moment.sqrt().flatten().numpy()
    theirs = GaussianMixture(
        n_components=2,
        covariance_type="spherical",
        tol=0,
        reg_covar=0,
        max_iter=steps,
        weights_init=prior.mixture_weights[:, 0].numpy(),
        means_init=np.zeros((2, 1)),
        precisions_init=prior.prior_scales[:, 0].numpy() ** -2,
    )
    # Observations come with both signs: by symmetry the means stay at zero.
    with pytest.warns(ConvergenceWarning):
        theirs.fit(np.concatenate([observations, -observations])[:, None])
    for _ in range(steps):
        em_step_(prior, posterior)
    np.testing.assert_allclose(theirs.means_, 0, atol=1e-12)
    np.testing.assert_allclose(prior.mixture_weights[:, 0], theirs.weights_, rtol=1e-10)
    np.testing.assert_allclose(prior.prior_scales[:, 0].square(), theirs.covariances_, rtol=1e-10)


def test_one_step_brings_the_group_prior_to_the_minimum() -> None:
    posterior = random_posterior(3)
    prior = start(GroupGaussianPrior, posterior, [0, 1, 2])
    prior.prior_scales.mul_(torch.tensor([0.1, 1.0, 7.0]))
    em_step_(prior, posterior)
    torch.testing.assert_close(prior.prior_scales[0], posterior.moment.mean(1).sqrt())
    assert prior.mixture_weights.tolist() == [[1.0] * 3]


@prior_cases
def test_start_is_spread_around_the_mean_moment(prior_class: type[GroupPrior]) -> None:
    posterior = random_posterior(6)
    prior = start(prior_class, posterior, FEATURE_GROUPS["unequal"])
    factors = {GroupGaussianPrior: [1.0], GaussianMixturePrior: [2.0, 0.2]}[prior_class]
    for group in range(NUM_GROUPS):
        moments = members(posterior, FEATURE_GROUPS["unequal"], group)
        mixture_weights, scales = parameters(prior, group)
        assert mixture_weights == [1 / len(factors)] * len(factors)
        assert scales == pytest.approx([math.sqrt(factor * np.mean(moments)) for factor in factors], rel=1e-12)


@prior_cases
def test_starting_again_forgets_em(prior_class: type[GroupPrior]) -> None:
    posterior = random_posterior(3, fan_in=7)
    prior, fresh = (start(prior_class, posterior, [0, 1, 2]) for _ in range(2))
    prior.prior_scales.mul_(2)
    em_step_(prior, posterior)
    prior.init_(PriorStatistics(torch.full((1, 3), 7.0), posterior.moment.sum(1)[None]))
    assert torch.equal(prior.mixture_weights, fresh.mixture_weights)
    assert torch.equal(prior.prior_scales, fresh.prior_scales)


def test_theta_gives_each_feature_the_parameters_of_its_group() -> None:
    posterior = random_posterior(6)
    prior = start(GaussianMixturePrior, posterior, FEATURE_GROUPS["unequal"])
    em_step_(prior, posterior)
    theta = prior.theta()
    for feature, group in enumerate(FEATURE_GROUPS["unequal"]):
        assert (theta.mixture_weights[:, feature].tolist(), theta.prior_scales[:, feature].tolist()) == parameters(
            prior, group
        )


@pytest.mark.parametrize("prior_class", [*PRIORS.values(), WeightPrior], ids=[*PRIORS, "weight"])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_precision_is_the_pull_of_the_bound_on_the_means(prior_class: type[Prior], axis: int) -> None:
    posterior = Posterior(*(values.movedim(0, axis) for values in random_posterior(6)))
    prior = prior_class(torch.tensor(FEATURE_GROUPS["unequal"]), num_groups=NUM_GROUPS, key="test").double()
    if isinstance(prior, GroupPrior):
        prior.prior_scales.copy_(torch.tensor([[0.9, 0.7, 0.5], [0.1, 0.2, 0.3]])[: prior.num_components])
    mean = posterior.mean.requires_grad_()
    bound, _ = prior.kl_bound(mean, posterior.log_var, axis)
    (pull,) = torch.autograd.grad(bound, mean)  # (9): mu lambda
    torch.testing.assert_close(prior.precision(*posterior, axis) * mean, pull, rtol=1e-10, atol=0)


def test_weight_prior_has_nothing_to_learn_or_save() -> None:
    prior = WeightPrior(torch.tensor([0, 0, 1]), num_groups=2, key="test")
    posterior = random_posterior(3)
    bound, statistics = prior.kl_bound(*posterior, 0)
    assert bound.item() == pytest.approx((1 + posterior.mean**2 / posterior.log_var.exp()).log().sum().item() / 2)
    assert statistics is None
    assert [*prior.parameters()] == [*prior.state_dict()] == []
    assert "key='test', num_groups=2" in repr(prior)


# Wherever it is sent


@st.composite
def hostile_posteriors(draw: st.DrawFn, dtype: torch.dtype) -> Posterior:
    """Up to three groups of up to six weights at any scale; some equal, some without a mean, some zero altogether."""
    exponents = st.floats(-EXPONENTS[dtype], EXPONENTS[dtype])
    vanished = (0.0, -1000.0)  # its variance is zero in float64
    weights = st.one_of(
        st.tuples(exponents.map(lambda power: 10.0**power), exponents.map(lambda power: 2 * power * math.log(10))),
        st.tuples(st.just(0.0), exponents.map(lambda power: 2 * power * math.log(10))),
        st.just(vanished),
    )
    num_features, fan_in = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rows = st.one_of(st.lists(weights, min_size=fan_in, max_size=fan_in), weights.map(lambda one: [one] * fan_in))
    drawn = torch.tensor([draw(rows) for _ in range(num_features)], dtype=dtype)
    return Posterior(*drawn.unbind(-1))


def check_em(prior: GroupPrior, posterior: Posterior, steps: int) -> None:
    """Take steps of EM, and see that each is finite, in order, within the floors, and not downhill."""
    eps = torch.finfo(posterior.mean.dtype).eps
    rows = posterior.moment.tolist()
    likelihoods = [references.log_likelihood(row, *parameters(prior, group)) for group, row in enumerate(rows)]
    for _ in range(steps):
        bound = em_step_(prior, posterior)
        assert bound.isfinite()
        assert prior.prior_scales.isfinite().all()
        assert (prior.prior_scales.square() >= variance_floor(prior.prior_scales.dtype) * (1 - 4 * eps)).all()
        assert (prior.prior_scales.diff(dim=0) <= 4 * eps * prior.prior_scales[:1]).all()
        assert (prior.mixture_weights.sum(0) - 1).abs().max() <= 4 * eps
        if prior.num_components > 1:
            assert (prior.mixture_weights >= MIXTURE_WEIGHT_FLOOR * (1 - eps)).all()
        for group, row in enumerate(rows):
            reached = references.log_likelihood(row, *parameters(prior, group))
            # The stored prior is rounded, each parameter by a few eps, and log p moves by at most one nat per weight
            # and unit of log sigma. In the oracle itself a sum of terms rounds.
            tolerance = 16 * eps * len(row) + 1e-14 * abs(reached)
            assert reached >= likelihoods[group] - tolerance
            likelihoods[group] = reached


@prior_cases
@dtype_cases
@given(data=st.data())
def test_em_never_goes_downhill(prior_class: type[GroupPrior], dtype: torch.dtype, data: st.DataObject) -> None:
    posterior = data.draw(hostile_posteriors(dtype))
    prior = start(prior_class, posterior, list(range(len(posterior.mean))))
    check_em(prior, posterior, steps=6)


@given(share=st.floats(1e-6, 1 - 1e-6), log_wide=st.floats(-3, 3), log_ratio=st.floats(0, 6), data=st.data())
def test_em_climbs_from_a_stale_mixture(share: float, log_wide: float, log_ratio: float, data: st.DataObject) -> None:
    posterior = data.draw(hostile_posteriors(torch.float64))
    prior = start(GaussianMixturePrior, posterior, list(range(len(posterior.mean))))
    ratios = torch.tensor([[10.0**log_wide], [10.0 ** (log_wide - log_ratio)]])
    prior.prior_scales.mul_(ratios).clamp_min_(math.sqrt(variance_floor(torch.float64)))
    prior.mixture_weights.copy_(torch.tensor([[share], [1 - share]], dtype=torch.float64))
    check_em(prior, posterior, steps=6)


@dtype_cases
@pytest.mark.parametrize("exponent", [-1, 0, 1], ids=["smallest", "ordinary", "largest"])
def test_em_does_not_depend_on_the_scale_of_the_weights(dtype: torch.dtype, exponent: int) -> None:
    factor = 10.0 ** (exponent * EXPONENTS[dtype])
    ordinary = Posterior(*(values.to(dtype) for values in random_posterior(4, fan_in=50)))
    scaled = Posterior(ordinary.mean * factor, ordinary.log_var + 2 * math.log(factor))
    priors = [start(GaussianMixturePrior, posterior, [0, 1, 2, 3]) for posterior in (ordinary, scaled)]
    for _ in range(5):
        bounds = [em_step_(prior, posterior) for prior, posterior in zip(priors, (ordinary, scaled), strict=True)]
    rtol = 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(priors[1].prior_scales / factor, priors[0].prior_scales, rtol=rtol, atol=0)
    torch.testing.assert_close(priors[1].mixture_weights, priors[0].mixture_weights, rtol=rtol, atol=0)
    torch.testing.assert_close(bounds[1], bounds[0], rtol=rtol, atol=0)


# Fixed points and floors


def test_equal_components_are_a_fixed_point() -> None:
    posterior = random_posterior(2, fan_in=50)
    prior = start(GaussianMixturePrior, posterior, [0, 1])
    prior.prior_scales.copy_(posterior.moment.mean(1).sqrt().expand(2, -1))
    prior.mixture_weights.copy_(torch.tensor([[0.3], [0.7]]))
    scales, mixture_weights = prior.prior_scales.clone(), prior.mixture_weights.clone()
    for _ in range(5):
        em_step_(prior, posterior)
    torch.testing.assert_close(prior.prior_scales, scales, rtol=1e-13, atol=0)
    torch.testing.assert_close(prior.mixture_weights, mixture_weights, rtol=1e-13, atol=0)


def test_start_is_not_a_fixed_point() -> None:
    posterior = random_posterior(1, fan_in=50)
    prior = start(GaussianMixturePrior, posterior, [0])
    gaps = []
    for _ in range(20):
        em_step_(prior, posterior)
        gaps.append((prior.prior_scales[0] / prior.prior_scales[1]).item())
    assert gaps[-1] > 5  # the weights were drawn at scales 1 and 0.05


@prior_cases
@dtype_cases
def test_vanished_weights_rest_on_the_floor(prior_class: type[GroupPrior], dtype: torch.dtype) -> None:
    posterior = Posterior(torch.zeros(2, 3, dtype=dtype), torch.full((2, 3), -2000.0, dtype=dtype))
    prior = start(prior_class, posterior, [0, 1])
    floor = math.sqrt(variance_floor(dtype))
    for _ in range(2):
        assert prior.prior_scales.flatten().tolist() == pytest.approx([floor] * prior.prior_scales.numel(), rel=1e-6)
        assert em_step_(prior, posterior).isfinite()
    assert prior.prior_scales.square().reciprocal().isfinite().all()


@pytest.mark.parametrize(
    ("resp", "expected"),
    [([6.0, 0.0], [1 - MIXTURE_WEIGHT_FLOOR, MIXTURE_WEIGHT_FLOOR]), ([0.0, 6.0], [MIXTURE_WEIGHT_FLOOR, 1 - 1e-6])],
    ids=["no_narrow", "no_wide"],
)
def test_component_without_weights_keeps_its_scale_and_a_way_back(resp: list[float], expected: list[float]) -> None:
    prior = start(GaussianMixturePrior, random_posterior(1), [0])
    before = prior.prior_scales.clone()
    sums = torch.tensor(resp, dtype=torch.float64)[:, None]
    prior.m_step_(PriorStatistics(sums, sums * 0.25))
    empty = resp.index(0.0)
    assert prior.prior_scales[empty] == before[empty]
    assert prior.prior_scales[1 - empty].item() == pytest.approx(0.5, rel=1e-12)
    assert prior.mixture_weights.flatten().tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        pytest.param(nn.Module.bfloat16, torch.float32, id="bfloat16"),
        pytest.param(nn.Module.half, torch.float32, id="float16"),
        pytest.param(nn.Module.double, torch.float64, id="float64"),
        pytest.param(lambda module: module.to("cpu", torch.bfloat16), torch.float32, id="moved"),
    ],
)
@prior_cases
def test_casts_never_narrow_the_prior(
    prior_class: type[GroupPrior], cast: Callable[[nn.Module], nn.Module], expected: torch.dtype
) -> None:
    prior = prior_class(torch.tensor([0, 1, 1]), num_groups=2, key="test")
    prior.prior_scales.fill_(1 + 2.0**-20)
    cast(prior)
    assert prior.prior_scales.dtype is prior.mixture_weights.dtype is expected
    assert prior.feature_group.dtype is torch.int64
    assert (prior.prior_scales == 1 + 2.0**-20).all()


@prior_cases
def test_prior_has_buffers_and_no_parameters(prior_class: type[GroupPrior]) -> None:
    prior = start(prior_class, random_posterior(2), [0, 1])
    assert list(prior.parameters()) == []
    assert set(prior.state_dict()) == {"mixture_weights", "prior_scales"}
    assert prior.num_groups == 2
    assert "key='test', num_groups=2" in repr(prior)
