# SPDX-License-Identifier: Apache-2.0
r"""The mathematics of `method.md`: pure functions on tensors, each formula beside its code.

Notation: a weight has the posterior :math:`q(W) = \mathcal N(\mu, s^2)`, given as `mean` and `log_var`, and a prior
whose parameters :math:`\theta` it shares with all weights of its group. The prior is a mixture of :math:`K`
zero-mean Gaussians; :math:`K = 1` is the group prior (2), :math:`K = 2` the mixture prior (3). Only the weight prior
(10) has no :math:`\theta`. Logarithms are natural, so every divergence is in nats.

References:
    Kingma, Salimans and Welling, "Variational Dropout and the Local Reparameterization Trick", 2015,
    https://arxiv.org/abs/1506.02557

    Molchanov, Ashukha and Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", 2017,
    https://arxiv.org/abs/1701.05369

    Kharitonov, Molchanov and Vetrov, "Variational Dropout via Empirical Bayes", 2018,
    https://arxiv.org/abs/1811.00596
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import logsigmoid


__all__ = [
    "PriorStatistics",
    "Theta",
    "add_whole_",
    "dropout_rate",
    "gaussian_kl",
    "kl_bound",
    "local_reparameterization",
    "log_alpha",
    "mixture_log_prob",
    "optimal_prior_scale",
    "relevance",
    "responsibilities",
    "second_moment",
    "weight_kl",
    "whole",
]

LOG_2PI = math.log(2 * math.pi)

#: Floor under the square root of a pre-activation's variance. Its inverse square root, 1e15, is finite in float32, so
#: the gradient at zero variance is finite, while noise of 1e-15 is below the rounding of any activation.
OUTPUT_VARIANCE_FLOOR = 1e-30


class Theta(NamedTuple):
    r"""Parameters of the prior, laid out so that they broadcast against a weight.

    Args:
        mixture_weights: :math:`p_k`, shape `(K, ...)`, in `(0, 1)`, summing to 1 over the first axis.
        prior_scales: :math:`\sigma_k > 0`, shape `(K, ...)`, a standard deviation, not increasing over the first axis.
    """

    mixture_weights: Tensor
    prior_scales: Tensor


class PriorStatistics(NamedTuple):
    r"""Sums over the weights of one matrix, all that the M step (8) needs of it.

    Args:
        resp: :math:`\sum r_k`, shape `(K, num_features)`.
        moment: :math:`\sum r_k \tilde W^2`, shape `(K, num_features)`.
    """

    resp: Tensor
    moment: Tensor


def second_moment(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Square of the pseudo-observation, :math:`\tilde W^2 = \mu^2 + s^2 = \mathbb E_q W^2` (4).

    Args:
        mean: Posterior means, any shape.
        log_var: Posterior log-variances, same shape.

    Returns:
        Second moments, same shape, positive.
    """
    return torch.addcmul(log_var.exp(), mean, mean)


def log_alpha(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Noise-to-signal ratio, :math:`\log \alpha = \log s^2 - \log \mu^2`; high means irrelevant.

    Args:
        mean: Posterior means, any shape.
        log_var: Posterior log-variances, same shape.

    Returns:
        Log ratios, same shape; infinite where the mean is zero.
    """
    return log_var - 2 * mean.abs().log()


def dropout_rate(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Equivalent Bernoulli dropout rate, :math:`d = \alpha / (1 + \alpha) = s^2 / (s^2 + \mu^2)` (Kingma 2015).

    Args:
        mean: Posterior means, any shape.
        log_var: Posterior log-variances, same shape.

    Returns:
        Rates in `(0, 1]`, same shape; 1 where the mean is zero.
    """
    return torch.sigmoid(log_alpha(mean, log_var))


def relevance(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""What a weight says beyond its noise, :math:`\tfrac12 \log(1 + \mu^2 / s^2)`.

    It is the capacity of a Gaussian channel with signal :math:`\mu^2` and noise :math:`s^2`.

    Args:
        mean: Posterior means, any shape.
        log_var: Posterior log-variances, same shape.

    Returns:
        Relevance in nats, same shape, not negative.
    """
    return -logsigmoid(log_alpha(mean, log_var)) / 2


def optimal_prior_scale(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Scale of the group prior (2) that is best for a fixed posterior, :math:`\sigma^2 = \mathrm{mean}\,\tilde W^2`.

    Args:
        mean: Posterior means of one group, any shape.
        log_var: Posterior log-variances, same shape.

    Returns:
        Standard deviation, scalar.
    """
    return second_moment(mean, log_var).mean().sqrt()


def gaussian_kl(mean: Tensor, log_var: Tensor, prior_scale: Tensor) -> Tensor:
    r"""Exact divergence from the group prior (2), valid for any scale, optimal or not.

    .. math:: KL(q \| p) = \tfrac12 [\log(\sigma^2 / s^2) + (\mu^2 + s^2) / \sigma^2 - 1]

    Args:
        mean: Posterior means, any shape.
        log_var: Posterior log-variances, same shape.
        prior_scale: Standard deviation of the prior, broadcastable to that shape.

    Returns:
        Divergences in nats, same shape, not negative.
    """
    log_ratio = 2 * prior_scale.log() - log_var
    return (log_ratio + second_moment(mean, log_var) / prior_scale.square() - 1) / 2


def _component_log_prob(moment: Tensor, theta: Theta) -> Tensor:
    r"""Joint density of observation and component, :math:`\log p_k + \log \mathcal N(\tilde W | 0, \sigma_k^2)`."""
    log_scale, precision = theta.prior_scales.log(), theta.prior_scales.square().reciprocal()
    return theta.mixture_weights.log() - log_scale - LOG_2PI / 2 - moment * precision / 2


def mixture_log_prob(moment: Tensor, theta: Theta) -> Tensor:
    r"""Log-likelihood of a pseudo-observation, :math:`\log \sum_k p_k \mathcal N(\tilde W | 0, \sigma_k^2)` (5).

    Args:
        moment: :math:`\tilde W^2`, any shape.
        theta: Parameters of the prior, `(K, ...)` with the rest broadcastable to that shape.

    Returns:
        Log-likelihoods in nats, same shape.
    """
    return _component_log_prob(moment, theta).logsumexp(0)


def responsibilities(moment: Tensor, theta: Theta) -> Tensor:
    r"""E step (7): probability that component :math:`k` made the pseudo-observation.

    Args:
        moment: :math:`\tilde W^2`, any shape.
        theta: Parameters of the prior, `(K, ...)` with the rest broadcastable to that shape.

    Returns:
        Responsibilities in `[0, 1]`, shape `(K, *moment.shape)`, summing to 1 over the first axis.
    """
    return _component_log_prob(moment, theta).softmax(0)


def kl_bound(mean: Tensor, log_var: Tensor, theta: Theta, axis: int) -> tuple[Tensor, PriorStatistics]:
    r"""Upper bound (6) of the divergence from the prior, and the sums for the M step, in one elementwise pass.

    .. math:: KL(q \| p) \le -\tfrac12 \sum \log(2 \pi e s^2) - \sum \log p(\tilde W | \theta)

    With one component it is the exact divergence. The gradient is the closed form (9) at the given :math:`\theta`, so
    no autograd graph over the weights is kept; :math:`\theta` itself gets none, EM moves it.

    Args:
        mean: Posterior means, at least two axes.
        log_var: Posterior log-variances, same shape.
        theta: Parameters of the prior, `(K, num_features)` for the features along `axis`, `K` 1 or 2.
        axis: Axis of the weight along which groups lie.

    Returns:
        The bound, a float32 scalar (float64 for float64 input) in nats, summed over all weights; and the statistics
        of the E step, which carry no gradient.
    """
    bound, resp, moment = _KLBound.apply(mean, log_var, theta.mixture_weights, theta.prior_scales, axis)
    return bound, PriorStatistics(resp, moment)


class _KLBound(torch.autograd.Function):
    """Value of (6), sums for (8) and gradient (9) of one weight matrix."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, mean: Tensor, log_var: Tensor, mixture_weights: Tensor, prior_scales: Tensor, axis: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(log_var.dtype, torch.float32)
        log_weight, variance = mixture_weights.to(dtype).log(), prior_scales.to(dtype).square()
        moment = second_moment(mean.to(dtype), log_var.to(dtype))
        across = [dim for dim in range(moment.ndim) if dim != axis % moment.ndim]
        shape = [1] * moment.ndim
        shape[axis] = -1

        # log p(W~) = log p_1 N_1 - log sigmoid(logit) with logit = log p_1 N_1 - log p_2 N_2. As sigma_1 >= sigma_2
        # the logit grows with W~, so that the second term never has to cancel a large first one.
        moment_sum = moment.sum(across)
        count = torch.full_like(moment_sum, moment.numel() // moment_sum.numel())
        log_prob = count * (log_weight[0] - (variance[0].log() + LOG_2PI) / 2) - moment_sum / variance[0] / 2
        precision = variance.reciprocal()
        if len(variance) == 1:
            lam, resp, resp_moment = precision[0].view(shape), count[None], moment_sum[None]
        else:
            offset = log_weight[0] - log_weight[1] - (variance[0].log() - variance[1].log()) / 2
            gap = precision[1] - precision[0]
            logit = torch.addcmul(offset.view(shape), moment, gap.view(shape), value=0.5)
            log_prob = log_prob - logsigmoid(logit).sum(across)
            # Each responsibility comes from the logit: 1 - wide would lose a small one, which the precision of a
            # narrow component makes large again.
            wide, narrow = logit.sigmoid(), logit.neg_().sigmoid_()
            lam = torch.addcmul(precision[0].view(shape), narrow, gap.view(shape))
            resp = torch.stack([wide.sum(across), narrow.sum(across)])
            resp_moment = torch.stack([wide.mul_(moment).sum(across), narrow.mul_(moment).sum(across)])

        bound = -(log_var.sum(dtype=dtype) + moment.numel() * (LOG_2PI + 1)) / 2 - log_prob.sum()
        ctx.save_for_backward(mean, log_var, lam)
        ctx.mark_non_differentiable(resp, resp_moment)
        return bound, resp, resp_moment

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, None, None, None]:
        mean, log_var, lam = ctx.saved_tensors  # type: ignore[attr-defined]  # torch does not declare it
        # (9): dKL/dmu = mu lambda, dKL/dlog s^2 = (s^2 lambda - 1) / 2
        grad_mean = (mean * lam).mul_(grad)
        grad_log_var = (log_var.exp() * lam).sub_(1).mul_(grad / 2)
        return grad_mean.to(mean.dtype), grad_log_var.to(log_var.dtype), None, None, None


def weight_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""Exact divergence from the weight prior (10), each of whose scales is the best for its weight.

    .. math:: KL(q \| p) = \tfrac12 \sum \log(1 + \mu^2 / s^2)

    It is :func:`gaussian_kl` at :math:`\sigma^2 = \mu^2 + s^2`, and the sum of the :func:`relevance` of all weights
    (Kharitonov 2018). As that scale is a minimum, it can be held fixed in the gradient, which is in closed form too.

    Args:
        mean: Posterior means, any shape.
        log_var: Posterior log-variances, same shape.

    Returns:
        The divergence, a float32 scalar (float64 for float64 input) in nats, summed over all weights.
    """
    return _WeightKL.apply(mean, log_var)


class _WeightKL(torch.autograd.Function):
    """Value and gradient of (10), without autograd's 0/0 at a mean of zero."""

    @staticmethod
    def forward(ctx: FunctionCtx, mean: Tensor, log_var: Tensor) -> Tensor:
        dtype = torch.promote_types(log_var.dtype, torch.float32)
        ctx.save_for_backward(mean, log_var)
        return relevance(mean.to(dtype), log_var.to(dtype)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = ctx.saved_tensors  # type: ignore[attr-defined]  # torch does not declare it
        wide = mean.to(torch.promote_types(log_var.dtype, torch.float32))
        # (10): dKL/dmu = mu / (mu^2 + s^2), dKL/dlog s^2 = -mu^2 / 2 (mu^2 + s^2)
        grad_mean = wide / second_moment(wide, log_var.to(wide.dtype)).clamp_min(torch.finfo(wide.dtype).tiny)
        grad_log_var = (wide * grad_mean).mul_(-grad / 2)
        return grad_mean.mul_(grad).to(mean.dtype), grad_log_var.to(log_var.dtype)


def local_reparameterization(output_mean: Tensor, output_var: Tensor) -> Tensor:
    """Sample pre-activations instead of weights (Kingma 2015, eq. 6).

    With a token or spatial axis the noise is drawn per position: correlations between the positions of one example
    are ignored, as Molchanov 2017 does for convolutions. This is an approximation.

    Args:
        output_mean: Mean of the pre-activations, any shape.
        output_var: Their variance, same shape, not negative.

    Returns:
        A sample, same shape and dtype as `output_mean`.
    """
    std = (output_var + OUTPUT_VARIANCE_FLOOR).sqrt()
    return output_mean + (std * torch.randn_like(std)).to(output_mean.dtype)


def whole(tensor: Tensor) -> Tensor:
    """Gather what fully sharded data parallelism keeps in pieces outside of a forward pass.

    Args:
        tensor: Any tensor. If it is in pieces, every process has to call this.

    Returns:
        All of it.
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def add_whole_(tensor: Tensor, change: Tensor) -> Tensor:
    """Add a whole tensor to one that may be kept in pieces, in place.

    Args:
        tensor: Any tensor. If it is in pieces, every process has to call this.
        change: What is added, the same in every process, in the shape of the whole tensor, on any device.

    Returns:
        The same tensor.
    """
    change = change.to(device=tensor.device, dtype=tensor.dtype)
    if isinstance(tensor, DTensor):
        change = distribute_tensor(change, tensor.device_mesh, tensor.placements)
    return tensor.add_(change)
