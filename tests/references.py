"""Slow oracles: formulas of `method.md` as loops over single weights, in float64 and in no hurry."""

import math
from collections.abc import Iterable, Sequence

from scipy.integrate import quad


#: Beyond this many standard deviations a Gaussian holds less than 1e-32 of its mass.
REACH = 12

Floats = Sequence[float]


def log_normal(square: float, scale: float) -> float:
    """Log-density of a zero-mean Gaussian at a point whose square is given."""
    return -math.log(scale) - math.log(2 * math.pi) / 2 - square / scale**2 / 2


def log_joint(moment: float, mixture_weights: Floats, prior_scales: Floats) -> list[float]:
    """Log-density of one pseudo-observation together with each component."""
    return [math.log(p) + log_normal(moment, scale) for p, scale in zip(mixture_weights, prior_scales, strict=True)]


def log_prob(moment: float, mixture_weights: Floats, prior_scales: Floats) -> float:
    """Log-likelihood of one pseudo-observation (5)."""
    joint = log_joint(moment, mixture_weights, prior_scales)
    return max(joint) + math.log(sum(math.exp(value - max(joint)) for value in joint))


def log_likelihood(moments: Iterable[float], mixture_weights: Floats, prior_scales: Floats) -> float:
    """What EM climbs: the log-likelihood of all pseudo-observations of a group."""
    return math.fsum(log_prob(moment, mixture_weights, prior_scales) for moment in moments)


def responsibilities(moment: float, mixture_weights: Floats, prior_scales: Floats) -> list[float]:
    """E step of one pseudo-observation (7)."""
    joint = log_joint(moment, mixture_weights, prior_scales)
    total = log_prob(moment, mixture_weights, prior_scales)
    return [math.exp(value - total) for value in joint]


def e_step(moments: Iterable[float], mixture_weights: Floats, prior_scales: Floats) -> tuple[list[float], list[float]]:
    """Sums of r and of r W~^2 over a group, for each component."""
    resp, resp_moment = [0.0] * len(prior_scales), [0.0] * len(prior_scales)
    for moment in moments:
        for k, r in enumerate(responsibilities(moment, mixture_weights, prior_scales)):
            resp[k] += r
            resp_moment[k] += r * moment
    return resp, resp_moment


def em_step(moments: Floats, mixture_weights: Floats, prior_scales: Floats) -> tuple[list[float], list[float]]:
    """One step of EM (7, 8): the next mixture weights and scales."""
    resp, resp_moment = e_step(moments, mixture_weights, prior_scales)
    scales = [math.sqrt(total / r) for total, r in zip(resp_moment, resp, strict=True)]
    return [r / len(moments) for r in resp], scales


def kl_bound(mean: float, log_var: float, mixture_weights: Floats, prior_scales: Floats) -> float:
    """Upper bound (6) of one weight's divergence."""
    moment = mean**2 + math.exp(log_var)
    return -math.log(2 * math.pi * math.e) / 2 - log_var / 2 - log_prob(moment, mixture_weights, prior_scales)


def mixture_kl(mean: float, std: float, mixture_weights: Floats, prior_scales: Floats) -> float:
    """True divergence of one weight from the mixture prior (3), by quadrature."""

    def integrand(weight: float) -> float:
        log_posterior = log_normal((weight - mean) ** 2, std)
        return math.exp(log_posterior) * (log_posterior - log_prob(weight**2, mixture_weights, prior_scales))

    low, high = mean - REACH * std, mean + REACH * std
    bends = [sign * reach * scale for scale in prior_scales for reach in (0, 2, REACH) for sign in (-1, 1)]
    inside = sorted({point for point in (mean - std, mean, mean + std, *bends) if low < point < high})
    value, _ = quad(integrand, low, high, points=inside, limit=500, epsabs=1e-11, epsrel=1e-11)
    return value
