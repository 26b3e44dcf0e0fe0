# SPDX-License-Identifier: Apache-2.0
"""As small as it gets while a metric holds: cut, recover, judge; smaller if it was good enough, else larger again."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from hf_vdneuron.budget import Budget, Costs, speedup
from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.keepsake import Keepsake
from hf_vdneuron.masks import RelevanceMask, read_mask
from hf_vdneuron.schedules import PhasePlan, bounds
from hf_vdneuron.selection import FREE, Alignment, irremovable_units, keep_within
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
    "size_mask",
    "sizes_at",
]

_LOGGER = logging.getLogger(__name__)

#: What a run logs under these names: the metric of the dense model, with the metric's own name behind it; that of each
#: size beside its speed-up; that of the dense model and the worst that was allowed beside the speed-up that was
#: chosen, 1 if none was good enough; and the metric of what the run ends with.
DENSE_VALUE, CUT_VALUE, CUT_SPEEDUP = "size_dense", "size_value", "size_speedup"
LIMIT, CHOSEN_SPEEDUP, FINAL_VALUE = "size_limit", "size_chosen", "size_final"


def sizes_at(plan: PhasePlan, step: int, num_sizes: int) -> list[int]:
    """List the sizes that a run turns to before an optimizer step.

    Args:
        plan: Phases of the run.
        step: Steps done.
        num_sizes: How many sizes it tries in all.

    Returns:
        Their numbers, in order; the one past the last ends the search. Several where the recovery has fewer steps than
        there are sizes.

    Example:
        >>> plan = PhasePlan(30, 0, 20)
        >>> sizes_at(plan, 30, 2), sizes_at(plan, 40, 2), sizes_at(plan, 41, 2), sizes_at(plan, 50, 2)
        ([0], [1], [], [2])
    """
    return [
        number
        for number, start in enumerate(bounds(plan.recover_steps, num_sizes))
        if plan.recover_start + start == step
    ]


def size_mask(
    model: nn.Module,
    relevance: Mapping[str, Tensor],
    share_left: float,
    *,
    length: int,
    alignment: Alignment = FREE,
) -> RelevanceMask:
    """Choose what a size keeps of what is left of a model.

    Args:
        model: A patched model.
        relevance: What its units are worth, as `unit_relevance` gives it.
        share_left: Share to leave of what the complete model could lose, by multiply-accumulates, in `[0, 1]`.
        length: Tokens of a sequence for which costs are counted.
        alignment: Which numbers of units it may leave.

    Returns:
        The mask.
    """
    before, costs = read_mask(model), Costs(model, length=length)
    fixed, full = costs.macs(irremovable_units(relevance)), costs.macs({})
    limit = fixed + share_left * (full - fixed)
    budget = Budget("share_left", share_left, costs.macs, limit, lambda cost: (cost - fixed) / (full - fixed))
    return keep_within(costs.sublayers, relevance, budget, alignment=alignment, present=before)


class ToleranceCallback(TrainerCallback):
    """Looks for the smallest size that is good enough, by halving.

    Each size is cut from the last good one, recovers in its part of the run, and is judged. A good one is followed by
    a smaller one, a bad one by one between it and the last good one, to which the model goes back first. So what the
    run ends with has been judged as it is.

    Args:
        keepsake: Holds the smallest model that was good enough.
        length: Tokens of a sequence for which costs are counted.
        judge: Function that evaluates the model as it is and returns the metric.
        dense: Function that looks up what the dense model was judged by it, None if it was not.
        relevance: Function `(is_first) -> relevance` that measures what units are worth. A trained posterior is good
            for the first size.
        mask: Function `(mask, is_first) -> None` that masks the model.
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
        relevance: Callable[[bool], Mapping[str, Tensor]],
        mask: Callable[[RelevanceMask, bool], None],
        log: Callable[[dict[str, float]], None],
        on_size: Callable[[float], None],
    ) -> None:
        self.keepsake = keepsake
        self.length = length
        self.judge = judge
        self.dense = dense
        self.relevance = relevance
        self.mask = mask
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
        """Keep the dense model at the start of the sparsification, and turn to the next size where its part begins.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Model and optimizer.
        """
        plan, step, model = args.phase_plan(state.max_steps), state.global_step, run["model"]
        if step == plan.sparsify_start:
            self._keep_dense_(model, args)
        for number in sizes_at(plan, step, args.num_sizes):
            self._turn_(model, args, number)

    def on_train_end(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Judge the last size, or all of them where no step of recovery did, and say what the run ends with.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Model and optimizer.
        """
        plan, step, model = args.phase_plan(state.max_steps), state.global_step, run["model"]
        if step < plan.posterior_start:
            return
        if step == plan.sparsify_start:
            self._keep_dense_(model, args)
        # A run that was stopped on its way has a size to be judged; one that has not set out has them all.
        is_on_the_way = plan.recover_start < step
        for number in range(args.num_sizes if is_on_the_way else 0, args.num_sizes + 1):
            self._turn_(model, args, number)
        self.log({FINAL_VALUE: self.keepsake.value})

    def _keep_dense_(self, model: nn.Module, args: VDTrainingArguments) -> None:
        """Judge the dense model, unless it was just scored on the same rows."""
        dense = self.dense()
        if dense is None and args.tolerance is not None:
            dense = self.judge()
            self.log({f"{DENSE_VALUE}_{args.tolerance.metric}": dense})
        self.keepsake.forget_()
        self.keepsake.take_(model, dense or 0.0, 1.0)

    def _turn_(self, model: nn.Module, args: VDTrainingArguments, number: int) -> None:
        """Judge the size that the model has, and cut the next one, unless the search has ended."""
        if self.keepsake.is_final:
            return
        if not self.keepsake.state:  # a posterior that a run with a target has saved
            self.keepsake.take_(model, self.judge(), 1.0)
        if number > 0:
            self._judge_size_(model, args)
        if number < args.num_sizes:
            relevance, share = self.relevance(number == 0), self.keepsake.next_share
            mask = size_mask(model, relevance, share, length=self.length, alignment=args.alignment)
            self.mask(mask, number == 0)
        else:
            self._end_(model, args)

    def _terms(self, args: VDTrainingArguments) -> tuple[Tolerance, float]:
        tolerance, dense = args.tolerance, self.dense()
        if tolerance is None or dense is None:
            raise RuntimeError("There is nothing to judge by: expected a tolerance and a metric of the dense model.")
        return tolerance, dense

    def _judge_size_(self, model: nn.Module, args: VDTrainingArguments) -> None:
        tolerance, dense = self._terms(args)
        value, faster, share = self.judge(), self._speedup(model), self.keepsake.next_share
        self.log({CUT_SPEEDUP: faster, CUT_VALUE: value})
        if tolerance.allows(value, dense):
            self.keepsake.take_(model, value, share)
            self.on_size(faster)
        else:
            self.keepsake.too_small = share
            self.keepsake.give_back_(model)

    def _end_(self, model: nn.Module, args: VDTrainingArguments) -> None:
        tolerance, dense = self._terms(args)
        self.keepsake.is_final = True
        self.log({DENSE_VALUE: dense, LIMIT: tolerance.limit(dense), CHOSEN_SPEEDUP: self._speedup(model)})
        if self.keepsake.share_left == 1:
            _LOGGER.warning(
                f"No size keeps `{tolerance.metric}` within {tolerance.allowed:g} of the dense model's {dense:.4g}, "
                "so nothing is removed: allow more, or recover for longer."
            )

    def _speedup(self, model: nn.Module) -> float:
        return speedup(model, read_mask(model), length=self.length)


def last_logged(state: TrainerState, name: str) -> float | None:
    """Look up the latest value of a metric in the log of a run.

    Args:
        state: State of the run.
        name: Name of the metric.

    Returns:
        Its value; None if it was never logged.
    """
    return next((logs[name] for logs in reversed(state.log_history) if name in logs), None)
