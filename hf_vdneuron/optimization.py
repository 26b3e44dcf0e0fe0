# SPDX-License-Identifier: Apache-2.0
"""Rates of a run: variational parameters move at their own, and every rate follows the phases."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_vdneuron.schedules import Decay, Phase, PhasePlan, bounds, rate_factor, variational_rate_factor


__all__ = ["phase_scheduler", "reset_variational_", "split_variational_"]

#: Key of an optimizer's parameter group that says what it holds.
_MARK = "variational"


def split_variational_(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    distances: Mapping[str, float],
    *,
    num_steps: int,
) -> None:
    """Give variational parameters groups of their own, in place: own rates, no weight decay.

    Those that the optimizer holds are moved and those it lacks, having been made before the model was patched, are
    added. Groups of an earlier split are replaced, as another run may have other rates.

    Adam moves a parameter by at most about its rate per step, so the full rate is a distance over the number of
    steps: the way a parameter goes if Adam pushes in one direction at this rate all the time. Then one default holds
    for short and long runs.

    Args:
        optimizer: The optimizer.
        named_parameters: All parameters of the model.
        distances: Last part of a parameter's name -> distance.
        num_steps: Steps of the sparsification.
    """
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in distances}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            kinds.get(name.rpartition(".")[2], []).append(parameter)
    moved = {id(parameter) for parameters in kinds.values() for parameter in parameters}
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if not group.get(_MARK)]
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    for kind, parameters in kinds.items():
        if parameters:
            rate = distances[kind] / max(1, num_steps)
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0, _MARK: True})


def reset_variational_(optimizer: Optimizer) -> None:
    """Forget the moments of variational parameters, in place.

    Gathered while the posterior stood still, they would blow up Adam's first steps.

    Args:
        optimizer: The optimizer.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get(_MARK) else ():
            optimizer.state.pop(parameter, None)


def phase_scheduler(
    optimizer: Optimizer,
    plan: PhasePlan,
    *,
    decay: Decay,
    warmup_steps: Callable[[int], int],
    num_recoveries: int = 1,
) -> LambdaLR:
    """Shape every rate over each phase; variational rates are 0 outside sparsification, and hold and fall within it.

    Args:
        optimizer: The optimizer.
        plan: Steps of each phase.
        decay: How the other rates fall.
        warmup_steps: Function from the steps of a phase to those of its warm-up.
        num_recoveries: Parts of the recovery in which they rise and fall anew.

    Returns:
        The scheduler.
    """
    recoveries = bounds(plan.recover_steps, num_recoveries)

    def factor(variational: bool, step: int) -> float:
        done, length = plan.position(step)
        if plan.phase_at(step) is Phase.RECOVER:
            start, end = next(((a, b) for a, b in pairwise(recoveries) if a <= done < b), (0, length))
            done, length = done - start, end - start
        if not variational:
            return rate_factor(done, length, warmup_steps=warmup_steps(length), decay=decay)
        if plan.phase_at(step) is not Phase.SPARSIFY:
            return 0.0
        return variational_rate_factor(done, length, warmup_steps=warmup_steps(length))

    factors: list[Callable[[int], float]] = [
        partial(factor, group.get(_MARK, False)) for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, factors)
