# SPDX-License-Identifier: Apache-2.0
"""What came out of a run, as data: everything measured, ready for JSON."""

import copy
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_vdneuron.budget import body_cost, units_left
from hf_vdneuron.latency import measure_latency, text_inputs
from hf_vdneuron.modeling_vdneuron import native_class
from hf_vdneuron.sublayers import Unit


__all__ = ["ModelReport", "RunReport", "SpeedReport", "environment", "report_model", "report_speed"]

#: Packages whose versions decide what a run gives.
_PACKAGES = ("hf-vdneuron", "torch", "transformers", "accelerate", "datasets")

#: Batch size that a measured speed-up is for, if nobody asks for another: one request at a time.
DEFAULT_BATCH_SIZE = 1


@dataclass(frozen=True)
class ModelReport:
    """One model.

    Args:
        score: Mean of the task's metrics, None if not measured.
        parameters: All of its parameters.
        heads_per_layer: Heads of each attention block, in order.
        neurons_per_layer: Neurons of each feed-forward block, in order.
    """

    score: float | None
    parameters: int
    heads_per_layer: list[int]
    neurons_per_layer: list[int]


@dataclass(frozen=True)
class SpeedReport:
    """How much faster a pruned model is than the dense model of its config.

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
class RunReport:
    """A whole run.

    Args:
        dense: The model as fine-tuned.
        pruned: The model as saved.
        score_after_cut: Score right after removal, before recovery, None if not measured.
        speedup: How much faster it is.
        target: What was asked for.
        task: Name of the task.
        seed: Seed of the run.
        environment: Device and versions.
    """

    dense: ModelReport
    pruned: ModelReport
    score_after_cut: float | None
    speedup: SpeedReport
    target: str
    task: str
    seed: int
    environment: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self)


def report_model(model: PreTrainedModel, score: float | None = None) -> ModelReport:
    """Describe a model.

    Args:
        model: A dense or pruned model.
        score: Its score, if measured.

    Returns:
        The description.
    """
    left = units_left(model)
    return ModelReport(score, model.num_parameters(), left[Unit.HEAD], left[Unit.NEURON])


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Build the dense model that a pruned one was cut from, with random weights, on the same device.

    Args:
        model: A pruned model.

    Returns:
        A model of the native class and config.
    """
    config = copy.deepcopy(model.config)
    config.vdneuron = None
    return native_class(type(model))(config).to(device=model.device, dtype=model.dtype)


def report_speed(pruned: PreTrainedModel, *, length: int, batch_size: int = DEFAULT_BATCH_SIZE) -> SpeedReport:
    """Predict and measure how much faster a pruned model is than its dense twin.

    Args:
        pruned: A pruned model of text.
        length: Tokens of a sequence.
        batch_size: Sequences in a forward.

    Returns:
        Both speed-ups, and the times that the measured one is the ratio of.
    """
    dense = dense_twin(pruned)
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


def environment(device: torch.device) -> dict[str, str]:
    """Say where a run happened.

    Args:
        device: Device of the run.

    Returns:
        Device, Python and package versions, by name.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }
