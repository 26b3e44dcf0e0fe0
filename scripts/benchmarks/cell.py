# SPDX-License-Identifier: Apache-2.0
"""One task and one seed: what all methods share, from the dense checkpoint to the trainer."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

from benchmarks.gates import gated
from benchmarks.learned_gates import LearnedGates
from hf_vdneuron.config import VDConfig
from hf_vdneuron.history import report_training
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.schedules import Phase
from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = [
    "DENSE",
    "EVAL_BATCH_SIZE",
    "SCORING_ROWS",
    "TRAIN_BATCH_SIZE",
    "Cell",
    "Courses",
    "Settings",
    "cell_folder",
]

#: Name of the method that leaves the dense checkpoint alone.
DENSE = "dense"

TRAIN_BATCH_SIZE, EVAL_BATCH_SIZE = 32, 64
WARMUP_SHARE = 0.1
#: Training rows that a score looks at (Kwon 2022, section 5.1).
SCORING_ROWS = 2048

#: Digits that tell dense checkpoints apart, beside their steps.
NUM_DIGITS = 8

#: So that a course of 400 steps has 40 points.
LOGGING_STEPS = 10

#: What is kept of how a posterior was trained: name -> steps and values.
Courses = dict[str, dict[str, list[float]]]
COURSES = ("nll", "kl_weight", "expected_removal", "expected_speedup")


@dataclass(frozen=True)
class Settings:
    """What a run depends on beyond task, seed and method.

    Args:
        model: Model to start from, a folder or a name on the Hub.
        max_train_samples: Training rows at most, drawn by seed.
        max_length: Tokens to which texts are truncated.
        dense_steps: Optimizer steps of the dense checkpoint.
        sparsify_steps: Steps of our sparsification.
        recover_steps: Steps of our recovery; every other method recovers for both together.
        dense_learning_rate: Learning rate of the dense checkpoint.
        learning_rate: Learning rate of everything after it.
        bf16: Whether training is in mixed precision; scores are in fp32 always.
        distillation: Whether the dense checkpoint teaches what is trained after it.
    """

    model: str
    max_train_samples: int
    max_length: int
    dense_steps: int
    sparsify_steps: int
    recover_steps: int
    dense_learning_rate: float
    learning_rate: float
    bf16: bool
    distillation: bool

    @property
    def budget(self) -> int:
        """Optimizer steps after the dense checkpoint, the same for all methods."""
        return self.sparsify_steps + self.recover_steps

    @property
    def dense_name(self) -> str:
        """Name of the dense checkpoint, another one for other settings.

        Neither the data nor the model is part of it: it lies in the folder of a cell, and a folder of work is for one
        copy of the data and for models of different names.
        """
        values = [self.max_train_samples, self.max_length, self.dense_learning_rate, self.bf16]
        digest = sha256(json.dumps(values).encode()).hexdigest()[:NUM_DIGITS]
        return f"{DENSE}-{self.dense_steps}-steps-{digest}"


def cell_folder(work_dir: Path, model: str, task_name: str, seed: int) -> Path:
    """Name the folder of a cell.

    Args:
        work_dir: Folder for the models of all cells.
        model: Model to start from.
        task_name: Name of the task.
        seed: Seed of the cell.

    Returns:
        Path of a folder that may not exist yet.
    """
    return work_dir / Path(model).name / f"{task_name}-{seed}"


class Cell(ABC):
    """What the methods share on one task with one seed.

    Args:
        settings: Settings of the run.
        task_name: Name of the task.
        seed: Seed of the training rows, their order and all noise.
        dataset_dir: Folder with the task's files, or None for the Hub.
        work_dir: Folder for the models of all cells.
        use_cpu: Whether to stay on the CPU.
    """

    def __init__(
        self, settings: Settings, task_name: str, seed: int, *, dataset_dir: str | None, work_dir: Path, use_cpu: bool
    ) -> None:
        self.settings = settings
        self.task_name = task_name
        self.seed = seed
        self.dataset_dir = dataset_dir
        self.folder = cell_folder(work_dir, settings.model, task_name, seed)
        self.use_cpu = use_cpu

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions of an example that costs are computed for."""

    @property
    @abstractmethod
    def latency_grid(self) -> Sequence[tuple[int, int]]:
        """Batch sizes and lengths at which latency is measured: one request and many."""

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """Load what the dense checkpoint is trained from.

        Returns:
            The model.
        """

    @abstractmethod
    def training_data(self, model: PreTrainedModel) -> dict[str, Any]:
        """Prepare the training rows.

        Args:
            model: Who is to be trained on them.

        Returns:
            Keyword arguments of a trainer: its data set, and what makes batches of it.
        """

    @abstractmethod
    def training_arguments(self) -> dict[str, Any]:
        """Tell what this kind of data asks of a trainer.

        Returns:
            Keyword arguments of its training arguments.
        """

    @abstractmethod
    def batches(self, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
        """Read training rows for a method that scores a model before it trains it.

        Args:
            model: The model, whose numbering of the classes the labels follow.

        Yields:
            Keyword arguments of its forward.
        """

    @abstractmethod
    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Score a model on rows that nothing was trained on or chosen by, in fp32.

        Args:
            model: The model.

        Returns:
            `score` and each metric of the task.
        """

    @abstractmethod
    def score_command(self, folder: Path, output_dir: Path) -> list[str]:
        """Write how a user scores a saved model.

        Args:
            folder: Where it lies.
            output_dir: Where its results go.

        Returns:
            Name of a script, and its flags.
        """

    @abstractmethod
    def latency_inputs(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Make up inputs for a forward that is timed.

        Args:
            batch_size: Number of examples.
            length: Positions of each.

        Returns:
            Keyword arguments of a forward.
        """

    @cached_property
    def device(self) -> torch.device:
        """Where models are trained and scored."""
        return self._arguments(Phase.RECOVER, 1).device

    def dense(self) -> PreTrainedModel:
        """Load the dense checkpoint, training it the first time.

        Returns:
            The model.
        """
        name = self.settings.dense_name
        if not (self.folder / name / "config.json").exists():
            set_seed(self.seed)
            model = self.build()
            self.train(model, Phase.FINETUNE, self.settings.dense_steps).prune()
            # Whole or not at all, as it is not made again.
            draft = self.save(model, f"{name}.draft")
            shutil.rmtree(self.folder / name, ignore_errors=True)
            draft.rename(self.folder / name)
        return self.load(name)

    def teacher(self) -> PreTrainedModel | None:
        """Load who teaches all that is trained after the dense checkpoint.

        Returns:
            The dense checkpoint, or None without distillation.
        """
        return self.dense() if self.settings.distillation else None

    def sparsify(
        self, model: PreTrainedModel, vd_config: VDConfig, target_speedup: float | None
    ) -> tuple[PreTrainedModel, Courses]:
        """Train the posterior, and remove what it says can go.

        Args:
            model: The dense model.
            vd_config: How it is made variational.
            target_speedup: Speed-up to ask for; with None the dropout-rate rule decides.

        Returns:
            The same model, smaller, and how the posterior was trained.
        """
        steps = self.settings.sparsify_steps
        trainer = self.train(
            model, Phase.SPARSIFY, steps, vd_config=vd_config, teacher=self.teacher(), target_speedup=target_speedup
        )
        curves = report_training(trainer.state.log_history, trainer.plan).curves
        return trainer.prune(), {name: asdict(curves[name]) for name in COURSES if name in curves}

    def learn(self, model: PreTrainedModel, gates: LearnedGates) -> RelevanceMask:
        """Train a model behind gates that learn what to keep.

        Args:
            model: The dense model.
            gates: Its gates.

        Returns:
            What they keep.
        """
        with gated(model, gates.values):
            steps = self.settings.sparsify_steps
            self.train(model, Phase.RECOVER, steps, teacher=self.teacher(), callbacks=[gates]).prune()
        return gates.choose_()

    def recover(self, model: PreTrainedModel, steps: int) -> PreTrainedModel:
        """Train what is left.

        Args:
            model: A pruned model.
            steps: Optimizer steps.

        Returns:
            The same model.
        """
        return self.train(model, Phase.RECOVER, steps, teacher=self.teacher()).prune()

    def save(self, model: PreTrainedModel, name: str) -> Path:
        """Save a model with what it needs.

        Args:
            model: The model.
            name: Name of its folder.

        Returns:
            The folder.
        """
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def load(self, name: str) -> PreTrainedModel:
        """Load a saved model.

        Args:
            name: Name of its folder.

        Returns:
            The model, in fp32.
        """
        return from_pretrained(self.folder / name).to(self.device)  # type: ignore[arg-type]  # transformers wraps `to`

    def train(
        self,
        model: PreTrainedModel,
        phase: Phase,
        steps: int,
        *,
        vd_config: VDConfig | None = None,
        teacher: PreTrainedModel | None = None,
        target_speedup: float | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> VDTrainer:
        """Train in one phase alone.

        Args:
            model: The model; it is patched.
            phase: The phase.
            steps: Optimizer steps.
            vd_config: How the model is patched.
            teacher: Model to learn from.
            target_speedup: Speed-up to ask for.
            callbacks: Who else looks on.

        Returns:
            The trainer, whose `prune` takes the variational layers out again.
        """
        trainer = VDTrainer(
            model=model,
            args=self._arguments(phase, steps, target_speedup=target_speedup),
            vd_config=vd_config,
            teacher=teacher,
            max_length=self.length,
            callbacks=[*callbacks],
            **self.training_data(model),
        )
        trainer.train()
        return trainer

    def _arguments(self, phase: Phase, steps: int, **more: Any) -> VDTrainingArguments:
        rates = {Phase.FINETUNE: self.settings.dense_learning_rate}
        fractions: dict[str, Any] = {f"{part}_fraction": float(part is phase) for part in Phase}
        if not self.settings.distillation:
            # Without a teacher given, the model as it was would be one.
            more["distillation_weight"] = 0.0
        return VDTrainingArguments(
            output_dir=str(self.folder / "trainer"),
            max_steps=steps,
            learning_rate=rates.get(phase, self.settings.learning_rate),
            seed=self.seed,
            per_device_train_batch_size=TRAIN_BATCH_SIZE,
            warmup_steps=WARMUP_SHARE,
            bf16=self.settings.bf16,
            use_cpu=self.use_cpu,
            dataloader_pin_memory=False,
            logging_steps=LOGGING_STEPS,
            save_strategy="no",
            report_to="none",
            **self.training_arguments(),
            **fractions,
            **more,
        )
