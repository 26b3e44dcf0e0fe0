# SPDX-License-Identifier: Apache-2.0
"""Classifiers of transformers that start at random: what `images.py` and `sounds.py` have in common.

A small model is trained densely, cut to a speed-up, and trained on, all in one run of the trainer. There is no small
pretrained one of these kinds; the same trainer takes any classifier of the Hub.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, EvalPrediction, PreTrainedConfig, PreTrainedModel, set_seed

import hf_vdneuron
from benchmarks.jobs import finish, job_of, spread
from hf_vdneuron.budget import body_cost, cost_ratio
from hf_vdneuron.cli import print_table
from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = [
    "Arguments",
    "Examples",
    "Job",
    "Recipe",
    "Run",
    "Settings",
    "build_model",
    "classify",
    "fingerprint",
    "run_all",
]

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WARMUP_SHARE = 0.1

#: Function from examples to keyword arguments of a model, with the classes in `labels`.
Collator: TypeAlias = Callable[[list[Any]], dict[str, Tensor]]

#: Function from a config to a freshly initialised model.
FromConfig: TypeAlias = Callable[[PreTrainedConfig], PreTrainedModel]


@dataclass(frozen=True)
class Recipe:
    """How a small model is built.

    Args:
        sizes: What its config says.
        positions: Positions that its first blocks see.
    """

    sizes: Mapping[str, Any]
    positions: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a table share."""

    target_speedup: float = field(default=2.0, metadata={"help": "Speed-up of heads, neurons and channels."})
    num_examples: int = field(default=5_000, metadata={"help": "Training examples at most."})
    epochs: int = field(default=8, metadata={"help": "Epochs of the whole run: fine-tuning, then recovery."})
    finetune_fraction: float = field(default=0.6, metadata={"help": "Share of fine-tuning in them."})

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one is out of range.
        """
        ranges = {
            "target_speedup": (1 <= self.target_speedup < math.inf, "a number from 1"),
            "num_examples": (self.num_examples > 0, "at least 1"),
            "epochs": (self.epochs > 0, "at least 1"),
            "finetune_fraction": (0 < self.finetune_fraction < 1, "a number between 0 and 1"),
        }
        for name, (is_in_range, expected) in ranges.items():
            if not is_in_range:
                raise ValueError(f"`{name}` is {getattr(self, name)}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """One model, one seed, the data and the settings: all that a result depends on.

    Args:
        model_type: Type of the model.
        seed: Seed of its start and of the order of the examples.
        data: What `fingerprint` says of the files.
    """

    model_type: str
    seed: int
    data: str


@dataclass(frozen=True, kw_only=True)
class Run(Job):
    """A finished job: accuracies in percent, and how long it took in seconds.

    Args:
        dense_accuracy: After fine-tuning.
        accuracy_after_cut: Right after the cut.
        accuracy: In the end, of the pruned model, loaded again.
        dense_parameters: Parameters before.
        parameters: Parameters left.
        speedup: Multiply-accumulates of heads, neurons and channels, before over after.
        seconds: Duration of the training.
        torch_version: Version of torch.
    """

    dense_accuracy: float
    accuracy_after_cut: float
    accuracy: float
    dense_parameters: int
    parameters: int
    speedup: float
    seconds: float
    torch_version: str

    @property
    def job(self) -> Job:
        """What was to be done."""
        return job_of(self, Job)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of both scripts beside the settings."""

    data_dir: Path = field(metadata={"help": "Folder with the data."})
    model_types: list[str] = field(default_factory=list, metadata={"help": "Models to train; all by default."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run."})
    results_file: Path | None = field(
        default=None, metadata={"help": "Finished runs, one per line; by default those of this repository."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})

    def choose(self, models: Mapping[str, Recipe]) -> list[str]:
        """Name the models to train.

        Args:
            models: What there is.

        Returns:
            Their types.

        Raises:
            ValueError: If one is unknown.
        """
        if unknown := sorted(set(self.model_types) - models.keys()):
            raise ValueError(f"`model_types` holds {unknown}: expected some of {', '.join(models)}")
        return self.model_types or [*models]


@dataclass(frozen=True)
class Examples:
    """What a classifier is trained on and scored on.

    Args:
        num_classes: Number of classes.
        train: Training examples.
        held_out: Examples to score on.
        augment: Makes a batch to train on.
        collate: Makes a batch to score on.
    """

    num_classes: int
    train: Sequence[Any]
    held_out: Sequence[Any]
    augment: Collator
    collate: Collator


class ClassifierTrainer(VDTrainer):
    """Augments the examples that it trains on, and those alone.

    Args:
        collate: Makes a batch to score on.
        **kwargs: As for `VDTrainer`; its `data_collator` makes a batch to train on.
    """

    def __init__(self, *, collate: Collator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.collate = collate

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """Read examples as they are.

        Args:
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            The batches.
        """
        training = self.data_collator
        self.data_collator = self.collate
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training


def fingerprint(data_dir: Path, files: Iterable[Path]) -> str:
    """Tell data from other data, by the names and sizes of its files.

    Args:
        data_dir: Folder that they lie in.
        files: All of them.

    Returns:
        Sixteen hexadecimal digits.
    """
    lines = sorted(f"{path.relative_to(data_dir).as_posix()} {path.stat().st_size}\n" for path in files)
    return sha256("".join(lines).encode()).hexdigest()[:16]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Score predictions.

    Args:
        prediction: Logits and labels.

    Returns:
        Accuracy in percent.
    """
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": 100 * (logits.argmax(-1) == labels).double().mean().item()}


def build_model(from_config: FromConfig, model_type: str, recipe: Recipe, num_classes: int) -> PreTrainedModel:
    """Build a small classifier.

    Args:
        from_config: Method of an auto class for what is classified, such as `AutoModelForImageClassification`.
        model_type: Type of the model.
        recipe: How it is built.
        num_classes: Number of classes.

    Returns:
        The model, freshly initialised.
    """
    return from_config(AutoConfig.for_model(model_type, num_labels=num_classes, **recipe.sizes))


def classify(job: Job, from_config: FromConfig, recipe: Recipe, examples: Examples, *, use_cpu: bool) -> Run:
    """Train a model densely, cut it, and train what is left.

    Args:
        job: What to do.
        from_config: Method of an auto class for what is classified, such as `AutoModelForImageClassification`.
        recipe: How the model is built.
        examples: What to train on and to score on.
        use_cpu: Whether to leave an accelerator alone.

    Returns:
        What came out.

    Raises:
        ValueError: If there was no cut within so few epochs.
    """
    set_seed(job.seed)
    model = build_model(from_config, job.model_type, recipe, examples.num_classes)
    dense = body_cost(model, length=recipe.positions).macs, model.num_parameters()
    with tempfile.TemporaryDirectory() as folder:
        args = VDTrainingArguments(
            folder,
            target_speedup=job.target_speedup,
            num_train_epochs=job.epochs,
            finetune_fraction=job.finetune_fraction,
            recover_fraction=1 - job.finetune_fraction,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARMUP_SHARE,
            seed=job.seed,
            use_cpu=use_cpu,
            dataloader_pin_memory=False,
            remove_unused_columns=False,  # what a collator reads is no column of the model's
            save_strategy="no",
            report_to="none",
        )
        trainer = ClassifierTrainer(
            model=model,
            args=args,
            max_length=recipe.positions,
            train_dataset=examples.train,
            eval_dataset=examples.held_out,
            data_collator=examples.augment,
            collate=examples.collate,
            compute_metrics=accuracy,
        )
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
        trainer.prune().save_pretrained(folder)
        pruned = hf_vdneuron.from_pretrained(folder)
    pruned.to(args.device)  # type: ignore[arg-type]  # transformers wraps `to` so that it seems unbound
    trainer.model = trainer.model_wrapped = pruned
    score = trainer.evaluate()["eval_accuracy"]
    dense_accuracy, accuracy_after_cut = (trainer.milestone(f"{name}_accuracy") for name in ("dense", "cut"))
    if dense_accuracy is None or accuracy_after_cut is None:
        raise ValueError(
            f"{job.epochs} epochs were too few to score the model before and after the cut: expected more"
        )
    return Run(
        **asdict(job),
        dense_accuracy=dense_accuracy,
        accuracy_after_cut=accuracy_after_cut,
        accuracy=score,
        dense_parameters=dense[1],
        parameters=pruned.num_parameters(),
        speedup=cost_ratio(dense[0], body_cost(pruned, length=recipe.positions).macs),
        seconds=seconds,
        torch_version=torch.__version__,
    )


def run_all(
    model_types: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    data: str,
    results_file: Path,
    work: Callable[[Job], Run],
) -> None:
    """Run what is missing, and print the table.

    Args:
        model_types: Models to train.
        seeds: Seeds of each.
        settings: What all runs share.
        data: What `fingerprint` says of the files.
        results_file: File with one run per line.
        work: Function from a job to its run.
    """
    rows = []
    for model_type in model_types:
        jobs = [Job(model_type=model_type, seed=seed, data=data, **asdict(settings)) for seed in seeds]
        runs = finish(results_file, jobs, work, Run)
        cells = [
            spread([getattr(one, name) for one in runs])
            for name in ("dense_accuracy", "accuracy_after_cut", "accuracy", "speedup")
        ]
        left = spread([100 * one.parameters / one.dense_parameters for one in runs], " %")
        rows.append([model_type, str(len(runs)), *cells, left])
    print_table(["model", "runs", "dense", "after the cut", "pruned", "speed-up", "parameters left"], rows)
