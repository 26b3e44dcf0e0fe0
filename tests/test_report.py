"""Reports of runs: what is left of a model, how it was scored, how fast it is."""

import json

import pytest
import torch
from models import HEADS, LAYERS, NEURONS, tiny_model
from transformers import PreTrainedModel

from hf_vdneuron.latency import device_name
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.report import (
    Curve,
    DropoutRateReport,
    RunReport,
    TrainingReport,
    environment,
    kept_heads,
    report_model,
    report_score,
    report_speed,
    versions,
)
from hf_vdneuron.schedules import PhasePlan


RESULT = {"score": 0.875, "accuracy": 0.9, "f1": 0.85, "num_examples": 40, "split": "validation"}


@pytest.fixture
def dense() -> PreTrainedModel:
    return tiny_model("bert", "sequence_classification", dtype=torch.float32)


@pytest.fixture
def pruned() -> PreTrainedModel:
    keep = {
        "bert.encoder.layer.0.attention": torch.zeros(2, HEADS, dtype=torch.bool),
        "bert.encoder.layer.1.feed_forward": (torch.arange(NEURONS) < 5).expand(2, -1).clone(),
    }
    return prune_model_(tiny_model("bert", "sequence_classification", dtype=torch.float32), RelevanceMask(keep))


def test_kept_heads_are_listed_by_index(dense: PreTrainedModel) -> None:
    keep = torch.ones(2, HEADS, dtype=torch.bool)
    keep[0, 1] = keep[1, 2] = False
    mask = RelevanceMask({"bert.encoder.layer.1.attention": keep})
    assert kept_heads(dense, mask) == [[0, 1, 2, 3], [0, 3], [0, 1, 2, 3]]


def num_bytes(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def test_a_model_is_counted(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    reports = {"dense": report_model(dense, 0.9, precision="bf16"), "pruned": report_model(pruned, None)}
    assert reports["dense"].heads_per_layer == [HEADS] * LAYERS
    assert reports["pruned"].heads_per_layer == [0, HEADS, HEADS]
    assert reports["pruned"].neurons_per_layer == [NEURONS, 5, NEURONS]
    for model, report in zip((dense, pruned), reports.values(), strict=True):
        assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert report.bytes == num_bytes(model)
    assert [(report.score, report.precision) for report in reports.values()] == [(0.9, "bf16"), (None, "fp32")]


def test_a_score_comes_with_its_settings() -> None:
    report = report_score(RESULT, max_length=16, batch_size=4)
    assert report.metrics == {"accuracy": 0.9, "f1": 0.85}
    assert (report.split, report.num_examples, report.max_length, report.batch_size) == ("validation", 40, 16, 4)


def test_speed_is_dense_over_pruned(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    speed = report_speed(dense, pruned, length=4)
    assert speed.predicted > 1
    assert speed.measured == speed.dense_seconds / speed.pruned_seconds
    assert (speed.batch_size, speed.length) == (1, 4)


def test_a_run_is_json(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    report = RunReport(
        base_model="tiny",
        task="mrpc",
        target="dropout rate above 0.99",
        command="python scripts/sparsify.py",
        dense=report_model(dense, 0.9),
        pruned=report_model(pruned, RESULT["score"]),
        kept_heads=[[], [0, 1, 2, 3], [0, 1, 2, 3]],
        score_after_cut=None,
        evaluation=report_score(RESULT, max_length=16, batch_size=4),
        speedup=report_speed(dense, pruned, length=4),
        training=TrainingReport(
            PhasePlan(1, 2, 1), {"nll": Curve([1], [0.5])}, DropoutRateReport([0.0, 1.0], {"head": [3]}, 0.99)
        ),
        seeds={"training": 3},
        train_seconds=1.5,
        device=device_name(torch.device("cpu")),
        versions=versions(),
    )
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["pruned"]["heads_per_layer"] == [0, HEADS, HEADS]
    assert report.to_dict()["training"]["phases"] == {"finetune_steps": 1, "sparsify_steps": 2, "recover_steps": 1}


def test_the_environment_names_device_and_versions() -> None:
    named = environment(torch.device("cpu"))
    assert named["device"].startswith("cpu (")
    assert {"python", "torch", "transformers", "hf-vdneuron"} <= named.keys()
