# SPDX-License-Identifier: Apache-2.0
"""What changes over a run: phases, learning rates, the weight of the KL term. Pure functions."""

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


__all__ = [
    "KEPT_RATE",
    "Decay",
    "Phase",
    "PhasePlan",
    "bounds",
    "default_kl_weight",
    "first_kl_weight",
    "kl_brake",
    "kl_weight_at",
    "rate_factor",
    "removal_path",
    "steer_kl_weight",
    "variational_rate_factor",
]

#: Share of the sparsification over which variational rates hold, before they fall to zero at its end.
HOLD_SHARE = 0.5

#: Number of examples that pretrained weights stand for. At weight 1 the KL of 840 nats per example drove a pretrained
#: model to chance (method: fact 2); 3 million held at 100, 400 and 1,000 steps (method: fact 3).
PRETRAINING_EVIDENCE = 3_000_000


#: Share of the weights that `PRETRAINING_EVIDENCE` leaves in runs of 400 to 1,000 steps, between 0.38 (SST-2) and 0.65
#: (MRPC), and how the KL weight has to grow for less: twice as high, it leaves about half.
TYPICAL_SHARE_LEFT, SHARE_EXPONENT = 0.45, 0.9

#: Share of a sparsification -> share of the expected cost that has gone by then of what goes in all, at a constant KL
#: weight. It is the same within 0.06 whether 0.29 or 0.08 of the weights are left in the end, as the rates of the
#: posterior follow the phase, and a group scale takes a third of it to fall to 0.
REMOVAL_PATH = (
    (0.0, 0.0), (0.1, 0.04), (0.2, 0.14), (0.25, 0.21), (0.3, 0.31), (0.35, 0.50), (0.4, 0.72),
    (0.5, 0.86), (0.6, 0.92), (0.7, 0.965), (0.8, 0.985), (1.0, 1.0),
)  # fmt: skip

#: Mean keep rate of the weights that stay at the end of a sparsification, relative to its start: 0.73 and 0.67 in the
#: runs of the path.
KEPT_RATE = 0.70

#: How fast the controller moves the logarithm of the KL weight.
CONTROLLER_GAIN = 15.0


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

    @property
    def posterior_start(self) -> int:
        """Steps after which there is a posterior: its first one, or all of fine-tuning if it is in closed form."""
        return self.sparsify_start + min(1, self.sparsify_steps)

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


def bounds(num_steps: int, count: int) -> list[int]:
    """Divide steps evenly.

    Args:
        num_steps: Number of steps, at least 0.
        count: Number of parts, at least 1.

    Returns:
        First step of each part, and the end of the last.

    Example:
        >>> bounds(10, 4)
        [0, 2, 5, 8, 10]
    """
    return [round(part * num_steps / count) for part in range(count + 1)]


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
    r"""Shape the rate of log-variances and group scales over the sparsification.

    .. math:: \min(1,\; (t + 1) / w) \cdot \min(1,\; (1 - t / T) / (1 - h))

    The rate rises over :math:`w` steps of warm-up, holds until the share :math:`h = 1/2` of the phase, and falls to
    zero. Adam bounces a group scale around its optimum by about the rate, so one whose optimum is zero would end
    some way off, and its group would stay. The fall lets it settle.

    Args:
        step: Steps :math:`t` done in the phase before this one, at least 0.
        num_steps: Steps :math:`T` of the phase.
        warmup_steps: Steps of the rise.

    Returns:
        Factor in `[0, 1]` of the full rate; 0 beyond the phase.

    Example:
        >>> [variational_rate_factor(step, 8, warmup_steps=2) for step in range(9)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step >= num_steps:
        return 0.0
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return rise * min(1.0, (1 - step / num_steps) / (1 - HOLD_SHARE))


def default_kl_weight(num_data: int) -> float:
    r"""Choose a KL weight for a pretrained model, whose weights stand for more evidence than one task's examples.

    .. math:: \beta = N / N_\mathrm{effective}

    With it the pressure per example, :math:`\beta / N`, does not depend on the size of the data set.

    Args:
        num_data: Number of terms :math:`N` that the loss is the mean of.

    Returns:
        Final weight :math:`\beta` of the KL term.

    Example:
        >>> default_kl_weight(30_000)
        0.01
    """
    return num_data / PRETRAINING_EVIDENCE


def kl_weight_at(step: int, num_steps: int, *, kl_weight: float, ramp: float, start: float) -> float:
    r"""Raise the KL weight exponentially to its final value, then hold it.

    .. math:: \beta_t = \beta\, a^{\,1 - \min(1,\; t / (\rho T))}

    It can start low, as a pretrained model meets a prior that its own data never chose, and a posterior that
    collapses early does not come back (method: facts 2 and 6).

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


def first_kl_weight(num_data: int, share_left: float) -> float:
    r"""Guess the KL weight that leads to a target, for the controller to start from.

    .. math:: \beta_0 = \frac{N}{N_\mathrm{effective}} \left( \frac{\rho_0}{\rho} \right)^{a}

    Args:
        num_data: Number of terms :math:`N` that the loss is the mean of.
        share_left: Share :math:`\rho` of the cost that the target leaves, between 0 and 1.

    Returns:
        Weight of the KL term.
    """
    return default_kl_weight(num_data) * (TYPICAL_SHARE_LEFT / share_left) ** SHARE_EXPONENT


def removal_path(share_of_phase: float) -> float:
    """Tell how far on the way to its target a sparsification should be.

    Args:
        share_of_phase: Share of the phase that is done, in `[0, 1]`.

    Returns:
        Share of what has to go in the end, between the points of `REMOVAL_PATH`.

    Example:
        >>> [round(removal_path(share), 2) for share in (0.0, 0.25, 0.45, 1.0)]
        [0.0, 0.21, 0.79, 1.0]
    """
    for (start, low), (end, high) in pairwise(REMOVAL_PATH):
        if share_of_phase <= end:
            return low + (high - low) * (share_of_phase - start) / (end - start)
    return 1.0


def steer_kl_weight(kl_weight: float, *, behind: float, share_of_phase: float) -> float:
    r"""Move the KL weight towards where the expected cost follows its path.

    .. math:: \log \beta \leftarrow \log \beta + G\, \frac{\Delta t}{T}\, (p - r)

    It is slow against the posterior: at a tenth of the way behind for a tenth of the phase, it moves by
    :math:`G / 100`. A controller that moved by 0.3 per unit of error in every step went back and forth between no
    pressure and collapse (method: fact 6).

    Args:
        kl_weight: Weight :math:`\beta` so far.
        behind: Path minus what is expected to go, :math:`p - r`, as shares of what has to go in the end.
        share_of_phase: Time :math:`\Delta t / T` since the last move, as a share of the phase.

    Returns:
        The weight from now on.
    """
    return kl_weight * math.exp(CONTROLLER_GAIN * share_of_phase * behind)


def kl_brake(share_of_phase: float, removed: float) -> float:
    r"""Ease the pull of the KL where a posterior is ahead of its path.

    .. math:: \min\left(1,\; \frac{1 - r}{1 - p}\right)

    What is about to go hardly comes back, and what still has to is less and less. A weight that only drifts is late
    then: with a gain of 15 and a target of 1.5x, the dropout-rate rule alone would have given 2.0x (MiniLM, SST-2).
    With the brake it gives 1.40x, 1.60x and 1.59x over three seeds.

    Args:
        share_of_phase: Share of the phase that is done, in `[0, 1]`; the path :math:`p` follows from it.
        removed: What is expected to go, :math:`r`, as a share of what has to go in the end.

    Returns:
        Factor of the KL weight, in `[0, 1]`.

    Example:
        >>> kl_brake(0.5, removed=0.5), round(kl_brake(0.5, removed=0.93), 2), kl_brake(0.5, removed=1.1)
        (1.0, 0.5, 0.0)
    """
    left, planned = max(0.0, 1 - removed), 1 - removal_path(share_of_phase)
    return 1.0 if left >= planned else left / planned
