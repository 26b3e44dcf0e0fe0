# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose checkpoints hold all that a run knew, and are whole or not there."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_vdneuron.checkpoints import (
    last_checkpoint,
    load_steering,
    native_names,
    open_checkpoint,
    require_complete,
    save_steering,
)
from hf_vdneuron.config import VDConfig
from hf_vdneuron.distillation import Teacher
from hf_vdneuron.hub_trainer import HubTrainer
from hf_vdneuron.keepsake import Keepsake
from hf_vdneuron.sharding import is_sharded
from hf_vdneuron.steering import Steering


__all__ = ["ResumableTrainer", "Trial"]

#: A trial of whichever library searches for hyperparameters.
Trial = object


class ResumableTrainer(HubTrainer):
    """Saves teacher, steering and keepsake with every checkpoint, and how the model was patched with every model.

    Attributes:
        vd_config: How the trainer patched its model; None if it came patched.
    """

    model: PreTrainedModel
    vd_config: VDConfig | None
    _teacher: Teacher
    _steering: Steering
    _keepsake: Keepsake

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, trial: Trial | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Fine-tune, sparsify and recover.

        Args:
            resume_from_checkpoint: Folder of a checkpoint to go on from, or True for the last complete one in
                `output_dir`. One that was being saved when its run was killed is never taken for whole.
            trial: Trial of a hyperparameter search.
            **kwargs: Whatever else `Trainer.train` takes.

        Returns:
            What `Trainer.train` does: steps, loss and times.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
        if resume_from_checkpoint:
            require_complete(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, whole also in a run that shards models, where `Trainer` would save nothing.

        Every process has to call this. What lies in a checkpoint beside its own pieces is left to the Trainer.

        Args:
            output_dir: Folder; by default that of the arguments.
            _internal_call: Whether the Trainer itself asks, which pushes nothing then.
        """
        is_checkpoint = _internal_call and output_dir is not None
        if not self.is_fsdp_enabled or (is_sharded(self.model) and is_checkpoint):
            super().save_model(output_dir, _internal_call)
            return
        state_dict = self.accelerator.get_state_dict(self.model) if is_sharded(self.model) else None
        if self.args.should_save:
            self._save(output_dir, state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # ---- Private methods of the Trainer, watched by tests/test_trainer.py ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save under the names that a resumed run loads by (huggingface/transformers#48805)."""
        with native_names(self.model):
            super()._save(output_dir, state_dict)
        if self.vd_config is not None and self.args.should_save:
            self.vd_config.save(str(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Trial | None) -> None:
        """Put what a resumed run needs beside the weights, and first: a checkpoint cut short then cannot lack it."""
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoint = open_checkpoint(Path(self._get_output_dir(trial)) / name)
            self._teacher.save(checkpoint)
            self._keepsake.save(checkpoint)
            save_steering(self._steering.state(), checkpoint)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Take back what the run had beside its weights."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._teacher.load_(resume_from_checkpoint, self.model)
        self._keepsake.load_(resume_from_checkpoint)
        self._steering.load_(load_steering(resume_from_checkpoint))
