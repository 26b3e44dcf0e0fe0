# SPDX-License-Identifier: Apache-2.0
"""Chains trained from scratch, as where the method came from: what `lenet.py` and `vgg.py` have in common.

A network is trained densely for a while, then under a prior or, as the control, densely on for as long.
"""

import json
import math
import random
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from hf_vdneuron.config import PriorType
from hf_vdneuron.elbo import em_step_, kl_divergence, set_variational_
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.optimization import split_variational_
from hf_vdneuron.schedules import variational_rate_factor


__all__ = [
    "CONTROL",
    "PRIORS",
    "Course",
    "accuracy",
    "append_run",
    "finish",
    "read_runs",
    "spread",
    "train_dense_",
    "train_variational_",
    "units_kept",
]

#: Stands in the place of a prior for the dense network, trained on for as many epochs.
CONTROL = "dense"
#: What runs if nobody says.
PRIORS = (str(PriorType.GROUP), str(PriorType.MIXTURE), CONTROL)
#: Share of the variational epochs over which the weight of the KL term rises linearly from 0.
WARMUP_SHARE = 0.3
#: Bounds the memory of scoring; it changes no score.
EVAL_BATCH_SIZE = 1000


class FinishedRun(Protocol):
    """A dataclass that holds a job beside what came out of it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def job(self) -> Hashable:
        """What was to be done."""


R = TypeVar("R", bound=FinishedRun)


def _unchanged(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Course:
    """How training goes over its images, densely or under a prior.

    Args:
        images: Training images, examples first.
        labels: Their labels.
        epochs: Number of passes.
        batch_size: Images per optimizer step.
        learning_rate: Adam's rate.
        falling: Whether all rates hold for half the course and then fall to zero, or hold to its end (method: fact 7).
        augment: Function from the images of a batch to what the network sees.
        bf16: Whether the network runs in bfloat16 autocast.
    """

    images: Tensor
    labels: Tensor
    epochs: int
    batch_size: int
    learning_rate: float
    falling: bool = False
    augment: Callable[[Tensor], Tensor] = _unchanged
    bf16: bool = False

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * math.ceil(len(self.images) / self.batch_size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run through all epochs, each in its own random order.

        Yields:
            Batches of images, augmented, and labels.
        """
        for _ in range(self.epochs):
            for index in torch.randperm(len(self.images)).split(self.batch_size):
                yield self.augment(self.images[index]), self.labels[index]


def train_dense_(model: nn.Module, course: Course) -> None:
    """Train by maximum likelihood, in place.

    Args:
        model: The network.
        course: What to train on, and how long.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=course.learning_rate)
    _train_(model, optimizer, course, penalty=lambda _: 0.0)


def train_variational_(model: nn.Module, course: Course, rates: Mapping[str, float], *, kl_weight: float) -> None:
    """Maximise the ELBO (1), in place; one step of EM per optimizer step.

    Args:
        model: The patched network.
        course: What to train on, and how long.
        rates: Rates of the posterior's own parameters, `log_var` and `group_scale`, where they are not the course's.
        kl_weight: Weight of the KL term after its rise.
    """
    set_variational_(model, noise=True, collect_kl=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=course.learning_rate)
    split_variational_(optimizer, model.named_parameters(), rates, num_steps=1)  # rates are distances per step
    warmup_steps = WARMUP_SHARE * course.num_steps

    def penalty(step: int) -> Tensor:
        risen = min(1.0, step / warmup_steps)
        return kl_weight * risen * kl_divergence(model) / len(course.images)

    _train_(model, optimizer, course, penalty)


def _train_(
    model: nn.Module, optimizer: torch.optim.Optimizer, course: Course, penalty: Callable[[int], Tensor | float]
) -> None:
    """Minimise cross-entropy plus penalty; networks without a prior have none to move."""

    def factor(step: int) -> float:
        return variational_rate_factor(step, course.num_steps, warmup_steps=0) if course.falling else 1.0

    scheduler = LambdaLR(optimizer, factor)
    model.train()
    for step, (images, labels) in enumerate(course.batches()):
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=course.bf16):
            logits = model(images)
        (F.cross_entropy(logits.float(), labels) + penalty(step)).backward()
        optimizer.step()
        scheduler.step()
        em_step_(model)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Score a model.

    Args:
        model: The network.
        images: Held-out images.
        labels: Their labels.

    Returns:
        Accuracy in percent.
    """
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(EVAL_BATCH_SIZE)])
    return 100 * (predicted == labels).double().mean().item()


def units_kept(mask: RelevanceMask) -> tuple[int, ...]:
    """Count what a mask keeps.

    Args:
        mask: Mask over all hidden layers.

    Returns:
        Neurons or channels left in each.
    """
    return tuple(int(keep.all(0).sum()) for keep in mask.keep.values())


def read_runs(path: Path, run_type: type[R]) -> dict[Hashable, R]:
    """Read the finished runs.

    Args:
        path: File with one run per line, or no file yet.
        run_type: What a line holds.

    Returns:
        Job -> its run; the first one where two processes did the same.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    runs: dict[Hashable, R] = {}
    for finished in (run_type(**json.loads(line)) for line in lines):
        runs.setdefault(finished.job, finished)
    return runs


def append_run(path: Path, finished: FinishedRun) -> None:
    """Add a line to the results.

    Args:
        path: File with one run per line; made if missing.
        finished: The run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:  # one write at the end of the file, whoever else writes to it
        file.write(json.dumps(asdict(finished)).encode() + b"\n")


def finish(path: Path, jobs: Iterable[Hashable], run: Callable[[Any], R], run_type: type[R]) -> list[R]:
    """Do what is missing; several processes may share the file and the work.

    Args:
        path: File with one run per line.
        jobs: What is asked for.
        run: Function from a job to its run.
        run_type: What a line holds.

    Returns:
        The run of each job, in their order.
    """
    wanted = list(jobs)
    # Read before every run, as another process may have finished jobs; in no order, as it may have begun the next one.
    while missing := set(wanted) - (runs := read_runs(path, run_type)).keys():
        append_run(path, run(random.choice(list(missing))))
    return [runs[job] for job in wanted]


def spread(values: list[float], unit: str = "") -> str:
    """Write mean and standard error.

    Args:
        values: One value per run, at least one.
        unit: What follows them.

    Returns:
        A table's cell; the error of a single run is unknown.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f} ± {error:.2f}{unit}"
