# SPDX-License-Identifier: Apache-2.0
"""Classify images: train small models of transformers on CIFAR-10, then remove what they do not need, in one run each.

    python scripts/images.py --data_dir DIR

`DIR` holds CIFAR-10 as `train.parquet` and `test.parquet`, with encoded images in `img` and their classes in `label`.
Models start at random, as there is no small pretrained one; the same trainer takes any image classifier of the Hub.
A run is scored on all test images: dense, right after the cut, and in the end. Finished runs are kept in
`--results_file`, and skipped.
"""

import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar10 import NUM_CLASSES, Images, augment, load_images
from benchmarks.jobs import finish, job_of, spread
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, EvalPrediction, PreTrainedModel, set_seed

import hf_vdneuron
from hf_vdneuron.budget import body_cost, cost_ratio
from hf_vdneuron.cli import one_line_errors, parse_args, print_table
from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments


#: Type of a model -> sizes for images of 32 x 32 pixels, and the positions that its first blocks see.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "vit": (
        {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "intermediate_size": 384,
            "image_size": 32,
            "patch_size": 4,
        },
        65,
    ),
    "convnext": ({"hidden_sizes": [48, 96, 192], "depths": [2, 2, 2], "num_stages": 3, "patch_size": 2}, 256),
    "resnet": ({"hidden_sizes": [64, 128, 256], "depths": [2, 2, 2], "embedding_size": 64, "layer_type": "basic"}, 64),
}
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WARMUP_SHARE = 0.1
RESULTS_FILE = Path(__file__).parent / "results" / "images.jsonl"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a table share."""

    target_speedup: float = field(default=2.0, metadata={"help": "Speed-up of heads, neurons and channels."})
    num_images: int = field(default=5_000, metadata={"help": "Training images."})
    epochs: int = field(default=8, metadata={"help": "Epochs of the whole run: fine-tuning, then recovery."})
    finetune_fraction: float = field(default=0.6, metadata={"help": "Share of fine-tuning in them."})


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """One model, one seed and the settings: all that a result depends on."""

    model_type: str
    seed: int


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
    """Flags of this script that no result depends on."""

    data_dir: Path = field(metadata={"help": "Folder with `train.parquet` and `test.parquet`."})
    model_types: list[str] = field(default_factory=lambda: [*MODELS], metadata={"help": "Models to train."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run."})
    results_file: Path = field(default=RESULTS_FILE, metadata={"help": "Finished runs, one per line."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})

    def __post_init__(self) -> None:
        """Check the models.

        Raises:
            ValueError: If one is unknown.
        """
        if unknown := sorted(set(self.model_types) - MODELS.keys()):
            raise ValueError(f"`model_types` holds {unknown}: expected some of {', '.join(MODELS)}")


def build_model(model_type: str) -> PreTrainedModel:
    """Build a small image classifier.

    Args:
        model_type: Its type.

    Returns:
        The model, freshly initialised.
    """
    config = AutoConfig.for_model(model_type, num_labels=NUM_CLASSES, **MODELS[model_type][0])
    return AutoModelForImageClassification.from_config(config)


def examples(images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Make the rows that a Trainer reads.

    Args:
        images: Shape `(N, 3, 32, 32)`.
        labels: Shape `(N,)`.

    Returns:
        One row per image.
    """
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def collate(rows: list[dict[str, Tensor]], *, is_augmented: bool) -> dict[str, Tensor]:
    """Make a batch.

    Args:
        rows: Its images and labels.
        is_augmented: Whether images are shifted and mirrored.

    Returns:
        Keyword arguments of the model.
    """
    images, labels = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels"))
    return {"pixel_values": augment(images) if is_augmented else images, "labels": labels}


class ImageTrainer(VDTrainer):
    """Shifts and mirrors the images that it trains on, and those alone."""

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """Read images as they are.

        Args:
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            The batches.
        """
        training, self.data_collator = self.data_collator, partial(collate, is_augmented=False)
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Score predictions.

    Args:
        prediction: Logits and labels.

    Returns:
        Accuracy in percent.
    """
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": 100 * (logits.argmax(-1) == labels).double().mean().item()}


def run(job: Job, data: Images, *, use_cpu: bool) -> Run:
    """Train a model densely, cut it, and train what is left.

    Args:
        job: What to do.
        data: Images to train on and to score on.
        use_cpu: Whether to leave an accelerator alone.

    Returns:
        What came out.
    """
    set_seed(job.seed)
    model = build_model(job.model_type)
    length = MODELS[job.model_type][1]
    dense = body_cost(model, length=length).macs, model.num_parameters()
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
            save_strategy="no",
            report_to="none",
        )
        trainer = ImageTrainer(
            model=model,
            args=args,
            max_length=length,
            train_dataset=examples(data.train, data.train_labels),
            eval_dataset=examples(data.held_out, data.held_out_labels),
            data_collator=partial(collate, is_augmented=True),
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
    milestones = [trainer.milestone(f"{name}_accuracy") or math.nan for name in ("dense", "cut")]
    return Run(
        **asdict(job),
        dense_accuracy=milestones[0],
        accuracy_after_cut=milestones[1],
        accuracy=score,
        dense_parameters=dense[1],
        parameters=pruned.num_parameters(),
        speedup=cost_ratio(dense[0], body_cost(pruned, length=length).macs),
        seconds=seconds,
        torch_version=torch.__version__,
    )


@one_line_errors
def main(argv: list[str]) -> None:
    """Run what is missing, and print the table.

    Args:
        argv: Arguments without the program's name.
    """
    arguments, settings = parse_args((Arguments, Settings), argv, description=__doc__)
    data = load_images(arguments.data_dir, settings.num_images, validate=False, device=torch.device("cpu"))
    work = partial(run, data=data, use_cpu=arguments.use_cpu)
    rows = []
    for model_type in arguments.model_types:
        jobs = [Job(model_type=model_type, seed=seed, **asdict(settings)) for seed in arguments.seeds]
        runs = finish(arguments.results_file, jobs, work, Run)
        cells = [
            spread([getattr(one, name) for one in runs])
            for name in ("dense_accuracy", "accuracy_after_cut", "accuracy", "speedup")
        ]
        left = spread([100 * one.parameters / one.dense_parameters for one in runs], " %")
        rows.append([model_type, str(len(runs)), *cells, left])
    print_table(["model", "runs", "dense", "after the cut", "pruned", "speed-up", "parameters left"], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
