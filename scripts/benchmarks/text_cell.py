# SPDX-License-Identifier: Apache-2.0
"""A task of GLUE, on which a pretrained encoder is fine-tuned."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.cell import EVAL_BATCH_SIZE, SCORING_ROWS, TRAIN_BATCH_SIZE, Cell
from hf_vdneuron.evaluation import encode, evaluate_glue
from hf_vdneuron.glue import GlueTask, glue_task, load_glue, take
from hf_vdneuron.latency import text_inputs
from hf_vdneuron.loading import load_model, load_tokenizer


__all__ = ["TextCell"]

#: Batch sizes and lengths: short texts and long ones.
LATENCY_GRID = ((1, 32), (1, 128), (32, 32), (32, 128))


class TextCell(Cell):
    """A task of GLUE with one seed. Arguments are those of `Cell`."""

    @cached_property
    def task(self) -> GlueTask:
        """What GLUE says about the task."""
        return glue_task(self.task_name, self.dataset_dir)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model to start from."""
        return load_tokenizer(self.settings.model)

    @cached_property
    def rows(self) -> dict[str, Dataset]:
        """Training rows of this seed, and the official validation sets."""
        splits = load_glue(self.task, self.dataset_dir)
        return {**splits, "train": take(splits["train"], self.settings.max_train_samples, seed=self.seed)}

    @property
    def length(self) -> int:
        """Tokens of a text that costs are computed for."""
        return self.settings.max_length

    @property
    def latency_grid(self) -> Sequence[tuple[int, int]]:
        """Batch sizes and lengths at which latency is measured."""
        return LATENCY_GRID

    def build(self) -> PreTrainedModel:
        """Load the pretrained model with a new head.

        Returns:
            The model.
        """
        return load_model(self.settings.model, self.task)[0]

    def training_data(self, model: PreTrainedModel) -> dict[str, Any]:
        """Encode the training rows.

        Args:
            model: Who is to be trained on them.

        Returns:
            Keyword arguments of a trainer.
        """
        return {
            "train_dataset": self._encode(self.rows["train"], model),
            "data_collator": DataCollatorWithPadding(self.tokenizer),
            "processing_class": self.tokenizer,
        }

    def training_arguments(self) -> dict[str, Any]:
        """Put texts of one length together: padding would double the cost of short ones.

        Returns:
            Keyword arguments of training arguments.
        """
        return {"train_sampling_strategy": "group_by_length"}

    def batches(self, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
        """Read training rows for a method that scores a model before it trains it.

        Args:
            model: The model, whose numbering of the classes the labels follow.

        Yields:
            Keyword arguments of its forward.
        """
        encoded = self._encode(take(self.rows["train"], SCORING_ROWS, seed=self.seed), model)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        by_length = encoded.select(sorted(range(len(encoded)), key=lengths.__getitem__))  # spares padding
        collator = DataCollatorWithPadding(self.tokenizer)
        for batch in DataLoader(by_length, batch_size=TRAIN_BATCH_SIZE, collate_fn=collator):
            yield {name: values.to(self.device) for name, values in batch.items()}

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Score a model on the official validation sets, in fp32.

        Args:
            model: The model.

        Returns:
            `score` and each metric of the task.
        """
        data = {split: self.rows[split] for split in self.task.validation_splits}
        result = evaluate_glue(
            model, self.tokenizer, self.task, data, max_length=self.length, batch_size=EVAL_BATCH_SIZE
        )
        return {name: value for name, value in result.items() if isinstance(value, float)}

    def score_command(self, folder: Path, output_dir: Path) -> list[str]:
        """Write how a user scores a saved model: with `run_glue.py`.

        Args:
            folder: Where it lies.
            output_dir: Where its results go.

        Returns:
            Name of the script, and its flags.
        """
        values = {
            "model_name_or_path": folder,
            "task_name": self.task.name,
            "dataset_dir": self.dataset_dir,
            "output_dir": output_dir,
            "max_length": self.length,
            "per_device_eval_batch_size": EVAL_BATCH_SIZE,
            "device": self.device,
        }
        return ["run_glue.py", *(f"--{name}={value}" for name, value in values.items() if value is not None)]

    def latency_inputs(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Make up texts without padding.

        Args:
            batch_size: Number of texts.
            length: Tokens of each.

        Returns:
            Keyword arguments of a forward.
        """
        return text_inputs(batch_size=batch_size, length=length, device=self.device)

    def save(self, model: PreTrainedModel, name: str) -> Path:
        """Save a model with its tokenizer.

        Args:
            model: The model.
            name: Name of its folder.

        Returns:
            The folder.
        """
        self.tokenizer.save_pretrained(self.folder / name)
        return super().save(model, name)

    def _encode(self, rows: Dataset, model: PreTrainedModel) -> Dataset:
        return encode(rows, self.task, self.tokenizer, model.config, max_length=self.length)
