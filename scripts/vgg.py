# SPDX-License-Identifier: Apache-2.0
"""Prove the method on convolutions: VGG-16 on CIFAR-10, trained under the prior, cut by the rule alone, and recovered.

    python scripts/vgg.py --data_dir DIR                                              # a small one, for a CPU
    python scripts/vgg.py --data_dir DIR --width 1 --num_examples 50000 --bf16 --device cuda

`DIR` holds CIFAR-10 as `train.parquet` and `test.parquet`, with encoded images in `img` and their classes in `label`.
A run is scored on all test images, once; `--validate` scores it on training images that it has not seen instead, for
choosing settings. Finished runs are kept in `--results_file`, each with its settings, and skipped. Several processes
may share the file; give each its own seeds or priors.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from benchmarks.chain_runs import (
    CONTROL,
    EVAL_BATCH_SIZE,
    PRIORS,
    Course,
    accuracy,
    train_dense_,
    train_variational_,
    units_kept,
)
from benchmarks.cifar10 import NUM_CLASSES, NUM_COLOURS, Images, augment, load_images
from benchmarks.jobs import finish, job_of, read_runs, spread
from torch import Tensor, nn

from hf_vdneuron.cli import choose_device, one_line_errors, parse_args, print_table
from hf_vdneuron.config import PriorType, VDConfig
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import relevance_mask


#: Channels and convolutions of each block of VGG-16, and the neurons of its two hidden layers (Simonyan 2015, with the
#: hidden layers that its authors gave it for 1,000 classes cut from 4,096 to 512 neurons).
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
HIDDEN = (512, 512)
BATCH_SIZE = 100
LEARNING_RATE = 1e-3
#: Accuracies of a run, in the order of its columns.
ACCURACIES = ("start_accuracy", "accuracy_after_cut", "accuracy")
RESULTS_FILE = Path(__file__).parent / "results" / "vgg.jsonl"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a table share."""

    width: float = field(default=0.25, metadata={"help": "Share of the channels and neurons of VGG-16."})
    num_examples: int = field(default=10_000, metadata={"help": "Training images."})
    dense_epochs: int = field(default=10, metadata={"help": "Epochs of dense training before."})
    epochs: int = field(default=60, metadata={"help": "Epochs under the prior."})
    recover_epochs: int = field(
        default=30, metadata={"help": "Epochs after the cut; the control trains densely for `epochs` and these."}
    )
    kl_weight: float = field(default=0.1, metadata={"help": "Weight of the KL term after its rise."})
    initial_log_var: float = field(default=-10.0, metadata={"help": "Log-variance that every weight starts with."})
    log_var_distance: float = field(
        default=20.0, metadata={"help": "How far Adam can move a log-variance at its full rate, in nats."}
    )
    group_scale_distance: float = field(
        default=5.0, metadata={"help": "How far Adam can move the scale of a group, which starts at 1."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 autocast. Scores are in fp32 always."})
    validate: bool = field(default=False, metadata={"help": "Score on unseen training images, to choose settings."})


@dataclass(frozen=True, kw_only=True)
class Job(Settings):
    """One seed, one prior, and the settings: all that a result depends on."""

    prior: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run(Job):
    """A finished job: accuracies in percent, and how long it took in seconds.

    Args:
        start_accuracy: After the dense epochs.
        accuracy_after_cut: Before recovery, batch norms having gathered their statistics anew; of the control, its
            accuracy.
        accuracy: In the end.
        units: Channels and neurons of each hidden layer.
        units_left: How many of them the rule left.
        weights_left: Share of the network's parameters that is left, in percent.
        seconds: Duration.
        device: What it ran on.
        torch_version: Version of torch.
    """

    start_accuracy: float
    accuracy_after_cut: float
    accuracy: float
    units: tuple[int, ...]
    units_left: tuple[int, ...]
    weights_left: float
    seconds: float
    device: str
    torch_version: str

    @property
    def job(self) -> Job:
        """What was to be done."""
        return job_of(self, Job)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of this script that no result depends on."""

    data_dir: Path = field(metadata={"help": "Folder with `train.parquet` and `test.parquet`."})
    priors: list[str] = field(
        default_factory=lambda: [*PRIORS], metadata={"help": f"Priors to run; `{CONTROL}` is the control."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run."})
    device: str | None = field(default=None, metadata={"help": "Where to run; the accelerator if there is one."})
    results_file: Path = field(default=RESULTS_FILE, metadata={"help": "Finished runs, one per line."})
    plan: bool = field(default=False, metadata={"help": "Print what is left to do, and stop."})

    def __post_init__(self) -> None:
        """Check the priors.

        Raises:
            ValueError: If one is unknown.
        """
        if unknown := sorted(set(self.priors) - {*map(str, PriorType), CONTROL}):
            raise ValueError(f"`priors` holds {unknown}: expected some of {', '.join([*PriorType, CONTROL])}")


def vgg(width: float) -> nn.Sequential:
    """Build VGG-16 with batch norm for images of 32 x 32 pixels.

    Args:
        width: Share of its channels and neurons that each layer has.

    Returns:
        The network, freshly initialised.
    """
    blocks: list[nn.Module] = []
    num_inputs = NUM_COLOURS
    for channels, depth in BLOCKS:
        block: list[nn.Module] = []
        for _ in range(depth):
            size = scaled(channels, width)
            block += [nn.Conv2d(num_inputs, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU()]
            num_inputs = size
        blocks.append(nn.Sequential(*block, nn.MaxPool2d(2)))
    classifier: list[nn.Module] = [nn.Flatten()]
    for neurons in HIDDEN:
        size = scaled(neurons, width)
        classifier += [nn.Linear(num_inputs, size), nn.BatchNorm1d(size), nn.ReLU()]
        num_inputs = size
    return nn.Sequential(*blocks, nn.Sequential(*classifier, nn.Linear(num_inputs, NUM_CLASSES)))


def scaled(num_units: int, width: float) -> int:
    """Scale the size of a layer.

    Args:
        num_units: Channels or neurons of VGG-16.
        width: Share of them.

    Returns:
        Number of units, at least 1.
    """
    return max(1, round(num_units * width))


@torch.no_grad()
def settle_norms_(model: nn.Module, images: Tensor) -> None:
    """Let batch norms gather their statistics anew, in place: noise, and channels that are gone, shaped the old ones.

    Args:
        model: The network as it is used.
        images: Training images.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    model.train()
    for batch in images.split(EVAL_BATCH_SIZE):
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def sparsify_(model: nn.Module, course: Course, job: Job) -> RelevanceMask:
    """Train under the prior and remove what the rule finds irrelevant, in place and for good.

    Args:
        model: The dense network.
        course: What to train on, and how long.
        job: Prior and settings.

    Returns:
        What is kept.
    """
    patch_model_(model, VDConfig(prior=PriorType(job.prior), initial_log_var=job.initial_log_var))
    distances = {"log_var": job.log_var_distance, "group_scale": job.group_scale_distance}
    rates = {name: distance / course.num_steps for name, distance in distances.items()}
    train_variational_(model, course, rates, kl_weight=job.kl_weight)
    mask = relevance_mask(model)
    prune_model_(model, mask)
    return mask


def run(job: Job, data: Images, device: torch.device) -> Run:
    """Train a dense network, then sparsify it and let it recover or, as a control, train it on.

    Args:
        job: What to do.
        data: Images.
        device: Where they lie.

    Returns:
        What came out.
    """
    start = time.perf_counter()
    torch.manual_seed(job.seed)
    model = vgg(job.width).to(device)
    num_weights = count(model)
    units = tuple(scaled(size, job.width) for size, depth in BLOCKS for _ in range(depth))
    units += tuple(scaled(size, job.width) for size in HIDDEN)
    units_left = units
    course: Callable[..., Course] = partial(
        Course,
        data.train,
        data.train_labels,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        augment=augment,
        bf16=job.bf16,
    )
    train_dense_(model, course(epochs=job.dense_epochs))
    start_accuracy = accuracy(model, data.held_out, data.held_out_labels)
    if job.prior == CONTROL:
        train_dense_(model, course(epochs=job.epochs + job.recover_epochs, falling=True))
    else:
        units_left = units_kept(sparsify_(model, course(epochs=job.epochs, falling=True), job))
        settle_norms_(model, data.train)
    after_cut = accuracy(model, data.held_out, data.held_out_labels)
    if job.prior != CONTROL:
        train_dense_(model, course(epochs=job.recover_epochs, falling=True))
    return Run(
        **asdict(job),
        start_accuracy=start_accuracy,
        accuracy_after_cut=after_cut,
        accuracy=accuracy(model, data.held_out, data.held_out_labels),
        units=units,
        units_left=units_left,
        weights_left=100 * count(model) / num_weights,
        seconds=round(time.perf_counter() - start, 1),
        device=str(device),
        torch_version=torch.__version__,
    )


def count(model: nn.Module) -> int:
    """Count the parameters of a network.

    Args:
        model: The network.

    Returns:
        Their number.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def summarise(runs: list[Run]) -> str:
    """Write the results as a Markdown table.

    Args:
        runs: Finished runs with the same settings.

    Returns:
        Mean and standard error over seeds, one row per prior. The last column is the accuracy that a run lacks to the
        control of the same seed.
    """
    control = {done.seed: done.accuracy for done in runs if done.prior == CONTROL}
    rows = [
        "| prior | runs | units left | removed | weights left | start | after the cut | accuracy | paired loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for prior in sorted({done.prior for done in runs}):
        chosen = [done for done in runs if done.prior == prior]
        losses = [control[done.seed] - done.accuracy for done in chosen if done.seed in control]
        cells = [
            f"{mean(sum(done.units_left) for done in chosen):.1f} of {sum(chosen[0].units)}",
            spread([100 - 100 * sum(done.units_left) / sum(done.units) for done in chosen], " %"),
            spread([done.weights_left for done in chosen], " %"),
            *(spread([getattr(done, name) for done in chosen]) for name in ACCURACIES),
            spread(losses) if losses else "not measured",
        ]
        rows.append(f"| {prior} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def print_plan(jobs: list[Job], path: Path) -> None:
    """Print the missing runs and what they may take, judging by finished runs of the same prior and settings.

    Args:
        jobs: What is asked for.
        path: File with the finished runs.
    """
    runs = read_runs(path, Run)
    lines = []
    for job in jobs:
        known = [done.seconds for done in runs.values() if replace(done.job, seed=job.seed) == job]
        if job not in runs:
            lines.append([job.prior, str(job.seed), f"{mean(known):.0f} s" if known else "unknown"])
    print_table(["prior", "seed", "may take"], lines)


@one_line_errors
def main(argv: list[str]) -> None:
    """Run what is missing, then print the table of what was asked for.

    Args:
        argv: Arguments without the program's name.
    """
    args, settings = parse_args([Arguments, Settings], argv, description=__doc__)
    jobs = [Job(**asdict(settings), prior=prior, seed=seed) for seed, prior in product(args.seeds, args.priors)]
    if args.plan:
        print_plan(jobs, args.results_file)
        return
    device = choose_device(args.device)
    data = load_images(args.data_dir, settings.num_examples, validate=settings.validate, device=device)
    runs = finish(args.results_file, jobs, lambda job: run(job, data, device), Run)
    print(f"VGG-16, {settings.width:g} times as wide, on {settings.num_examples:,} images of CIFAR-10\n")
    print(summarise(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
