# SPDX-License-Identifier: Apache-2.0
r"""The learned prior of a weight matrix: parameters :math:`\theta` per group, moved by EM and never by gradient.

Which method this is: not the log-uniform prior of variational dropout, but a *learned* scale per group of weights
(empirical Bayes, also called ARD), with a group the size of a neuron or a head. The weight prior, whose groups have
one weight each, is there to compare with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from hf_vdneuron.functional import (
    LOG_2PI,
    PriorStatistics,
    Theta,
    kl_bound,
    mixture_log_prob,
    relevance,
    responsibilities,
    second_moment,
    weight_kl,
)
from hf_vdneuron.precision import at_least_float32


__all__ = ["GaussianMixturePrior", "GroupGaussianPrior", "GroupPrior", "Prior", "WeightPrior"]

#: Mixture weights are projected into [floor, 1 - floor]: a component may become rare, but it can always come back.
#: One in a million is less than one weight of the largest group in use.
MIXTURE_WEIGHT_FLOOR = 1e-6


def variance_floor(dtype: torch.dtype) -> float:
    """Smallest prior variance: its inverse stays a factor `1 / eps` away from overflow.

    Args:
        dtype: Floating type of the prior.

    Returns:
        The floor, about 1e-31 in float32.
    """
    info = torch.finfo(dtype)
    return info.tiny / info.eps


class Prior(nn.Module, ABC):
    r"""Prior of one weight matrix whose features are dealt out to groups.

    Args:
        feature_group: Group of each feature along the group axis of the weight, shape `(num_features,)`, integer.
        num_groups: Number of groups, :math:`G`.
        key: Name of the prior. Matrices whose priors have the same key share :math:`\theta`: their statistics are
            summed before the M step, and each holds its own equal copy, so that a layer needs no other.
    """

    feature_group: Tensor

    def __init__(self, feature_group: Tensor, *, num_groups: int, key: str) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.key = key
        self.register_buffer("feature_group", feature_group, persistent=False)

    @abstractmethod
    def kl_bound(self, mean: Tensor, log_var: Tensor, axis: int) -> tuple[Tensor, PriorStatistics | None]:
        r"""Bound the divergence of a posterior from the prior.

        Args:
            mean: Posterior means, at least two axes.
            log_var: Posterior log-variances, same shape.
            axis: Axis of the weight along which groups lie.

        Returns:
            The bound, a scalar in nats, and its sums per group for the M step, or None if there is no
            :math:`\theta` to move.
        """

    @abstractmethod
    def precision(self, mean: Tensor, log_var: Tensor, axis: int) -> Tensor:
        r"""Tell how hard the prior pulls each weight towards zero.

        Args:
            mean: Posterior means, at least two axes.
            log_var: Posterior log-variances, same shape.
            axis: Axis of the weight along which groups lie.

        Returns:
            :math:`\lambda` of (9), same shape, positive.
        """

    @abstractmethod
    def kl_by_weight(self, mean: Tensor, log_var: Tensor, axis: int) -> Tensor:
        """Tell what each weight adds to the bound of the divergence.

        Args:
            mean: Posterior means, at least two axes.
            log_var: Posterior log-variances, same shape.
            axis: Axis of the weight along which groups lie.

        Returns:
            Nats, same shape; below 0 for a weight that the prior finds likelier than the posterior does.
        """

    def sum_groups(self, per_feature: Tensor) -> Tensor:
        """Sum over the features of each group.

        Args:
            per_feature: One value per feature, shape `(..., num_features)`.

        Returns:
            One per group, shape `(..., G)`.
        """
        zeros = per_feature.new_zeros(*per_feature.shape[:-1], self.num_groups)
        return zeros.index_add_(-1, self.feature_group, per_feature)

    def sum_weights(self, per_weight: Tensor, axis: int) -> Tensor:
        """Sum over the weights of each group.

        Args:
            per_weight: One value per weight, at least two axes.
            axis: Axis along which groups lie.

        Returns:
            One per group, shape `(G,)`.
        """
        return self.sum_groups(per_weight.movedim(axis, 0).flatten(1).sum(1))

    def extra_repr(self) -> str:
        """Describe the prior in a printed model.

        Returns:
            Key and number of groups.
        """
        return f"key={self.key!r}, num_groups={self.num_groups}"


class WeightPrior(Prior):
    r"""Weight prior (10): every weight has a scale of its own, in closed form, so that there is no :math:`\theta`.

    This is plain variational dropout in its empirical Bayes form (Kharitonov 2018). Groups share nothing but, where
    there is one, the scale of their means.
    """

    def kl_bound(self, mean: Tensor, log_var: Tensor, axis: int) -> tuple[Tensor, None]:
        """Return the divergence itself.

        Args:
            mean: Posterior means, any shape.
            log_var: Posterior log-variances, same shape.
            axis: Not used.

        Returns:
            Scalar in nats, and None.
        """
        return weight_kl(mean, log_var), None

    def kl_by_weight(self, mean: Tensor, log_var: Tensor, axis: int) -> Tensor:
        """Return the divergence of each weight.

        Args:
            mean: Posterior means, any shape.
            log_var: Posterior log-variances, same shape.
            axis: Not used.

        Returns:
            Nats, same shape.
        """
        return relevance(mean, log_var)

    def precision(self, mean: Tensor, log_var: Tensor, axis: int) -> Tensor:
        r"""Return :math:`1 / \sigma^2` at the best scale of each weight.

        Args:
            mean: Posterior means, any shape.
            log_var: Posterior log-variances, same shape.
            axis: Not used.

        Returns:
            :math:`1 / (\mu^2 + s^2)`, same shape.
        """
        return second_moment(mean, log_var).clamp_min(variance_floor(mean.dtype)).reciprocal()


class GroupPrior(Prior):
    r"""Prior with parameters :math:`\theta` per group.

    Args:
        feature_group: Group of each feature along the group axis of the weight, shape `(num_features,)`, integer.
        num_groups: Number of groups, :math:`G`.
        key: Name that matrices which share :math:`\theta` have in common.
        dtype: Floating type of :math:`\theta`.
    """

    num_components: ClassVar[int]
    mixture_weights: Tensor
    prior_scales: Tensor

    def __init__(
        self, feature_group: Tensor, *, num_groups: int, key: str, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(feature_group, num_groups=num_groups, key=key)
        theta = torch.ones(self.num_components, num_groups, dtype=dtype, device=feature_group.device)
        self.register_buffer("mixture_weights", theta / self.num_components)
        self.register_buffer("prior_scales", theta.clone())

    @abstractmethod
    def initial_variances(self, variance: Tensor) -> Tensor:
        r"""Spread the components around the mean second moment of a group.

        Args:
            variance: Mean of :math:`\tilde W^2` over each group, shape `(G,)`.

        Returns:
            Component variances, shape `(K, G)`, not increasing over the first axis.
        """

    def theta(self) -> Theta:
        """Return the parameters of each feature's group.

        Returns:
            Parameters of shape `(K, num_features)`.
        """
        return Theta(self.mixture_weights[:, self.feature_group], self.prior_scales[:, self.feature_group])

    def kl_bound(self, mean: Tensor, log_var: Tensor, axis: int) -> tuple[Tensor, PriorStatistics]:
        """Bound the divergence by (6), at the prior as it stands.

        Args:
            mean: Posterior means, at least two axes.
            log_var: Posterior log-variances, same shape.
            axis: Axis of the weight along which groups lie.

        Returns:
            Scalar in nats, and the sums of the E step (7), shape `(K, G)`.
        """
        bound, per_feature = kl_bound(mean, log_var, self.theta(), axis)
        return bound, self.pool(per_feature)

    def kl_by_weight(self, mean: Tensor, log_var: Tensor, axis: int) -> Tensor:
        """Tell what each weight adds to (6), at the prior as it stands.

        Args:
            mean: Posterior means, at least two axes.
            log_var: Posterior log-variances, same shape.
            axis: Axis of the weight along which groups lie.

        Returns:
            Nats, same shape.
        """
        entropy = (1 + LOG_2PI + log_var) / 2
        return -entropy - mixture_log_prob(second_moment(mean, log_var), self._theta_along(axis, mean.ndim))

    def precision(self, mean: Tensor, log_var: Tensor, axis: int) -> Tensor:
        r"""Weigh the components' precisions by their responsibilities (7), at the prior as it stands.

        Args:
            mean: Posterior means, at least two axes.
            log_var: Posterior log-variances, same shape.
            axis: Axis of the weight along which groups lie.

        Returns:
            :math:`\lambda` of (9), same shape.
        """
        theta = self._theta_along(axis, mean.ndim)
        precisions = theta.prior_scales.square().reciprocal()
        return (responsibilities(second_moment(mean, log_var), theta) * precisions).sum(0)

    def _theta_along(self, axis: int, num_axes: int) -> Theta:
        """Return the parameters of each feature's group, to be broadcast over a weight."""
        shape = [1] * num_axes
        shape[axis] = -1
        return Theta(*(values.view(self.num_components, *shape) for values in self.theta()))

    def pool(self, statistics: PriorStatistics) -> PriorStatistics:
        """Sum statistics over the features of each group.

        Args:
            statistics: Sums per feature, shape `(K, num_features)`.

        Returns:
            Sums per group, shape `(K, G)`.
        """
        return PriorStatistics(*(self.sum_groups(sums) for sums in statistics))

    @torch.no_grad()
    def init_(self, statistics: PriorStatistics) -> "GroupPrior":
        r"""Set :math:`\theta` from the weights alone, in place: equal mixture weights, spread scales.

        Args:
            statistics: Number of weights and sum of :math:`\tilde W^2` per group, shape `(1, G)`.

        Returns:
            Itself.
        """
        variance = (statistics.moment / statistics.resp.clamp_min(1)).squeeze(0)  # a group may hold no weights
        self.mixture_weights.fill_(1 / self.num_components)
        self._set_variances_(self.initial_variances(variance.to(self.prior_scales.dtype)))
        return self

    @torch.no_grad()
    def m_step_(self, statistics: PriorStatistics) -> "GroupPrior":
        r"""M step (8), in place.

        .. math:: p_k = \mathrm{mean}\, r_k, \qquad \sigma_k^2 = \sum r_k \tilde W^2 / \sum r_k

        Floors are projections onto a convex set of a unimodal objective, so the bound still never decreases. A
        component that no weight belongs to keeps its scale, as any scale is then equally good.

        Args:
            statistics: Sums of the E step per group, shape `(K, G)`.

        Returns:
            Itself.
        """
        resp, moment = (sums.to(self.prior_scales.dtype) for sums in statistics)
        if self.num_components > 1:
            share = resp / resp.sum(0).clamp_min(torch.finfo(resp.dtype).tiny)
            self.mixture_weights.copy_(share.clamp(MIXTURE_WEIGHT_FLOOR, 1 - MIXTURE_WEIGHT_FLOOR))
        self._set_variances_(torch.where(resp > 0, moment / resp, self.prior_scales.square()))
        return self

    def _set_variances_(self, variances: Tensor) -> None:
        self.prior_scales.copy_(variances.clamp_min(variance_floor(variances.dtype)).sqrt())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a cast or move of the model, without losing precision."""
        super()._apply(at_least_float32(fn), recurse)
        return self


class GroupGaussianPrior(GroupPrior):
    r"""Group prior (2): all weights of a group share one scale. The M step is its closed form."""

    num_components = 1

    def initial_variances(self, variance: Tensor) -> Tensor:
        r"""Return the closed form, :math:`\sigma^2 = \mathrm{mean}\,\tilde W^2`.

        Args:
            variance: Mean of :math:`\tilde W^2` over each group, shape `(G,)`.

        Returns:
            The same, shape `(1, G)`.
        """
        return variance[None]


class GaussianMixturePrior(GroupPrior):
    r"""Mixture prior (3): a group may hold large weights beside small ones.

    Component 0 is the wide one. EM keeps that order: responsibilities of the wide component grow with
    :math:`\tilde W^2`, so its weighted mean stays the larger.
    """

    num_components = 2

    #: Start of the two variances relative to the mean second moment (method: Conventions). They must differ, as equal
    #: components are a fixed point of EM.
    SPREAD: ClassVar[tuple[float, float]] = (2.0, 0.2)

    def initial_variances(self, variance: Tensor) -> Tensor:
        r"""Return :math:`2` and :math:`0.2` times the mean second moment.

        Args:
            variance: Mean of :math:`\tilde W^2` over each group, shape `(G,)`.

        Returns:
            Variances of the wide and the narrow component, shape `(2, G)`.
        """
        return torch.stack([factor * variance for factor in self.SPREAD])
