# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10, on which a small model is trained from scratch."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel

from benchmarks.cell import EVAL_BATCH_SIZE, SCORING_ROWS, TRAIN_BATCH_SIZE, Cell
from benchmarks.cifar10 import NUM_CLASSES, Images, count_images, load_images
from benchmarks.classifiers import Recipe, build_model
from benchmarks.image_models import MODELS, collate, image_accuracy, pair


__all__ = ["CIFAR10", "ImageCell"]

#: Name of the task.
CIFAR10 = "cifar10"

LATENCY_BATCH_SIZES = (1, 32)


class ImageCell(Cell):
    """CIFAR-10 with one seed. Arguments are those of `Cell`; the model is a name in `MODELS`.

    Seeds differ in where the model starts, in the order of the images and in how they are shifted; the images that are
    trained on are the same ones.
    """

    @property
    def recipe(self) -> Recipe:
        """How the model is built."""
        return MODELS[self.settings.model]

    @property
    def data_dir(self) -> Path:
        """Folder of the images.

        Raises:
            ValueError: If none is given.
        """
        if self.dataset_dir is None:
            raise ValueError(f"{CIFAR10} needs `dataset_dir`, a folder with {CIFAR10}/train.parquet and test.parquet")
        return Path(self.dataset_dir) / CIFAR10

    @cached_property
    def images(self) -> Images:
        """Training images, the same for all seeds, and all test images."""
        num_examples = min(self.settings.max_train_samples, count_images(self.data_dir / "train.parquet"))
        return load_images(self.data_dir, num_examples, validate=False, device=torch.device("cpu"))

    @property
    def length(self) -> int:
        """Positions of an image that the first blocks see."""
        return self.recipe.positions

    @property
    def latency_grid(self) -> Sequence[tuple[int, int]]:
        """Batch sizes at which latency is measured, at the one length that there is."""
        return [(batch_size, self.length) for batch_size in LATENCY_BATCH_SIZES]

    def build(self) -> PreTrainedModel:
        """Build the model at random.

        Returns:
            The model.
        """
        return build_model(AutoModelForImageClassification.from_config, self.settings.model, self.recipe, NUM_CLASSES)

    def training_data(self, model: PreTrainedModel) -> dict[str, Any]:
        """Pair the training images with their labels; each batch shifts and mirrors its own.

        Args:
            model: Not used.

        Returns:
            Keyword arguments of a trainer.
        """
        rows = pair(self.images.train, self.images.train_labels)
        return {"train_dataset": rows, "data_collator": partial(collate, is_augmented=True)}

    def training_arguments(self) -> dict[str, Any]:
        """Keep the rows as they are: what a collator reads is no column of the model's.

        Returns:
            Keyword arguments of training arguments.
        """
        return {"remove_unused_columns": False}

    def batches(self, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
        """Read training images, as they are, for a method that scores a model before it trains it.

        Args:
            model: Not used.

        Yields:
            Keyword arguments of its forward.
        """
        rows = self.images.train[:SCORING_ROWS], self.images.train_labels[:SCORING_ROWS]
        for images, labels in zip(*(part.split(TRAIN_BATCH_SIZE) for part in rows), strict=True):
            yield {"pixel_values": images.to(self.device), "labels": labels.to(self.device)}

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Score a model on the test images, in fp32.

        Args:
            model: The model.

        Returns:
            `score` and `accuracy`, the same.
        """
        share = image_accuracy(model, self.images.held_out, self.images.held_out_labels, batch_size=EVAL_BATCH_SIZE)
        return {"score": share, "accuracy": share}

    def score_command(self, folder: Path, output_dir: Path) -> list[str]:
        """Write how a user scores a saved model: with `score_images.py`.

        Args:
            folder: Where it lies.
            output_dir: Where its results go.

        Returns:
            Name of the script, and its flags.
        """
        values = {
            "model_name_or_path": folder,
            "data_dir": self.data_dir,
            "output_dir": output_dir,
            "num_examples": len(self.images.train),
            "per_device_eval_batch_size": EVAL_BATCH_SIZE,
            "device": self.device,
        }
        return ["score_images.py", *(f"--{name}={value}" for name, value in values.items())]

    def latency_inputs(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Take test images.

        Args:
            batch_size: Number of images.
            length: Not used: images are of one size.

        Returns:
            Keyword arguments of a forward.
        """
        return {"pixel_values": self.images.held_out[:batch_size].to(self.device)}
