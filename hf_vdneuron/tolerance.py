# SPDX-License-Identifier: Apache-2.0
"""As small as it gets while a metric holds: cuts of many sizes from one posterior, and the smallest that will do."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_vdneuron.budget import Costs, cost_ratio, irremovable_units, keep_within, unit_counts
from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.targets import speedup_budget
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = [
    "CHOSEN_SPEEDUP",
    "CUT_SPEEDUP",
    "CUT_VALUE",
    "DENSE_VALUE",
    "FINAL_VALUE",
    "LIMIT",
    "Cut",
    "ToleranceCallback",
    "last_logged",
    "smallest_cut",
]

_LOGGER = logging.getLogger(__name__)

#: Shares of what heads and neurons cost that the first cuts leave: evenly, and two small ones.
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)

#: How often the gap between the smallest cut that will do and the next smaller one is halved. Three times, and a step
#: of the ladder is down to an eightieth of what can be removed.
HALVINGS = 3


#: What a run logs under these names: the metric of the dense model, with the metric's own name behind it; that of each
#: cut beside its speed-up; that of the dense model and the worst that was allowed beside the speed-up that was chosen,
#: 1 if none was good enough; and the metric of what the run ends with.
DENSE_VALUE, CUT_VALUE, CUT_SPEEDUP = "size_dense", "size_value", "size_speedup"
LIMIT, CHOSEN_SPEEDUP, FINAL_VALUE = "size_limit", "size_chosen", "size_final"


@dataclass(frozen=True)
class Cut:
    """A size that was tried.

    Args:
        share_left: Share that it leaves of what can be removed, by multiply-accumulates.
        speedup: Dense over kept multiply-accumulates of heads and neurons.
        value: Its metric right after the cut.
        mask: What it keeps.
    """

    share_left: float
    speedup: float
    value: float
    mask: RelevanceMask


def smallest_cut(
    model: nn.Module,
    posterior: nn.Module,
    tolerance: Tolerance,
    dense: float,
    judge: Callable[[], float],
    *,
    length: int,
) -> tuple[Cut | None, list[Cut]]:
    """Cut a posterior at many sizes, and keep the smallest that a tolerance allows.

    Every cut ranks units by their relevance per cost, so that a smaller one keeps part of what a larger one does, but
    for single units.

    Args:
        model: A patched model; in the end it carries the mask that it had.
        posterior: The model with the posterior that says what matters, which may be the same.
        tolerance: How much worse than the dense model it may be.
        dense: The dense model's metric.
        judge: Function that evaluates the model as it is and returns the metric.
        length: Tokens of a sequence for which costs are counted.

    Returns:
        The cut that was chosen, None if none will do, and all that were tried, the largest first.
    """
    before, costs = read_mask(model), Costs(model, length=length)
    # Of the model as it is now: a masked one finds what is masked irrelevant.
    relevance = unit_relevance(posterior)
    fixed = costs.macs(irremovable_units(relevance))
    full, present = costs.macs({}), costs.macs(unit_counts(costs.sublayers, before))
    cuts: list[Cut] = []
    while (share := _next_share(cuts, tolerance, dense)) is not None:
        budget = speedup_budget(costs, cost_ratio(full, fixed + share * (present - fixed)))
        mask = keep_within(costs.sublayers, relevance, budget) & before
        mask_model_(model, mask)
        speedup = cost_ratio(full, costs.macs(unit_counts(costs.sublayers, mask)))
        cuts.append(Cut(share, speedup, judge(), mask))
    mask_model_(model, before)
    good = [cut for cut in cuts if tolerance.allows(cut.value, dense)]
    if not good:
        _LOGGER.warning(
            f"No cut keeps `{tolerance.metric}` within {tolerance.allowed:g} of the dense model's {dense:.4g}, so "
            "nothing is removed: allow more, or sparsify for longer."
        )
    chosen = min(good, key=lambda cut: cut.share_left, default=None)
    return chosen, sorted(cuts, key=lambda cut: -cut.share_left)


def _next_share(cuts: list[Cut], tolerance: Tolerance, dense: float) -> float | None:
    """Walk down the ladder, then halve the gap below the smallest cut that will do; None when that is done."""
    if len(cuts) < len(LADDER):
        return LADDER[len(cuts)]
    if len(cuts) == len(LADDER) + HALVINGS:
        return None
    # The complete model will do.
    smallest = min((cut.share_left for cut in cuts if tolerance.allows(cut.value, dense)), default=1.0)
    below = max((cut.share_left for cut in cuts if cut.share_left < smallest), default=0.0)
    return (below + smallest) / 2


class ToleranceCallback(TrainerCallback):
    """Judges the dense model, and the one that a run ends with.

    Args:
        judge: Function that evaluates the model as it is and returns the metric.
        dense: Function that looks up what the dense model was judged by it, None if it was not.
        log: Function that logs a metric of the model under a name.
    """

    def __init__(
        self, judge: Callable[[], float], dense: Callable[[], float | None], log: Callable[[str, float], None]
    ) -> None:
        self.judge = judge
        self.dense = dense
        self.log = log

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
        if state.global_step == 0 and start > 0:
            self.judge()
        if state.global_step > start and self.dense() is None:
            raise ValueError(
                f"The checkpoint of step {state.global_step} does not say how good the dense model was, against "
                f"which `{args.goal}` is judged: expected one of a run that evaluated the same metric. Resume from "
                f"one of step {start} at most, or ask for a target instead."
            )

    def on_step_begin(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Judge the dense model at the start of the sparsification, unless it was just scored on the same rows.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Not used.
        """
        tolerance = args.tolerance
        is_start = state.global_step == args.phase_plan(state.max_steps).sparsify_start
        if tolerance is not None and is_start and self.dense() is None:
            self.log(f"{DENSE_VALUE}_{tolerance.metric}", self.judge())

    def on_train_end(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Judge what is left, after recovery.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Not used.
        """
        dense = self.dense()
        if dense is None or args.tolerance is None:
            return
        final = self.judge()
        self.log(FINAL_VALUE, final)
        if not args.tolerance.allows(final, dense):
            _LOGGER.warning(
                f"`{args.tolerance.metric}` is {final:.4g} in the end, and {args.tolerance.limit(dense):.4g} is the "
                f"worst that `{args.goal}` allows, as the dense model's is {dense:.4g}: recover for longer or at a "
                "lower `learning_rate`, or allow less."
            )


def last_logged(state: TrainerState, name: str) -> float | None:
    """Look up the latest value of a metric in the log of a run.

    Args:
        state: State of the run.
        name: Name of the metric.

    Returns:
        Its value; None if it was never logged.
    """
    return next((logs[name] for logs in reversed(state.log_history) if name in logs), None)
