# SPDX-License-Identifier: Apache-2.0
"""A Trainer that scores its model where a run turns, and every size of it that a tolerance may choose."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hf_vdneuron.fitting_trainer import FittingTrainer
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.precision import leave_mixed_precision_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import relevance_mask, unit_relevance
from hf_vdneuron.sharding import dense_copy
from hf_vdneuron.tolerance import DENSE_VALUE, ToleranceCallback, last_logged
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["JudgingTrainer"]

#: Folder for the sizes that a tolerance has found good enough.
SIZES_FOLDER = "sizes"

#: Data of an evaluation: one set, several by name, or none.
EvalData = Dataset[Any] | dict[str, Dataset[Any]] | None


class JudgingTrainer(FittingTrainer):
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
        if self.choice_dataset is None or self.choice_dataset == {}:
            raise ValueError(
                f"`{self.args.goal}` is asked for, and there is nothing to judge by: pass an `eval_dataset`."
            )
        self.add_callback(
            ToleranceCallback(
                self._keepsake,
                self.max_length,
                judge=self._judge,
                dense=self._dense_value,
                relevance=self._relevance,
                mask=self._mask_,
                log=self.log,
                on_size=self._save_size,
            )
        )

    def _save_size(self, speedup: float) -> None:
        """Save a size that is good enough as the model that it would be, if it was asked for."""
        if not (self.args.save_sizes and self.args.should_save):
            return
        folder = Path(str(self.args.output_dir), SIZES_FOLDER, f"{speedup:.2f}x")
        copy = leave_mixed_precision_(deepcopy(self.model))
        cast(PreTrainedModel, prune_model_(copy)).save_pretrained(folder)
        if self.processing_class is not None:
            cast(Any, self.processing_class).save_pretrained(folder)

    def _dense_value(self) -> float | None:
        """Look up what the dense model was judged by the metric of the tolerance, None if it was not."""
        metric = "" if self.args.tolerance is None else self.args.tolerance.metric
        judged = self.milestone(f"{DENSE_VALUE}_{metric}")
        # A run without a tolerance has scored it too, if on the same rows.
        is_same = self.choice_dataset is self.eval_dataset and not isinstance(self.eval_dataset, dict)
        return self.milestone(f"dense_{metric}") if judged is None and is_same else judged

    def _relevance(self, is_first: bool = True) -> dict[str, Tensor]:
        """Measure what units are worth, by the posterior that the run has trained or in closed form."""
        relevance = unit_relevance(self.model) if self._is_trained(is_first) else self.closed_form_evidence()
        # Every process has to remove the same.
        return cast(dict[str, Tensor], broadcast_object_list([relevance])[0])

    def _is_trained(self, is_first: bool) -> bool:
        """Tell whether there is a trained posterior: behind the first cut, the weights move on without it."""
        return self.plan.sparsify_steps > 0 and is_first

    def _choose(self) -> RelevanceMask:
        """Decide what is kept of what is left, by a target or the rule."""
        present = read_mask(self.model)
        if self.args.target is None:
            return relevance_mask(self.model, self.args.dropout_rate_threshold) & present
        return self._steering.mask(self._relevance(), self.args, present=present)

    def _cut_(self) -> None:
        """Mask what is not kept. In closed form, that is done in stages, behind which what is left makes up for it."""
        if self.args.target is None or self.plan.sparsify_steps > 0:
            self._mask_(self._choose())
            return
        dense = dense_copy(self.model)
        for budget in self._steering.stages(self.args.alignment):
            present = read_mask(self.model)
            mask = self._steering.mask(self._relevance(), self.args, present=present, budget=budget)
            self._mask_(mask, dense=dense)

    def _mask_(self, mask: RelevanceMask, is_first: bool = True, *, dense: nn.Module | None = None) -> None:
        """Mask the model; in closed form, what is left makes up for it, to do as the dense one did or it itself."""
        if self._is_trained(is_first):
            mask_model_(self.model, mask)
        else:
            dense = dense_copy(self.model) if dense is None else dense
            mask_model_(self.model, mask)
            self.make_up_for_(dense)

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
        # Every process has to choose the same, whatever a metric that is made in each of them says.
        return cast(float, broadcast_object_list([fmean(values)])[0])

    def _evaluate_all(self, data: EvalData, prefix: str) -> Iterator[tuple[str, dict[str, float]]]:
        """Evaluate on each set, as `(what the names of the metrics begin with, metrics)`."""
        for name, dataset in data.items() if isinstance(data, dict) else [(None, data)]:
            if dataset is None:
                continue
            loader = self.get_eval_dataloader(name if name and data is self.eval_dataset else dataset)
            own = prefix if name is None else f"{prefix}_{name}"
            # As in `evaluate`: predictions that nobody looks at are not kept.
            only_loss = True if self.compute_metrics is None else None
            yield own, self.evaluation_loop(loader, own, only_loss, metric_key_prefix=own).metrics or {}
