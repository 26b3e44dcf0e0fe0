# SPDX-License-Identifier: Apache-2.0
"""How a run arrives where it was asked to: how hard the KL pulls, and what the cut keeps."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vdneuron.budget import Budget, Costs, UnitCounts, unit_counts
from hf_vdneuron.goal_args import SpeedupFrom
from hf_vdneuron.latency import text_inputs
from hf_vdneuron.latency_table import LatencyTable, measure_latency_table
from hf_vdneuron.masks import RelevanceMask, read_mask
from hf_vdneuron.relevance import expected_units, unit_relevance
from hf_vdneuron.schedules import (
    KEPT_RATE,
    Phase,
    PhasePlan,
    default_kl_weight,
    first_kl_weight,
    kl_brake,
    kl_weight_at,
    removal_path,
    steer_kl_weight,
)
from hf_vdneuron.selection import Alignment, irremovable_units, keep_within, stages
from hf_vdneuron.sublayers import Sublayer
from hf_vdneuron.targets import target_budget
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["Steering", "steps_between_looks"]

_LOGGER = logging.getLogger(__name__)

#: How often at least the controller looks at the posterior in one sparsification, a pass over its weights each time.
LOOKS = 100

#: How many times higher or lower than its first guess the KL weight can get: a posterior that does not follow by then
#: would only be drowned in noise, and the cut meets the target all the same.
FURTHEST = 30.0

#: Share of the removable cost for which a first guess is still made; a target that leaves less starts as high, and is
#: warned of.
LEAST_SHARE = 0.02


def steps_between_looks(sparsify_steps: int) -> int:
    """Tell how often the controller looks at the posterior.

    Args:
        sparsify_steps: Steps of the sparsification.

    Returns:
        Steps from one look to the next; the first look is before the first step.
    """
    return max(1, sparsify_steps // LOOKS)


@dataclass(frozen=True)
class _Course:
    """What the target of a run means for its model.

    Args:
        sublayers: Its sub-layers.
        budget: What may be kept of it.
        present: Units that are there at the start.
        least: Cost of what cannot be removed.
        first: KL weight to start from.
    """

    sublayers: list[Sublayer]
    budget: Budget
    present: UnitCounts
    least: float
    first: float

    @property
    def goal(self) -> float:
        """Expected cost of a posterior that keeps what the target leaves, at the usual rate."""
        return self.least + KEPT_RATE * (self.budget.limit - self.least)


class Steering:
    """Where a run is going: how hard the KL pulls at each step, and what the cut keeps.

    With a target, the KL weight follows a controller, and the cut keeps what says most for its cost. Without one, the
    weight follows its schedule, and the dropout-rate rule decides.

    Args:
        length: Tokens of a sequence for which a speed-up is asked.
        num_data: Function that gives the number of terms that the loss is the mean of.

    Attributes:
        removed: Share of what has to go for the target that the posterior is about to let go, None before the first
            look.
    """

    def __init__(self, length: int, num_data: Callable[[], int]) -> None:
        self.length = length
        self.num_data = num_data
        self.removed: float | None = None
        self._course: _Course | None = None
        self._table: LatencyTable | None = None
        self._kl_weight: float | None = None
        self._brake = 1.0
        self._units_at_start: dict[str, float] | None = None

    # ---- Setting out ----

    def begin_(self, model: PreTrainedModel, args: VDTrainingArguments, plan: PhasePlan, *, step: int) -> None:
        """Find out what the target of a run means for its model.

        Args:
            model: The patched model.
            args: Arguments of the run.
            plan: Its phases.
            step: Steps done, when it is resumed.

        Raises:
            ValueError: If the target is out of reach, or the checkpoint lacks what the run knew.
        """
        self.removed = None
        if step <= plan.sparsify_start:
            self._kl_weight, self._brake, self._units_at_start = None, 1.0, None
        if step == 0:
            self._table = None
        self._course = None
        if args.target is None:
            return
        costs = Costs(model, length=self.length)
        if args.target_speedup is not None and args.speedup_from is SpeedupFrom.LATENCY:
            self._table = _agree_on_table(self._table, model, args, self.length)
        budget = target_budget(args, costs, self._table)
        least = irremovable_units(unit_relevance(model))
        budget.require_reachable(least)
        # An earlier run, or the user, may have ended some; after the cut of this run there is no way left to go.
        present = {} if step > plan.recover_start else unit_counts(costs.sublayers, read_mask(model))
        fixed, now = budget.cost(least), budget.cost(present)
        if now <= budget.limit:
            raise ValueError(
                f"`{args.target}` is {getattr(args, args.target):g}, which the model meets with what an earlier run "
                "has ended: ask for more, or call `prune()` first to count from what is left."
            )
        share_left = (budget.limit - fixed) / (now - fixed)
        if share_left < LEAST_SHARE:
            _LOGGER.warning(
                f"`{args.target}` is {getattr(args, args.target):g}, which leaves {share_left:.1%} of what heads and "
                "neurons cost: a model that small may do no better than chance."
            )
        first = first_kl_weight(self.num_data(), max(share_left, LEAST_SHARE)) if plan.sparsify_steps else 0.0
        self._course = _Course(costs.sublayers, budget, present, fixed, first)
        if self._kl_weight is None and plan.sparsify_start < step < plan.recover_start and args.kl_weight is None:
            raise ValueError(
                f"The checkpoint of step {step} does not say which KL weight the run had reached: expected its "
                "steering in it. Resume from another one, or set `kl_weight`."
            )

    # ---- On the way ----

    def kl_weight(self, args: VDTrainingArguments, plan: PhasePlan, *, step: int) -> float:
        """Weigh the KL term.

        Args:
            args: Arguments of the run.
            plan: Its phases.
            step: Steps done.

        Returns:
            Weight at the step that comes next; 0 outside sparsification.
        """
        if plan.phase_at(step) is not Phase.SPARSIFY:
            return 0.0
        if self._course is not None and args.kl_weight is None:
            return self._course.first if self._kl_weight is None else self._brake * self._kl_weight
        final = default_kl_weight(self.num_data()) if args.kl_weight is None else args.kl_weight
        return kl_weight_at(*plan.position(step), kl_weight=final, ramp=args.kl_ramp, start=args.kl_start)

    def look_(self, model: nn.Module, plan: PhasePlan, *, step: int) -> None:
        """See now and then how far the posterior is, and correct the KL weight. The first look is where it starts.

        Args:
            model: The patched model.
            plan: Phases of the run.
            step: Steps done, from the start of the sparsification to its end.
        """
        course, done, every = self._course, step - plan.sparsify_start, steps_between_looks(plan.sparsify_steps)
        if course is None or done % every:
            return
        expected = expected_units(model)
        if done == 0 or self._units_at_start is None:
            self._kl_weight, self._units_at_start = course.first, expected
            return
        # Against the keep rates at the start, which depend on how large the weights of a model are.
        counts = {
            part.path: course.present.get(part.path, part.num_units)
            * expected[part.path]
            / (self._units_at_start[part.path] or 1.0)
            for part in course.sublayers
        }
        full = course.budget.cost(course.present)
        share_of_phase = done / plan.sparsify_steps
        self.removed = (full - course.budget.cost(counts)) / (full - course.goal)
        moved = steer_kl_weight(
            course.first if self._kl_weight is None else self._kl_weight,
            behind=removal_path(share_of_phase) - self.removed,
            share_of_phase=every / plan.sparsify_steps,
        )
        self._kl_weight = min(max(moved, course.first / FURTHEST), course.first * FURTHEST)
        self._brake = kl_brake(share_of_phase, self.removed)

    # ---- Arriving ----

    def stages(self, alignment: Alignment) -> list[Budget]:
        """Divide the way to the target of a run.

        Args:
            alignment: Which numbers of units may be kept.

        Returns:
            What may be kept after each stage.

        Raises:
            RuntimeError: If no run has begun, or it has no target.
        """
        course = self._on_course()
        return stages(course.budget, alignment, now=course.budget.cost(course.present), least=course.least)

    def mask(
        self,
        relevance: Mapping[str, Tensor],
        args: VDTrainingArguments,
        *,
        present: RelevanceMask,
        budget: Budget | None = None,
    ) -> RelevanceMask:
        """Choose what the target of a run allows to keep of what is there.

        Args:
            relevance: What says how much units are worth, as `unit_relevance` gives it.
            args: Arguments of the run.
            present: What is there.
            budget: What may be kept, if it is not yet the target.

        Returns:
            The mask.

        Raises:
            RuntimeError: If no run has begun, or it has no target.
        """
        course = self._on_course()
        budget = course.budget if budget is None else budget
        return keep_within(course.sublayers, relevance, budget, alignment=args.alignment, present=present)

    def _on_course(self) -> _Course:
        if self._course is None:
            raise RuntimeError("There is no target to keep to: expected a run that has one, and has begun.")
        return self._course

    def logs(self) -> dict[str, float]:
        """Return the share of what has to go that the posterior is about to let go, once it was looked at."""
        return {} if self.removed is None else {"expected_removal": self.removed}

    # ---- Being resumed ----

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep, as JSON types."""
        return {
            "kl_weight": self._kl_weight,
            "brake": self._brake,
            "units_at_start": self._units_at_start,
            "latency_table": self._table and self._table.to_json(),
        }

    def load_(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `state` gave.

        Args:
            state: The state of the run that is resumed, None if its checkpoint has none.
        """
        state = state or Steering(self.length, self.num_data).state()
        self._kl_weight, self._brake = state["kl_weight"], state["brake"]
        self._units_at_start = state["units_at_start"]
        table = state["latency_table"]
        self._table = table and LatencyTable.from_json(table)


def _agree_on_table(
    known: LatencyTable | None, model: PreTrainedModel, args: VDTrainingArguments, length: int
) -> LatencyTable:
    """Measure on the first process unless it knows, and tell the others: two clocks would ask for two structures."""
    batch_size = args.latency_batch_size
    if args.process_index == 0 and (known is None or not known.is_of(model, batch_size=batch_size, length=length)):
        try:
            known = measure_latency_table(
                model, text_inputs(batch_size=batch_size, length=length, device=model.device)
            )
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"`{type(model).__name__}` cannot be timed on {batch_size} x {length} token ids: {error}. Expected a "
                "model of text that takes as many, and memory for them. Lower `max_length` or `latency_batch_size`, "
                "or ask for a speed-up in multiply-accumulates."
            ) from error
    return broadcast_object_list([known])[0]
