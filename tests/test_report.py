"""Reports and cards of pruned models, and their timing."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from models import HEADS, LAYERS, NEURONS, tiny_model
from torch import Tensor, nn

from hf_vdneuron.latency import measure_latency, text_inputs
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.model_card import render_model_card
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.report import RunReport, dense_twin, environment, report_model, report_speed


@pytest.fixture
def pruned() -> nn.Module:
    model = tiny_model("bert", "sequence_classification")
    keep = {
        "bert.encoder.layer.0.attention": torch.zeros(2, HEADS, dtype=torch.bool),
        "bert.encoder.layer.1.feed_forward": (torch.arange(NEURONS) < 5).expand(2, -1).clone(),
    }
    return prune_model_(model, RelevanceMask(keep))


@pytest.fixture
def report(pruned: nn.Module) -> RunReport:
    return RunReport(
        dense=report_model(dense_twin(pruned), 0.9),
        pruned=report_model(pruned, 0.875),
        score_after_cut=None,
        speedup=report_speed(pruned, length=4),
        target="dropout rate above 0.99",
        task="sst2",
        seed=3,
        environment=environment(torch.device("cpu")),
    )


def test_report_counts_what_is_left(pruned: nn.Module, report: RunReport) -> None:
    assert report.dense.heads_per_layer == [HEADS] * LAYERS
    assert report.pruned.heads_per_layer == [0, HEADS, HEADS]
    assert report.pruned.neurons_per_layer == [NEURONS, 5, NEURONS]
    assert report.pruned.parameters == sum(parameter.numel() for parameter in pruned.parameters())
    assert report.dense.parameters == sum(
        p.numel() for p in tiny_model("bert", "sequence_classification").parameters()
    )
    assert report.speedup.predicted > 1
    assert report.speedup.measured == report.speedup.dense_seconds / report.speedup.pruned_seconds


def test_report_is_json(report: RunReport) -> None:
    read = json.loads(json.dumps(report.to_dict()))
    assert read["dense"]["score"] == 0.9
    assert read["pruned"]["heads_per_layer"] == [0, HEADS, HEADS]
    assert read["score_after_cut"] is None
    assert {"device", "python", "torch", "transformers"} <= read["environment"].keys()


def test_card_says_how_to_load_and_what_it_cost(report: RunReport) -> None:
    card = render_model_card(report, base_model="tiny", architecture="BertForSequenceClassification", repo_id="me/x")
    text = str(card)
    for line in (
        'model = hf_vdneuron.from_pretrained("me/x")',
        'model = AutoModelForSequenceClassification.from_pretrained("me/x", trust_remote_code=True)',
        "Do **not** pass `ignore_mismatched_sizes=True`",
        "| score on sst2 | 90.00 | 87.50 |",
        "| score right after the cut, before recovery | | not measured |",
        "| heads per layer | 4, 4, 4 | 0, 4, 4 |",
        "seed\n3",
    ):
        assert line in text
    assert "{{" not in text
    assert ModelCard(text).data.tags == ["hf_vdneuron", "pruned", "variational-dropout"]


def test_card_shows_a_score_of_zero(report: RunReport) -> None:
    card = render_model_card(
        replace(report, score_after_cut=0.0), base_model="tiny", architecture="BertModel", repo_id="me/x"
    )
    assert "before recovery | | 0.00 |" in str(card)


class Sleeper(nn.Module):
    """Takes its time, and counts its turns in a list it shares with others."""

    def __init__(self, name: str, turns: list[str]) -> None:
        super().__init__()
        self.name, self.turns = name, turns

    def forward(self, **inputs: Tensor) -> None:
        assert not self.training
        self.turns.append(self.name)
        for _ in range(200 if self.name == "slow" else 1):
            inputs["input_ids"].sum()


def test_models_take_turns() -> None:
    turns: list[str] = []
    models = {name: Sleeper(name, turns) for name in ("slow", "fast")}
    seconds = measure_latency(models, text_inputs(batch_size=2, length=3), rounds=5)
    assert turns == ["slow", "fast"] * 7
    assert seconds["slow"] > seconds["fast"] > 0
