# SPDX-License-Identifier: Apache-2.0
"""As small as it gets while a metric holds: cut a little, train, judge; and go back to the last that would do."""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_vdneuron.budget import Budget, Costs, cost_ratio, unit_counts
from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.keepsake import Keepsake
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.schedules import PhasePlan
from hf_vdneuron.selection import Alignment, irremovable_units, keep_within
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = [
    "CHOSEN_SPEEDUP",
    "CUT_SPEEDUP",
    "CUT_VALUE",
    "DENSE_VALUE",
    "FINAL_VALUE",
    "LIMIT",
    "ToleranceCallback",
    "last_logged",
    "rungs_at",
    "size_mask",
]

_LOGGER = logging.getLogger(__name__)

#: Shares of what heads and neurons cost that are left at each rung: evenly down, and two small ones.
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)

#: Share of the recovery in which the ladder is walked down; what is chosen trains on in the rest.
WALKING_SHARE = 2 / 3

#: What a run logs under these names: the metric of the dense model, with the metric's own name behind it; that of each
#: size beside its speed-up; that of the dense model and the worst that was allowed beside the speed-up that was
#: chosen, 1 if none was good enough; and the metric of what the run ends with.
DENSE_VALUE, CUT_VALUE, CUT_SPEEDUP = "size_dense", "size_value", "size_speedup"
LIMIT, CHOSEN_SPEEDUP, FINAL_VALUE = "size_limit", "size_chosen", "size_final"


def rungs_at(plan: PhasePlan, step: int) -> list[int]:
    """List the rungs that a run comes to before an optimizer step.

    Args:
        plan: Phases of the run.
        step: Steps done.

    Returns:
        Indices into the ladder, in order; the one past its end judges the last rung. Several where the recovery has
        fewer steps than the ladder rungs.

    Example:
        >>> plan = PhasePlan(30, 0, 150)
        >>> rungs_at(plan, 30), rungs_at(plan, 40), rungs_at(plan, 41), rungs_at(plan, 130)
        ([0], [1], [], [10])
    """
    every = WALKING_SHARE * plan.recover_steps / len(LADDER)
    return [rung for rung in range(len(LADDER) + 1) if plan.recover_start + round(rung * every) == step]


def size_mask(
    model: nn.Module,
    posterior: nn.Module,
    share_left: float,
    *,
    length: int,
    alignment: Alignment = Alignment(),  # noqa: B008  # it is frozen
) -> RelevanceMask:
    """Choose what a size keeps of what is left of a model.

    Args:
        model: A patched model.
        posterior: A copy of it, or itself, with the posterior that says what matters.
        share_left: Share to leave of what the complete model could lose, by multiply-accumulates, in `[0, 1]`.
        length: Tokens of a sequence for which costs are counted.
        alignment: Which numbers of units it may leave.

    Returns:
        The mask.
    """
    before, costs = read_mask(model), Costs(model, length=length)
    relevance = unit_relevance(posterior)
    fixed, full = costs.macs(irremovable_units(relevance)), costs.macs({})
    limit = fixed + share_left * (full - fixed)
    budget = Budget("share_left", share_left, costs.macs, limit, lambda cost: (cost - fixed) / (full - fixed))
    return keep_within(costs.sublayers, relevance, budget, alignment=alignment, present=before) & before


class ToleranceCallback(TrainerCallback):
    """Walks down the ladder of sizes: cut, train, judge, and on as long as it is good enough.

    Args:
        keepsake: Holds the smallest model that was good enough.
        length: Tokens of a sequence for which costs are counted.
        judge: Function that evaluates the model as it is and returns the metric.
        dense: Function that looks up what the dense model was judged by it, None if it was not.
        fit: Function that returns the model with its posterior.
        log: Function that logs metrics of the model.
        on_size: Function `(speedup) -> None` that is told of every size that is good enough, while the model has it.
    """

    def __init__(
        self,
        keepsake: Keepsake,
        length: int,
        *,
        judge: Callable[[], float],
        dense: Callable[[], float | None],
        fit: Callable[[], nn.Module],
        log: Callable[[dict[str, float]], None],
        on_size: Callable[[float], None],
    ) -> None:
        self.keepsake = keepsake
        self.length = length
        self.judge = judge
        self.dense = dense
        self.fit = fit
        self.log = log
        self.on_size = on_size

    def on_train_begin(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Try the judge: nobody should pay for fine-tuning to hear that there is no such metric.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Not used.

        Raises:
            ValueError: If the run is resumed past its sparsification's start, and nothing says how good its dense
                model was.
        """
        start = args.phase_plan(state.max_steps).sparsify_start
        if state.global_step == 0:
            self.keepsake.forget_()
            if start > 0:
                self.judge()
        if state.global_step > start and self.dense() is None:
            raise ValueError(
                f"The checkpoint of step {state.global_step} does not say how good the dense model was, against "
                f"which `{args.goal}` is judged: expected one of a run that evaluated the same metric. Resume from "
                f"one of step {start} at most, or ask for a target instead."
            )

    def on_step_begin(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Keep the dense model at the start of the sparsification, and climb down where a rung is.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Model and optimizer.
        """
        plan, step, model = args.phase_plan(state.max_steps), state.global_step, run["model"]
        if step == plan.sparsify_start:
            self._keep_dense_(model, args)
        for rung in rungs_at(plan, step):
            self._climb_(model, args, rung)

    def on_train_end(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Climb down where no step of recovery did, and hand back what was good enough if what is left is not.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Model and optimizer.
        """
        plan, step, model = args.phase_plan(state.max_steps), state.global_step, run["model"]
        if step < plan.sparsify_start + min(1, plan.sparsify_steps):
            return
        if not self.keepsake.state:
            self._keep_dense_(model, args)
        # A run that was stopped on its way has a size to be judged; one that has not set out has them all.
        is_on_the_way = plan.recover_start < step
        for rung in range(len(LADDER), len(LADDER) + 1) if is_on_the_way else range(len(LADDER) + 1):
            self._climb_(model, args, rung)
        tolerance, dense = self._terms(args)
        final = self.judge()
        if not tolerance.allows(final, dense):
            _LOGGER.warning(
                f"`{tolerance.metric}` fell to {final:.4g} while what was chosen trained on, and "
                f"{tolerance.limit(dense):.4g} is the worst that `{args.goal}` allows: the model is as it was when it "
                f"was chosen, with {self.keepsake.value:.4g}. A lower `learning_rate` may do better."
            )
            self.keepsake.give_back_(model)
            final = self.keepsake.value
        self.log({FINAL_VALUE: final})

    def _terms(self, args: VDTrainingArguments) -> tuple[Tolerance, float]:
        tolerance, dense = args.tolerance, self.dense()
        if tolerance is None or dense is None:
            raise RuntimeError(
                "There is nothing to judge a size against: expected a tolerance and a dense model's metric."
            )
        return tolerance, dense

    def _keep_dense_(self, model: nn.Module, args: VDTrainingArguments) -> None:
        """Judge the dense model, unless it was just scored on the same rows."""
        dense = self.dense()
        if dense is None and args.tolerance is not None:
            dense = self.judge()
            self.log({f"{DENSE_VALUE}_{args.tolerance.metric}": dense})
        self.keepsake.take_(model, dense or 0.0, self._speedup(model))

    def _climb_(self, model: nn.Module, args: VDTrainingArguments, rung: int) -> None:
        """Judge the rung that the model stands on, and cut it down to the next, unless the walk has ended."""
        if self.keepsake.is_final:
            return
        if not self.keepsake.state:  # a posterior that a run with a target has saved
            self.keepsake.take_(model, self.judge(), self._speedup(model))
        if rung > 0 and not self._is_good_enough_(model, args):
            self.keepsake.give_back_(model)
            self._end_(args)
        elif rung == len(LADDER):
            self._end_(args)
        else:
            mask = size_mask(model, self.fit(), LADDER[rung], length=self.length, alignment=args.alignment)
            mask_model_(model, mask)

    def _is_good_enough_(self, model: nn.Module, args: VDTrainingArguments) -> bool:
        tolerance, dense = self._terms(args)
        value, speedup = self.judge(), self._speedup(model)
        self.log({CUT_SPEEDUP: speedup, CUT_VALUE: value})
        if not tolerance.allows(value, dense):
            return False
        self.keepsake.take_(model, value, speedup)
        self.on_size(speedup)
        return True

    def _end_(self, args: VDTrainingArguments) -> None:
        tolerance, dense = self._terms(args)
        self.keepsake.is_final = True
        self.log({DENSE_VALUE: dense, LIMIT: tolerance.limit(dense), CHOSEN_SPEEDUP: self.keepsake.speedup})
        if self.keepsake.speedup == 1:
            _LOGGER.warning(
                f"No size keeps `{tolerance.metric}` within {tolerance.allowed:g} of the dense model's {dense:.4g}, "
                "so nothing is removed: allow more, or recover for longer."
            )

    def _speedup(self, model: nn.Module) -> float:
        costs = Costs(model, length=self.length)
        return cost_ratio(costs.macs({}), costs.macs(unit_counts(costs.sublayers, read_mask(model))))


def last_logged(state: TrainerState, name: str) -> float | None:
    """Look up the latest value of a metric in the log of a run.

    Args:
        state: State of the run.
        name: Name of the metric.

    Returns:
        Its value; None if it was never logged.
    """
    return next((logs[name] for logs in reversed(state.log_history) if name in logs), None)
