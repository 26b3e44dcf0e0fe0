# SPDX-License-Identifier: Apache-2.0
"""A Trainer that takes a posterior in closed form, from gradients on some of its training examples."""

from collections.abc import Iterator, Mapping, Sized
from itertools import islice
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather, reduce
from torch import Tensor, nn
from torch.utils.data import Subset

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.curvature import Curvature, estimate_curvature
from hf_vdneuron.discovery import few_rows
from hf_vdneuron.evidence import closed_form_evidence
from hf_vdneuron.masks import read_mask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.reconstruction import correct_, corrections
from hf_vdneuron.recovering_trainer import RecoveringTrainer
from hf_vdneuron.sharding import dense_copy


__all__ = ["FittingTrainer"]

#: Training examples that the curvature of the loss is estimated on, and that what is left is fitted to.
NUM_EXAMPLES = 1024


class FittingTrainer(RecoveringTrainer):
    """Fits a posterior to the curvature of the loss, as the model is now, and weighs heads and neurons by it."""

    def closed_form_evidence(self) -> dict[str, Tensor]:
        """Measure the evidence for heads and neurons as the model is now. Every process has to call this.

        Returns:
            Path of each sub-layer -> nats, shape `(num_sides, num_units)`; 0 of what the masks have ended.

        Raises:
            ValueError: If there is no training example.
        """
        mask = read_mask(self.model)
        if not any(keep.all(0).any() for keep in mask.keep.values()):
            return {path: torch.zeros(keep.shape) for path, keep in mask.keep.items()}
        # Nothing is computed for what is gone.
        posterior = patch_model_(prune_model_(dense_copy(self.model), mask), self.vd_config)
        own = estimate_curvature(posterior, self._examples(), loss=self._loss)
        # Each process has seen a share of the examples.
        curvature = Curvature(reduce(dict(own.weights), "mean"), gather(dict(own.scores)))
        evidence = closed_form_evidence(posterior, curvature)
        for sublayer in find_sublayers(self.model):
            left = evidence[sublayer.path]
            everywhere = left.new_zeros(len(left), sublayer.num_units)
            evidence[sublayer.path] = everywhere.index_copy(1, mask.units_left(sublayer), left)
        return evidence

    def make_up_for_(self, dense: nn.Module) -> None:
        """Let what the masks have left of the model do what it did before, by least squares, in place.

        Every process has to call this.

        Args:
            dense: The model before that, without variational layers.
        """
        found = corrections(self.model, dense, list(self._examples()), forward=self._loss, pool=self._pool)
        # To the last bit.
        correct_(self.model, broadcast_object_list([found])[0])

    def _pool(self, values: Tensor) -> Tensor:
        """Add up what the processes have found in their shares of the examples."""
        return cast(Tensor, reduce(values, "sum"))

    def example_inputs(self) -> dict[str, Any]:
        """Read a few training examples, the same on every process, so that all find the same in a model.

        Returns:
            Keyword arguments of a forward pass.
        """
        (inputs,) = broadcast_object_list([few_rows(next(self._examples()))])
        return cast(dict[str, Any], self._prepare_inputs(inputs))

    def _examples(self) -> Iterator[Mapping[str, Any]]:
        """Read the same training examples each time, drawn at random where they can be."""
        data = cast(Any, self.train_dataset)
        if isinstance(data, Sized):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.args.seed))
            data = Subset(cast(Any, data), order[:NUM_EXAMPLES].tolist())
        else:
            data = list(islice(data, NUM_EXAMPLES))
        # The Trainer keeps a loader whose workers live on, and would evaluate on its rows.
        persistent, self.args.dataloader_persistent_workers = self.args.dataloader_persistent_workers, False
        try:
            loader = self.get_eval_dataloader(data)
        finally:
            self.args.dataloader_persistent_workers = persistent
        for batch in loader:
            yield cast(dict[str, Any], self._prepare_inputs(batch))

    def _loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Compute the loss that the run is about, without a teacher."""
        return cast(Tensor, self.compute_loss(model, dict(batch)))
