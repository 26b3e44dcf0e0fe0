# SPDX-License-Identifier: Apache-2.0
"""How a run went, read from its log: training curves, and where the posterior stood when it was last trained."""

from collections.abc import Sequence
from math import isfinite, log
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.relevance import log_alpha_histogram
from hf_vdneuron.report import Curve, DropoutRateReport, SizesReport, TrainingReport
from hf_vdneuron.schedules import PhasePlan
from hf_vdneuron.tolerance import CHOSEN_SPEEDUP, CUT_SPEEDUP, CUT_VALUE, DENSE_VALUE, FINAL_VALUE, LIMIT
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["PosteriorCallback", "report_training"]

#: What is kept of the log: what training logs, and scores on the way.
CURVES = (
    "loss",
    "nll",
    "distillation",
    "kl",
    "kl_weight",
    "learning_rate",
    "irrelevant_weights",
    "heads",
    "neurons",
    "expected_speedup",
    "expected_removal",
    "eval_score",
)

#: Name of the histogram in the log.
DROPOUT_RATES = "dropout_rates"

#: Width of its bins in log α, and how many of them are below and above the threshold.
BIN_WIDTH, BINS_BELOW, BINS_ABOVE = 0.25, 56, 56


class PosteriorCallback(TrainerCallback):
    """Logs the dropout rates of the trained posterior, before the cut hides them.

    They are a part of the log, so that a run that is resumed after the cut still has them. As the cut is made by a
    callback too, this one has to come before it: give it to the trainer as `callbacks`.
    """

    def on_step_end(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Look at the posterior after its last step.

        Args:
            args: Arguments of the run.
            state: Where it stands, the step just done included.
            **run: Model and optimizer.
        """
        plan = args.phase_plan(state.max_steps)
        if plan.sparsify_steps and state.global_step == plan.recover_start:
            _log_dropout_rates(run["model"], args.dropout_rate_threshold, state)

    def on_train_end(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Look at the posterior of a run that was stopped while it was trained.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Model and optimizer.
        """
        plan = args.phase_plan(state.max_steps)
        if plan.sparsify_start < state.global_step < plan.recover_start:
            _log_dropout_rates(run["model"], args.dropout_rate_threshold, state)


def _log_dropout_rates(model: nn.Module, threshold: float, state: TrainerState) -> None:
    edges = log(threshold / (1 - threshold)) + BIN_WIDTH * torch.arange(-BINS_BELOW, BINS_ABOVE + 1).double()
    counts = {str(unit): count.tolist() for unit, count in log_alpha_histogram(model, edges).items()}
    histogram = {"log_alpha_edges": edges.tolist(), "counts": counts, "threshold": threshold}
    log_history = cast(list[dict[str, Any]], state.log_history)  # typed as numbers; saved as JSON
    log_history.append({"step": state.global_step, DROPOUT_RATES: histogram})


def report_training(
    log_history: Sequence[dict[str, Any]], phases: PhasePlan, tolerance: Tolerance | None = None
) -> TrainingReport:
    """Read how a run went from its log.

    Args:
        log_history: Log of the trainer's state.
        phases: Steps of each phase.
        tolerance: By which the run chose its size, if it did.

    Returns:
        Curves of what was logged, without values that are not finite, the dropout rates if they were, and the sizes
        that the tolerance had to choose from.
    """
    curves: dict[str, Curve] = {}
    dropout_rates = None
    for entry in log_history:
        for name in CURVES:
            if name in entry and isfinite(entry[name]):
                curve = curves.setdefault(name, Curve([], []))
                curve.steps.append(entry["step"])
                curve.values.append(entry[name])
        if DROPOUT_RATES in entry:
            dropout_rates = DropoutRateReport(**entry[DROPOUT_RATES])
    sizes = None if tolerance is None else _report_sizes(log_history, tolerance)
    return TrainingReport(phases, curves, dropout_rates, sizes)


def _report_sizes(log_history: Sequence[dict[str, Any]], tolerance: Tolerance) -> SizesReport | None:
    """Read the cuts that a tolerance had to choose from; None if the run never came so far."""
    ends = [index for index, entry in enumerate(log_history) if CHOSEN_SPEEDUP in entry]
    if not ends:
        return None
    chosen, limit, dense = (log_history[ends[-1]][name] for name in (CHOSEN_SPEEDUP, LIMIT, DENSE_VALUE))
    start = ends[-2] if len(ends) > 1 else 0
    cuts = [(entry[CUT_SPEEDUP], entry[CUT_VALUE]) for entry in log_history[start : ends[-1]] if CUT_SPEEDUP in entry]
    # JSON knows no infinity, which is the speed-up where nothing at all is left.
    cuts = sorted((speedup, value) for speedup, value in cuts if isfinite(speedup) and isfinite(value))
    speedups = [speedup for speedup, _ in cuts]
    final = next((entry[FINAL_VALUE] for entry in reversed(log_history) if FINAL_VALUE in entry), None)
    return SizesReport(
        metric=tolerance.metric,
        dense=dense,
        limit=limit,
        speedups=speedups,
        values=[value for _, value in cuts],
        chosen=speedups.index(chosen) if chosen in speedups else None,
        final=final,
    )
