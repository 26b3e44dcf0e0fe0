# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose steps under masks cost what those of the pruned model do."""

from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.pruned_twin import PrunedTwin
from hf_vdneuron.resumable_trainer import ResumableTrainer


__all__ = ["RecoveringTrainer"]


class RecoveringTrainer(ResumableTrainer):
    """Trains a masked model through its pruned twin, wherever one process holds the whole model.

    Other steps are transformers' own: those of a posterior that is trained, and those of several processes.
    """

    _twin: PrunedTwin | None = None
    _masks: tuple[tuple[int, int], ...] = ()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of one micro-batch.

        Args:
            model: The model, possibly wrapped. Its `compute_loss` is handed the twin instead, where there is one.
            inputs: The micro-batch.
            num_items_in_batch: Number of loss terms in all micro-batches of the step.

        Returns:
            The loss, a scalar.
        """
        twin = self._current_twin() if self._is_plain(model) else None
        if twin is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        twin.take_over_()
        loss = super().training_step(twin.model, inputs, num_items_in_batch)
        twin.hand_back_()
        return loss

    def _is_plain(self, model: nn.Module) -> bool:
        is_whole = model is self.model and self.accelerator.distributed_type is DistributedType.NO
        return is_whole and not any(layer.noise or layer.collect_kl for layer in variational_layers(model).values())

    def _current_twin(self) -> PrunedTwin | None:
        """Look up the twin, which is made anew when the masks have changed since."""
        if self._masks != _state_of_masks(self.model):
            self._twin = PrunedTwin.of_(self.model)
            self._masks = _state_of_masks(self.model)
        return self._twin


def _state_of_masks(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Tell two states of the masks apart without looking at them, which on an accelerator would wait for it."""
    masks = [mask for layer in variational_layers(model).values() for mask in (layer.keep_out, layer.keep_in)]
    return tuple((id(mask), mask._version) for mask in masks if mask is not None)
