# SPDX-License-Identifier: Apache-2.0
"""Chains trained from scratch, as where the method came from: what `lenet.py` and `vgg.py` have in common.

A network is trained densely for a while, then under a prior or, as the control, densely on for as long.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
