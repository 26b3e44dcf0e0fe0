# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose steps of recovery, under masks, cost what those of the pruned model do."""

from typing import Any, cast

from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.pruned_twin import PrunedTwin
from hf_vdneuron.resumable_trainer import ResumableTrainer
from hf_vdneuron.schedules import Phase, PhasePlan
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["RecoveringTrainer"]


class RecoveringTrainer(ResumableTrainer):
    """Trains a masked model through its pruned twin in recovery, wherever every process holds the whole model."""

    args: VDTrainingArguments
    _twin: PrunedTwin | None = None
    _runner: nn.Module | None = None  # the twin's model, wrapped as the model itself is
    _masks: tuple[tuple[int, int], ...] = ()

    @property
    def plan(self) -> PhasePlan:
        """Optimizer steps of each phase; known once `train()` has counted its steps."""
        return self.args.phase_plan(self.state.max_steps)

    @property
    def phase(self) -> Phase:
        """Phase of the step that comes next."""
        return self.plan.phase_at(self.state.global_step)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of one micro-batch.

        Args:
            model: The model, possibly wrapped. `compute_loss` is handed the twin instead, where there is one.
            inputs: The micro-batch.
            num_items_in_batch: Number of loss terms in all micro-batches of the step.

        Returns:
            The loss, a scalar.
        """
        twin = self._current_twin(model) if self.phase is Phase.RECOVER else None
        if twin is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        twin.take_over_()
        loss = super().training_step(cast(nn.Module, self._runner), inputs, num_items_in_batch)
        twin.hand_back_()
        return loss

    def _current_twin(self, model: nn.Module) -> PrunedTwin | None:
        """Look up the twin, which is made anew when the masks have changed since."""
        if self._masks != _state_of_masks(self.model):
            is_plain = model is self.model and self.accelerator.distributed_type is DistributedType.NO
            has_twin = is_plain or isinstance(model, DistributedDataParallel)
            self._twin = PrunedTwin.of_(self.model) if has_twin else None
            self._runner = None if self._twin is None else _wrapped_alike(self._twin.model, model)
            self._masks = _state_of_masks(self.model)
        return self._twin

    def _forget_twin_(self) -> None:
        """Let go of the twin's memory."""
        self._twin, self._runner, self._masks = None, None, ()


def _wrapped_alike(twin: nn.Module, model: nn.Module) -> nn.Module:
    """Put a twin under data parallelism if its model is."""
    if not isinstance(model, DistributedDataParallel):
        return twin
    # Both hold the parameters that they share, whose gradients only the one averages that has just run forward.
    return DistributedDataParallel(
        twin,
        device_ids=model.device_ids,
        find_unused_parameters=model.find_unused_parameters,
        gradient_as_bucket_view=model.gradient_as_bucket_view,
    )


def _state_of_masks(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Tell two states of the masks apart without looking at them, which on an accelerator would wait for it."""
    masks = [mask for layer in variational_layers(model).values() for mask in (layer.keep_out, layer.keep_in)]
    return tuple((id(mask), mask._version) for mask in masks if mask is not None)
