# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose steps of recovery, under masks, cost what those of the pruned model do."""

from typing import Any, NamedTuple

from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import TrainOutput

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.pruned_twin import PrunedTwin
from hf_vdneuron.resumable_trainer import ResumableTrainer, Trial
from hf_vdneuron.schedules import Phase, PhasePlan
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["RecoveringTrainer"]

#: Tells two states of a model's masks apart.
_Fingerprint = tuple[tuple[int, int], ...]


class _Prepared(NamedTuple):
    """A twin for one state of the masks, if there is one for it, and its model as it is run."""

    masks: _Fingerprint
    twin: PrunedTwin | None
    model: nn.Module | None


class RecoveringTrainer(ResumableTrainer):
    """Trains a masked model through its pruned twin in recovery, wherever every process holds the whole model."""

    args: VDTrainingArguments
    _prepared: _Prepared | None = None

    @property
    def plan(self) -> PhasePlan:
        """Optimizer steps of each phase; known once `train()` has counted its steps."""
        return self.args.phase_plan(self.state.max_steps)

    @property
    def phase(self) -> Phase:
        """Phase of the step that comes next."""
        return self.plan.phase_at(self.state.global_step)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, trial: Trial | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Fine-tune, sparsify and recover, and let go of the twin in the end.

        Args:
            resume_from_checkpoint: Folder of a checkpoint to go on from, or True for the last complete one in
                `output_dir`.
            trial: Trial of a hyperparameter search.
            **kwargs: Whatever else `Trainer.train` takes.

        Returns:
            What `Trainer.train` does: steps, loss and times.
        """
        try:
            return super().train(resume_from_checkpoint, trial, **kwargs)
        finally:
            self._prepared = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of one micro-batch.

        In recovery `compute_loss` is handed the twin, whose parameters are smaller and whose hooks and settings are
        copies from right after the cut. `recover_pruned=False` hands it the model itself.

        Args:
            model: The model, possibly wrapped.
            inputs: The micro-batch.
            num_items_in_batch: Number of loss terms in all micro-batches of the step.

        Returns:
            The loss, a scalar.
        """
        _, twin, small = self._prepare_twin(model)
        if twin is None or small is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()  # as whoever looks at it in a step expects
        twin.take_over_()
        loss = super().training_step(small, inputs, num_items_in_batch)
        twin.hand_back_()
        return loss

    def _prepare_twin(self, model: nn.Module) -> _Prepared:
        """Look up the twin, or make it anew where the masks have changed since."""
        # A finished run that is resumed is asked for gradients once more, which it drops.
        recovers = self.phase is Phase.RECOVER and self.state.global_step < self.state.max_steps
        if not (recovers and self.args.recover_pruned):
            return _Prepared((), None, None)
        if self._prepared is None or self._prepared.masks != _fingerprint(self.model):
            is_alone = model is self.model and self.accelerator.distributed_type is DistributedType.NO
            can_be_small = is_alone or isinstance(model, DistributedDataParallel)
            twin = PrunedTwin.of_(self.model) if can_be_small else None
            small = None if twin is None else _wrapped_alike(twin.model, model)
            self._prepared = _Prepared(_fingerprint(self.model), twin, small)
        return self._prepared


def _wrapped_alike(twin: nn.Module, model: nn.Module) -> nn.Module:
    """Put a twin under data parallelism if its model is."""
    if not isinstance(model, DistributedDataParallel):
        return twin
    # Both hold the parameters that they share, whose gradients only the one averages that has just run forward, in
    # every micro-batch, as gradients are handed back behind each.
    return DistributedDataParallel(
        twin,
        device_ids=model.device_ids,
        process_group=model.process_group,
        find_unused_parameters=model.find_unused_parameters,
        gradient_as_bucket_view=model.gradient_as_bucket_view,
    )


def _fingerprint(model: nn.Module) -> _Fingerprint:
    """Tell states of the masks apart without looking at them, which on an accelerator would wait for it."""
    masks = [mask for layer in variational_layers(model).values() for mask in (layer.keep_out, layer.keep_in)]
    return tuple((id(mask), mask._version) for mask in masks if mask is not None)
