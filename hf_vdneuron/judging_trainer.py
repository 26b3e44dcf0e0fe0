# SPDX-License-Identifier: Apache-2.0
"""A Trainer that scores its model where a run turns, and every size of it that a tolerance may choose."""

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from torch.utils.data import Dataset

from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.resumable_trainer import ResumableTrainer
from hf_vdneuron.tolerance import (
    CUT_SPEEDUP,
    CUT_VALUE,
    DENSE_VALUE,
    ToleranceCallback,
    last_logged,
    smallest_cut,
)
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["JudgingTrainer"]

#: Data of an evaluation: one set, several by name, or none.
EvalData = Dataset[Any] | dict[str, Dataset[Any]] | None


class JudgingTrainer(ResumableTrainer):
    """Scores the dense model and the cut one, and chooses what is cut.

    Attributes:
        max_length: Tokens of a sequence for which a speed-up is counted.
    """

    args: VDTrainingArguments
    max_length: int

    @property
    def choice_dataset(self) -> EvalData:
        """Data on which a tolerance is judged: the evaluation set."""
        return self.eval_dataset

    def milestone(self, name: str) -> float | None:
        """Look up a metric of the dense model (`dense_...`) or right after the cut (`cut_...`) in the log.

        Args:
            name: Name of the metric, such as `dense_score`.

        Returns:
            Its value; None if it was not measured.
        """
        return last_logged(self.state, name)

    def _watch_tolerance_(self) -> None:
        """Judge the run where it has a tolerance; to be called when all else that cuts is in place."""
        if self.args.tolerance is None:
            return
        if self.choice_dataset is None:
            raise ValueError(
                f"`{self.args.goal}` is asked for, and there is nothing to judge by: pass an `eval_dataset`."
            )
        self.add_callback(ToleranceCallback(self._judge, lambda name, value: self.log({name: value})))

    def _choose(self) -> RelevanceMask:
        """Decide what a trained posterior keeps, and log every size that a tolerance has looked at."""
        tolerance, dense = self.args.tolerance, self.milestone(DENSE_VALUE)
        if tolerance is None or dense is None:
            return self._steering.mask(self.model, self.args)
        mask, cuts = smallest_cut(self.model, tolerance, dense, self._judge, length=self.max_length)
        for cut in cuts:
            self.log({CUT_SPEEDUP: cut.speedup, CUT_VALUE: cut.value})
        return mask

    def _score(self, milestone: str) -> None:
        """Evaluate at a boundary, and log the metrics under its name."""
        for _, metrics in self._evaluate_all(self.eval_dataset, milestone):
            self.log(metrics)

    def _judge(self) -> float:
        """Evaluate the model by the metric of the tolerance, mean over sets."""
        name = "" if self.args.tolerance is None else self.args.tolerance.metric
        values = []
        for prefix, metrics in self._evaluate_all(self.choice_dataset, "size"):
            known = {key.removeprefix(f"{prefix}_"): value for key, value in metrics.items()}
            if name not in known:
                raise ValueError(
                    f"The evaluation gives no `{name}`, which the tolerance is about: expected one of "
                    f"{', '.join(sorted(known))} as `metric_for_best_model`, or a `compute_metrics` that gives it."
                )
            values.append(known[name])
        return fmean(values)

    def _evaluate_all(self, data: EvalData, prefix: str) -> Iterator[tuple[str, dict[str, float]]]:
        """Evaluate on each set, as `(what the names of the metrics begin with, metrics)`."""
        for name, dataset in data.items() if isinstance(data, dict) else [(None, data)]:
            if dataset is None:
                continue
            loader = self.get_eval_dataloader(name if name and data is self.eval_dataset else dataset)
            own = prefix if name is None else f"{prefix}_{name}"
            yield own, self.evaluation_loop(loader, own, metric_key_prefix=own).metrics or {}
