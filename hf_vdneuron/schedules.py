# SPDX-License-Identifier: Apache-2.0
"""What changes over a run: phases, learning rates, the weight of the KL term. Pure functions of the step."""

import math
from dataclasses import dataclass
from enum import StrEnum


__all__ = ["Decay", "Phase", "PhasePlan", "kl_weight_at", "rate_factor", "variational_rate_factor"]

#: Share of the sparsification over which the rates of variational parameters fall to zero.
SETTLING_SHARE = 0.5


class Phase(StrEnum):
    """Part of a run."""

    FINETUNE = "finetune"
    """Ordinary training of the dense model."""
    SPARSIFY = "sparsify"
    """Training of the posterior, with noise, KL and EM."""
    RECOVER = "recover"
    """Ordinary training of what is left."""


class Decay(StrEnum):
    """How a learning rate falls from its peak to the end of a phase."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True)
class PhasePlan:
    """How many optimizer steps each phase takes.

    Args:
        finetune_steps: Steps of the first phase, at least 0.
        sparsify_steps: Steps of the second.
        recover_steps: Steps of the third.

    Example:
        >>> plan = PhasePlan.from_fractions(10, finetune=0.3, sparsify=0.5, recover=0.2)
        >>> [str(plan.phase_at(step)) for step in (0, 2, 3, 7, 8, 9)]
        ['finetune', 'finetune', 'sparsify', 'sparsify', 'recover', 'recover']
    """

    finetune_steps: int
    sparsify_steps: int
    recover_steps: int

    @classmethod
    def from_fractions(cls, num_steps: int, *, finetune: float, sparsify: float, recover: float) -> "PhasePlan":
        """Divide a run.

        Args:
            num_steps: Optimizer steps of the whole run.
            finetune: Share of the first phase, not negative. Shares count relative to their sum; 0 skips a phase.
            sparsify: Share of the second.
            recover: Share of the third.

        Returns:
            The plan; its steps add up to `num_steps`.
        """
        total = finetune + sparsify + recover
        sparsify_start = round(num_steps * finetune / total)
        recover_start = round(num_steps * (finetune + sparsify) / total)
        return cls(sparsify_start, recover_start - sparsify_start, num_steps - recover_start)

    @property
    def sparsify_start(self) -> int:
        """First step of the second phase."""
        return self.finetune_steps

    @property
    def recover_start(self) -> int:
        """First step of the third phase."""
        return self.finetune_steps + self.sparsify_steps

    def phase_at(self, step: int) -> Phase:
        """Tell which phase an optimizer step belongs to.

        Args:
            step: Number of steps done before it, at least 0.

        Returns:
            Its phase; the last one for steps beyond the plan.
        """
        if step < self.sparsify_start:
            return Phase.FINETUNE
        return Phase.SPARSIFY if step < self.recover_start else Phase.RECOVER

    def position(self, step: int) -> tuple[int, int]:
        """Tell where in its phase a step is.

        Args:
            step: Number of steps done before it, at least 0.

        Returns:
            Steps done in the phase before it, and steps the phase takes.
        """
        start, length = {
            Phase.FINETUNE: (0, self.finetune_steps),
            Phase.SPARSIFY: (self.sparsify_start, self.sparsify_steps),
            Phase.RECOVER: (self.recover_start, self.recover_steps),
        }[self.phase_at(step)]
        return step - start, length


def rate_factor(step: int, num_steps: int, *, warmup_steps: int, decay: Decay) -> float:
    """Shape a learning rate over one phase: a linear rise, then a fall to zero.

    Args:
        step: Steps done in the phase before this one, at least 0.
        num_steps: Steps of the phase.
        warmup_steps: Steps of the rise; at most the whole phase.
        decay: Shape of the fall.

    Returns:
        Factor in `[0, 1]` of the peak rate; 0 beyond the phase.
    """
    if step >= num_steps:
        return 0.0
    warmup_steps = min(warmup_steps, num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay is Decay.CONSTANT:
        return 1.0
    done = (step - warmup_steps) / (num_steps - warmup_steps)
    return 1 - done if decay is Decay.LINEAR else (1 + math.cos(math.pi * done)) / 2


def variational_rate_factor(step: int, num_steps: int, *, warmup_steps: int) -> float:
    """Shape the rates of variational parameters over the sparsification: a linear rise, a hold, a linear fall to zero.

    Adam bounces a dying group scale around zero by about its rate, and the dropout-rate rule takes the bounce for
    life. With the rate it dies down, so that whatever dies settles within the phase, also in a short one.

    Args:
        step: Steps done in the phase before this one, at least 0.
        num_steps: Steps of the phase.
        warmup_steps: Steps of the rise.

    Returns:
        Factor in `[0, 1]` of the peak rate; 0 beyond the phase.
    """
    if step >= num_steps:
        return 0.0
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    return rise * min(1.0, (1 - step / num_steps) / SETTLING_SHARE)


def kl_weight_at(step: int, num_steps: int, *, kl_weight: float, ramp: float, start: float) -> float:
    r"""Raise the KL weight exponentially to its final value, then hold it.

    .. math:: \beta_t = \beta\, a^{\,1 - \min(1,\; t / (\rho T))}

    It starts low, as a pretrained model meets a prior that its own data never chose, and a posterior that collapses
    early does not come back (method: facts 2 and 6).

    Args:
        step: Steps :math:`t` done in the sparsification phase before this one.
        num_steps: Steps :math:`T` of that phase.
        kl_weight: Final weight :math:`\beta`.
        ramp: Share :math:`\rho` of the phase that the rise takes, in `[0, 1]`.
        start: First weight :math:`a` relative to the final one, in `(0, 1]`.

    Returns:
        Weight of the KL term at this step.
    """
    ramp_steps = ramp * num_steps
    return kl_weight * start ** (1 - min(1.0, step / ramp_steps)) if ramp_steps else kl_weight
