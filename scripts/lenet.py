# SPDX-License-Identifier: Apache-2.0
"""Prove the mathematics where the method came from: LeNet-300-100 on 10,000 MNIST images, cross-validated.

    python scripts/lenet.py --data_dir DIR

`DIR` holds MNIST's `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`. Every fold trains on 8,000 images and
is scored on the other 2,000. Finished runs are kept in `--results_file`, each with its settings, and skipped. Several
processes may share the file and the work.
"""

import argparse
import gzip
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.chain_runs import (
    CONTROL,
    PRIORS,
    Course,
    accuracy,
    train_dense_,
    train_variational_,
    units_kept,
)
from benchmarks.jobs import finish, job_of, spread
from torch import Tensor, nn

from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import relevance_mask


NUM_FOLDS = 5
#: The held-out images are those of NumPy's `RandomState(0).permutation`.
SPLIT_SEED = 0
BATCH_SIZE = 100
DENSE_EPOCHS = 10
VARIATIONAL_EPOCHS = 120
KL_WEIGHT = 0.5
LEARNING_RATE = 1e-3
LOG_VAR_LEARNING_RATE = 1e-2
#: The network is trained from scratch, so it stands more noise than a pretrained one.
INITIAL_LOG_VAR = -9.0
RESULTS_FILE = Path(__file__).parent / "results" / "lenet.jsonl"


@dataclass(frozen=True)
class Job:
    """One fold, one seed, one prior, and the settings: all that a result depends on."""

    prior: str
    fold: int
    seed: int
    epochs: int
    kl_weight: float
    grouping: str
    group_scale: bool


@dataclass(frozen=True)
class Run(Job):
    """A finished job: accuracies in percent, and how long it took in seconds where that was recorded."""

    dense_accuracy: float
    accuracy: float
    neurons_left: tuple[int, int]
    seconds: float | None
    torch_version: str

    @property
    def job(self) -> Job:
        """What was to be done."""
        return job_of(self, Job)


def read_idx(path: Path) -> np.ndarray:
    """Read one of MNIST's files.

    Args:
        path: A gzipped idx file of unsigned bytes.

    Returns:
        Its array, uint8.
    """
    with gzip.open(path) as file:
        num_axes = struct.unpack(">HBB", file.read(4))[2]
        shape = struct.unpack(f">{num_axes}I", file.read(4 * num_axes))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def load_images(data_dir: Path) -> tuple[Tensor, Tensor]:
    """Load the images, standardised, and their labels.

    Args:
        data_dir: Folder with MNIST's two test files.

    Returns:
        Images of shape `(10000, 784)` and labels of shape `(10000,)`.
    """
    images = torch.from_numpy(read_idx(data_dir / "t10k-images-idx3-ubyte.gz").copy()).flatten(1).float() / 255
    labels = torch.from_numpy(read_idx(data_dir / "t10k-labels-idx1-ubyte.gz").copy()).long()
    return images, labels


def folds(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Cut the data into folds.

    Args:
        images: All images.
        labels: Their labels.

    Yields:
        Training images and labels, held-out images and labels.
    """
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(images)))
    parts = order.chunk(NUM_FOLDS)
    for held_out in reversed(range(NUM_FOLDS)):
        train = torch.cat([part for index, part in enumerate(parts) if index != held_out])
        yield images[train], labels[train], images[parts[held_out]], labels[parts[held_out]]


def lenet() -> nn.Sequential:
    """Build LeNet-300-100.

    Returns:
        The network, freshly initialised.
    """
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def sparsify_(model: nn.Module, images: Tensor, labels: Tensor, job: Job) -> tuple[int, int]:
    """Train under the prior and remove what the rule finds irrelevant, in place and for good.

    Args:
        model: The dense network.
        images: Training images.
        labels: Their labels.
        job: Prior and settings.

    Returns:
        Neurons left in the two hidden layers.
    """
    config = VDConfig(
        prior=PriorType(job.prior),
        grouping=Grouping(job.grouping),
        group_scale=job.group_scale,
        initial_log_var=INITIAL_LOG_VAR,
    )
    patch_model_(model, config)
    course = Course(images, labels, job.epochs, BATCH_SIZE, LEARNING_RATE)
    train_variational_(model, course, {"log_var": LOG_VAR_LEARNING_RATE}, kl_weight=job.kl_weight)
    mask = relevance_mask(model)
    prune_model_(model, mask)
    first, second = units_kept(mask)
    return first, second


def run(job: Job, data: tuple[Tensor, ...]) -> Run:
    """Train a dense network, then sparsify it or, as a control, train it on.

    Args:
        job: What to do.
        data: Training images and labels, held-out images and labels.

    Returns:
        What came out.
    """
    start = time.perf_counter()
    train_images, train_labels, images, labels = data
    torch.manual_seed(1000 * job.fold + job.seed)
    course = partial(Course, train_images, train_labels, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    model = lenet()
    train_dense_(model, course(DENSE_EPOCHS))
    dense_accuracy = accuracy(model, images, labels)
    left = (300, 100)
    if job.prior == CONTROL:
        train_dense_(model, course(job.epochs))
    else:
        left = sparsify_(model, train_images, train_labels, job)
    return Run(
        **asdict(job),
        dense_accuracy=dense_accuracy,
        accuracy=accuracy(model, images, labels),
        neurons_left=left,
        seconds=round(time.perf_counter() - start, 1),
        torch_version=torch.__version__,
    )


def summarise(runs: list[Run]) -> str:
    """Write the results as a Markdown table.

    Args:
        runs: Finished runs.

    Returns:
        Mean and standard error over folds and seeds, one row per prior.
    """
    rows = [
        "| prior | runs | neurons left | removed | dense | pruned | paired loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for prior in sorted({done.prior for done in runs}):
        chosen = [done for done in runs if done.prior == prior]
        left = [sum(done.neurons_left) for done in chosen]
        first, second = (statistics.mean(done.neurons_left[layer] for done in chosen) for layer in (0, 1))
        rows.append(
            f"| {prior} | {len(chosen)} | {first:.1f} + {second:.1f} of 300 + 100 "
            f"| {spread([100 - count / 4 for count in left], ' %')} "
            f"| {spread([done.dense_accuracy for done in chosen])} | {spread([done.accuracy for done in chosen])} "
            f"| {spread([done.dense_accuracy - done.accuracy for done in chosen])} |"
        )
    return "\n".join(rows)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with MNIST's two gzipped test files")
    parser.add_argument(
        "--priors", nargs="+", choices=[*map(str, PriorType), CONTROL], default=[*PRIORS], help="priors to run"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run")
    parser.add_argument(
        "--num_folds", type=int, choices=range(1, NUM_FOLDS + 1), default=NUM_FOLDS, help="folds to run"
    )
    parser.add_argument("--epochs", type=int, default=VARIATIONAL_EPOCHS, help="variational epochs")
    parser.add_argument("--kl_weight", type=float, default=KL_WEIGHT, help="weight of the KL term after its rise")
    parser.add_argument(
        "--grouping",
        choices=[*map(str, Grouping)],
        default=str(Grouping.SIDES),
        help="which slices of a neuron share one prior",
    )
    parser.add_argument(
        "--group_scale",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one learned scale per group's means",
    )
    parser.add_argument("--results_file", type=Path, default=RESULTS_FILE, help="finished runs, one per line")
    return parser.parse_args(argv)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """List what the command line asks for.

    Args:
        args: Command line.

    Returns:
        The jobs, finished or not.
    """
    return [
        Job(prior, fold, seed, args.epochs, args.kl_weight, args.grouping, args.group_scale)
        for seed in args.seeds
        for fold in range(args.num_folds)
        for prior in args.priors
    ]


def main(argv: list[str]) -> None:
    """Run what is missing, then print the table of what was asked for.

    Args:
        argv: Arguments without the program's name.
    """
    args = parse_args(argv)
    data = list(folds(*load_images(args.data_dir)))
    print(summarise(finish(args.results_file, jobs_of(args), lambda job: run(job, data[job.fold]), Run)))


if __name__ == "__main__":
    main(sys.argv[1:])
