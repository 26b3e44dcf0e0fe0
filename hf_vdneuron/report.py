# SPDX-License-Identifier: Apache-2.0
"""What came out of a run, as data: everything measured, ready for JSON."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import body_cost, units_left
from hf_vdneuron.latency import device_name, measure_latency, text_inputs
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.schedules import PhasePlan
from hf_vdneuron.sublayers import Unit


__all__ = [
    "Curve",
    "DropoutRateReport",
    "ModelReport",
    "RunReport",
    "ScoreReport",
    "SizesReport",
    "SpeedReport",
    "TrainingReport",
    "environment",
    "kept_heads",
    "report_model",
    "report_score",
    "report_speed",
    "versions",
]

#: Packages whose versions decide what a run gives.
_PACKAGES = ("hf-vdneuron", "torch", "transformers", "accelerate", "datasets")

#: Batch size that a measured speed-up is for, if nobody asks for another: one request at a time.
DEFAULT_BATCH_SIZE = 1


@dataclass(frozen=True)
class ModelReport:
    """One model.

    Args:
        score: Mean of the task's metrics on its validation sets, None if not measured.
        precision: Arithmetic in which it was scored.
        parameters: Number of its parameters.
        bytes: Size of its parameters and buffers, nearly that of its file.
        heads_per_layer: Heads of each attention block, in order.
        neurons_per_layer: Neurons of each feed-forward block, in order.
    """

    score: float | None
    precision: str
    parameters: int
    bytes: int
    heads_per_layer: list[int]
    neurons_per_layer: list[int]


@dataclass(frozen=True)
class ScoreReport:
    """How the saved model was scored; the same settings give the same score again, to the last digit.

    Args:
        metrics: Each metric by name.
        split: Validation sets of the task, joined by `+`.
        num_examples: Rows in them.
        max_length: Tokens to which texts were truncated.
        batch_size: Examples per forward; padding to the longest of them moves the last digits.
    """

    metrics: dict[str, float]
    split: str
    num_examples: int
    max_length: int
    batch_size: int


@dataclass(frozen=True)
class SpeedReport:
    """How much faster a pruned model is than the model it was cut from, both in fp32 and in turns.

    Args:
        predicted: Dense over pruned multiply-accumulates of the body.
        measured: Dense over pruned seconds of one forward of the whole model, embeddings and head included.
        dense_seconds: Median seconds of the dense model's forward.
        pruned_seconds: The same of the pruned model's.
        batch_size: Sequences in a forward.
        length: Tokens of each.
    """

    predicted: float
    measured: float
    dense_seconds: float
    pruned_seconds: float
    batch_size: int
    length: int


@dataclass(frozen=True)
class Curve:
    """What was logged of one quantity.

    Args:
        steps: Optimizer steps done at each entry.
        values: Its values, finite.
    """

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class DropoutRateReport:
    r"""Histogram of the weights by dropout rate :math:`d`, where the posterior was last trained.

    Args:
        log_alpha_edges: Edges of the bins, :math:`\log \alpha = \log \frac{d}{1 - d}`. The first and the last bin
            hold what lies beyond them too.
        counts: Kind of unit, `head` or `neuron` -> weights of these units in each bin.
        threshold: Dropout rate above which a weight is irrelevant; an edge.
    """

    log_alpha_edges: list[float]
    counts: dict[str, list[int]]
    threshold: float


@dataclass(frozen=True)
class SizesReport:
    """What sizes a run with a tolerance tried, and which it chose.

    Args:
        metric: Name of the metric they were judged by, on the rows that choices are made on.
        dense: The dense model's.
        limit: The worst that was allowed.
        speedups: Dense over kept multiply-accumulates of each size, not falling.
        values: Its metric after its part of the recovery.
        chosen: Index of the size that was chosen, None if none was good enough.
        final: Metric of what the run ended with.
    """

    metric: str
    dense: float
    limit: float
    speedups: list[float]
    values: list[float]
    chosen: int | None
    final: float | None


@dataclass(frozen=True)
class TrainingReport:
    """How a run went.

    Args:
        phases: Steps of each phase, as planned.
        curves: What was logged in training, by name.
        dropout_rates: Where the posterior ended, None if none was trained.
        sizes: What a tolerance had to choose from, None without one.
    """

    phases: PhasePlan
    curves: dict[str, Curve]
    dropout_rates: DropoutRateReport | None
    sizes: SizesReport | None = None


@dataclass(frozen=True)
class RunReport:
    """A whole run.

    Args:
        base_model: Name of the model it started from.
        task: Name of the task.
        target: What was asked for.
        command: Command that repeats the run.
        dense: The model as fine-tuned, scored during training.
        pruned: The model as saved, scored after it was loaded again.
        kept_heads: Heads of each attention block of the dense model that the pruned one has, by index from 0.
        score_after_cut: Score right after removal, before recovery, in the precision of the dense one; None if not
            measured.
        evaluation: How the pruned model was scored.
        speedup: How much faster it is.
        training: How it went.
        seeds: Seeds of the run by what they decide.
        train_seconds: Wall time of training, since it was last resumed.
        device: Where it ran.
        versions: Versions of Python and the packages that decide what a run gives, by name.
    """

    base_model: str
    task: str
    target: str
    command: str
    dense: ModelReport
    pruned: ModelReport
    kept_heads: list[list[int]]
    score_after_cut: float | None
    evaluation: ScoreReport
    speedup: SpeedReport
    training: TrainingReport
    seeds: dict[str, int]
    train_seconds: float
    device: str
    versions: dict[str, str]

    @property
    def is_smaller(self) -> bool:
        """Whether anything was removed."""
        return self.pruned.parameters < self.dense.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self)


def report_model(model: PreTrainedModel, score: float | None, *, precision: str = "fp32") -> ModelReport:
    """Describe a model.

    Args:
        model: A dense or pruned model.
        score: Its score, if measured.
        precision: Arithmetic in which it was.

    Returns:
        The description.
    """
    left = units_left(model)
    return ModelReport(
        score=score,
        precision=precision,
        parameters=model.num_parameters(),
        bytes=int(model.get_memory_footprint()),
        heads_per_layer=left[Unit.HEAD],
        neurons_per_layer=left[Unit.NEURON],
    )


def kept_heads(model: PreTrainedModel, mask: RelevanceMask) -> list[list[int]]:
    """List the heads that a mask keeps.

    Args:
        model: The model, before it is pruned.
        mask: What is kept of it.

    Returns:
        Indices of the kept heads of each attention block, in order.
    """
    return [mask.kept_units(part).tolist() for part in find_sublayers(model) if part.unit is Unit.HEAD]


def report_score(result: Mapping[str, Any], *, max_length: int, batch_size: int) -> ScoreReport:
    """Say how a score was measured.

    Args:
        result: What `evaluate_glue` returns.
        max_length: Tokens to which texts were truncated.
        batch_size: Examples per forward.

    Returns:
        Metrics and settings.
    """
    metrics = {name: value for name, value in result.items() if isinstance(value, float) and name != "score"}
    return ScoreReport(metrics, result["split"], result["num_examples"], max_length, batch_size)


def report_speed(
    dense: PreTrainedModel, pruned: PreTrainedModel, *, length: int, batch_size: int = DEFAULT_BATCH_SIZE
) -> SpeedReport:
    """Predict and measure how much faster a pruned model is than another.

    Args:
        dense: The model of text that it was cut from, with any weights.
        pruned: The pruned model, on the same device.
        length: Tokens of a sequence.
        batch_size: Sequences in a forward.

    Returns:
        Both speed-ups, and the times that the measured one is the ratio of.
    """
    inputs = text_inputs(batch_size=batch_size, length=length, device=pruned.device)
    seconds = measure_latency({"dense": dense, "pruned": pruned}, inputs)
    predicted = body_cost(dense, length=length).macs / max(1, body_cost(pruned, length=length).macs)
    return SpeedReport(
        predicted=predicted,
        measured=seconds["dense"] / seconds["pruned"],
        dense_seconds=seconds["dense"],
        pruned_seconds=seconds["pruned"],
        batch_size=batch_size,
        length=length,
    )


def versions() -> dict[str, str]:
    """List what is installed.

    Returns:
        Versions of Python and the packages that decide what a run gives, by name.
    """
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def environment(device: torch.device) -> dict[str, str]:
    """Say where a run happened.

    Args:
        device: Device of the run.

    Returns:
        Device, Python and package versions, by name.
    """
    return {"device": device_name(device), **versions()}
