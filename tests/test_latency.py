"""Forwards are timed in turns, on inputs without padding."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_vdneuron.latency import measure_latency, text_inputs


class Sleeper(nn.Module):
    """Takes its time, and counts its turns in a list it shares with others."""

    def __init__(self, name: str, turns: list[str]) -> None:
        super().__init__()
        self.name, self.turns = name, turns

    def forward(self, **inputs: Mapping[str, Tensor]) -> None:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.turns.append(self.name)
        for _ in range(200 if self.name == "slow" else 1):
            inputs["input_ids"].sum()


def test_models_take_turns() -> None:
    turns: list[str] = []
    models = {name: Sleeper(name, turns) for name in ("slow", "fast")}
    seconds = measure_latency(models, text_inputs(batch_size=2, length=3), rounds=5)
    assert turns == ["slow", "fast"] * 7
    assert seconds["slow"] > seconds["fast"] > 0


def test_inputs_have_no_padding() -> None:
    inputs = text_inputs(batch_size=2, length=3)
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), (2, 3)
    )
    assert inputs["attention_mask"].all()
