"""One shot: targets are met, what matters stays, and the dense model is left alone."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import rows, tiny_bert
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_vdneuron
from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import BodyCost, body_cost
from hf_vdneuron.config import PriorType, VDConfig
from hf_vdneuron.layers import dense_layer
from hf_vdneuron.one_shot import sparsify
from hf_vdneuron.sublayers import Unit


LENGTH = 8

#: Tells from the dense and the smaller model whether a target is met.
Reached = Callable[[PreTrainedModel, PreTrainedModel], bool]


def data() -> list[dict[str, Tensor]]:
    columns = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    return [
        dict(zip(columns, parts, strict=True)) for parts in zip(*(c.chunk(4) for c in columns.values()), strict=True)
    ]


@torch.no_grad()
def half_idle() -> PreTrainedModel:
    """A model in which nothing reads every other neuron."""
    model = tiny_bert().eval()
    for sublayer in find_sublayers(model):
        if sublayer.unit is Unit.NEURON:
            dense_layer(model, sublayer.out_side.slices[0].module).weight[:, ::2] = 0
    return model


@pytest.mark.parametrize("prior", list(PriorType), ids=str)
@pytest.mark.parametrize(
    ("target", "reached"),
    [
        ({"target_speedup": 2.0}, lambda dense, small: costs(dense).macs / costs(small).macs >= 2.0),
        ({"target_sparsity": 0.4}, lambda dense, small: costs(small).weights <= 0.6 * costs(dense).weights),
        ({"target_params": 3000}, lambda dense, small: small.num_parameters() <= 3000),
    ],
    ids=["speed-up", "sparsity", "parameters"],
)
def test_targets_are_met(target: dict[str, Any], reached: Reached, prior: PriorType, tmp_path: Path) -> None:
    dense = tiny_bert().eval()
    small = sparsify(dense, data(), **target, vd_config=VDConfig(prior=prior), max_length=LENGTH)
    assert reached(dense, small)
    small.save_pretrained(tmp_path)
    loaded = hf_vdneuron.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**data()[0]).logits, small.eval()(**data()[0]).logits)


def costs(model: nn.Module) -> BodyCost:
    return body_cost(model, length=LENGTH)


@pytest.mark.parametrize("reconstruct", [True, False], ids=["reconstructed", "only cut"])
def test_what_nothing_reads_is_not_missed(reconstruct: bool) -> None:
    dense = half_idle()
    before = deepcopy(dense.state_dict())
    # Idle neurons are 21 % of the weights. Among those that go may be some that say less than the prior charges.
    config = VDConfig(heads=False)
    small = sparsify(dense, data(), target_sparsity=0.2, vd_config=config, reconstruct=reconstruct).eval()
    with torch.no_grad():
        for part in data():
            torch.testing.assert_close(small(**part).logits, dense(**part).logits, rtol=0, atol=5e-2)
    assert all(torch.equal(values, before[name]) for name, values in dense.state_dict().items())


def test_data_may_be_a_generator_and_the_model_keeps_its_mode() -> None:
    dense = tiny_bert().train()
    small = sparsify(dense, iter(data()), target_speedup=1.5, max_length=LENGTH)
    assert dense.training
    assert not small.training
    assert all(parameter.isfinite().all() for parameter in small.parameters())


def test_plain_chains_are_refused() -> None:
    with pytest.raises(TypeError, match="`Sequential` in one shot: expected a transformers model"):
        sparsify(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), [], target_speedup=2.0)


def test_reconstruction_brings_outputs_closer() -> None:
    dense = tiny_bert().eval()

    def miss(reconstruct: bool) -> float:
        small = sparsify(dense, data(), target_speedup=2.0, max_length=LENGTH, reconstruct=reconstruct).eval()
        with torch.no_grad():
            return sum((small(**part).logits - dense(**part).logits).square().sum().item() for part in data())

    assert miss(reconstruct=True) < 0.9 * miss(reconstruct=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"\(none\): expected exactly one of target_speedup"),
        ({"target_speedup": 2.0, "target_sparsity": 0.5}, "`target_speedup` and `target_sparsity`"),
        ({"target_sparsity": 1.5}, "out of reach"),
        ({"target_speedup": 0.5}, "which the complete model meets"),
        ({"target_params": 10}, "out of reach"),
        ({"target_speedup": math.inf}, "expected a finite number"),
        ({"target_sparsity": math.nan}, "expected a finite number"),
    ],
    ids=[
        "no target",
        "two targets",
        "more than all",
        "less than nothing",
        "too few parameters",
        "infinite",
        "no number",
    ],
)
def test_targets_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(tiny_bert(), data(), **options)
