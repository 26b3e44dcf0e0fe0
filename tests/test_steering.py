"""A run with a target arrives at it, and the KL weight moves towards it."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import NUM_ROWS, PRUNING, make_trainer, tiny_bert
from torch import nn
from transformers import PreTrainedModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs, unit_counts
from hf_vdneuron.config import VDConfig
from hf_vdneuron.latency import device_name
from hf_vdneuron.latency_table import LatencyTable
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.relevance import expected_units, unit_relevance
from hf_vdneuron.schedules import (
    CONTROLLER_GAIN,
    KEPT_RATE,
    PhasePlan,
    first_kl_weight,
    kl_brake,
    removal_path,
    steer_kl_weight,
)
from hf_vdneuron.steering import FURTHEST, Steering
from hf_vdneuron.sublayers import Unit
from hf_vdneuron.trainer import VDTrainer


LENGTH = 6

TARGETS: dict[str, dict[str, float]] = {
    "speedup": {"target_speedup": 1.6},
    "sparsity": {"target_sparsity": 0.4},
    "parameters": {"target_params": 4_000},
}


def steered(folder: Path, model: PreTrainedModel | None = None, **options: Any) -> VDTrainer:
    options = PRUNING | {"kl_weight": None} | options
    return make_trainer(folder, model, trainer_options={"max_length": LENGTH}, **options)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_run_arrives_at_its_target(target: dict[str, float], tmp_path: Path) -> None:
    trainer = steered(tmp_path, **target)
    dense = Costs(trainer.model, length=LENGTH)
    model = trainer.train() and trainer.prune()
    left = Costs(model, length=LENGTH)
    cheapest = min(dense.weights({}) - dense.weights({part.path: part.num_units - 1}) for part in dense.sublayers)
    (name, asked), *_ = target.items()
    if name == "target_params":
        assert 0 <= asked - model.num_parameters() <= cheapest + 1
    elif name == "target_sparsity":
        assert 0 <= (1 - left.weights({}) / dense.weights({})) - asked <= cheapest / dense.weights({})
    else:
        speedup = dense.macs({}) / left.macs({})
        assert dense.macs({}) / (left.macs({}) + LENGTH * cheapest) < asked <= speedup


def test_a_fixed_weight_stays_fixed_and_the_target_is_met_all_the_same(tmp_path: Path) -> None:
    trainer = steered(tmp_path, target_speedup=1.6, kl_weight=4.0)
    trainer.train()
    assert {logs["kl_weight"] for logs in trainer.state.log_history if "kl_weight" in logs} == {0.0, 4.0}
    costs = Costs(trainer.model, length=LENGTH)
    assert costs.macs({}) / costs.macs(unit_counts(costs.sublayers, read_mask(trainer.model))) >= 1.6


@pytest.mark.parametrize(("share", "rises"), [(1.0, True), (0.0, False)], ids=["lags", "is-ahead"])
def test_the_weight_follows_the_posterior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, rises: bool
) -> None:
    """Where nothing goes the weight rises all the way, where all is gone at once it is zero."""
    looks = []

    def expected(model: nn.Module) -> dict[str, float]:
        looks.append(model)
        left = share if len(looks) > 1 else 1.0
        return {part.path: left * part.num_units for part in find_sublayers(model)}

    monkeypatch.setattr("hf_vdneuron.steering.expected_units", expected)
    trainer = steered(tmp_path, target_speedup=2.0, max_steps=60)
    trainer.train()
    weights = [logs["kl_weight"] for logs in trainer.state.log_history if logs.get("kl_weight")]
    assert len(looks) == 21
    assert weights[0] == pytest.approx(first_kl_weight(NUM_ROWS, 1 / 2), rel=0.1)
    if rises:
        steps = [after - before for before, after in pairwise(weights[1:])]
        assert all(step >= 0 for step in steps)
        assert weights[-1] > 10 * weights[0]
    else:
        assert weights[1:] == []  # what is all gone needs no pull at all


@pytest.mark.parametrize("config", [None, VDConfig(heads=False), VDConfig(exclude=["*.layer.0.*"])], ids=str)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_what_cannot_go_is_no_part_of_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: dict[str, float], config: VDConfig | None
) -> None:
    """A posterior that keeps what the target leaves, at the usual rate, has arrived, whatever else there is."""
    model = patch_model_(tiny_bert(), config)
    start = expected_units(model)
    trainer = steered(tmp_path, model, **(target | ({"target_params": 4_700} if "target_params" in target else {})))
    plan, args = PhasePlan(0, 100, 0), trainer.args
    args.target_sparsity = args.target_sparsity and 0.2
    args.target_speedup = args.target_speedup and 1.2
    steering = Steering(LENGTH, lambda: NUM_ROWS)
    steering.begin_(model, args, plan, step=0)
    steering.look_(model, plan, step=0)
    budget = steering._course.budget
    removable = {path: bool(values.amin(0).isfinite().all()) for path, values in unit_relevance(model).items()}
    least = budget.cost({path: 0 for path, can in removable.items() if can})
    share = KEPT_RATE * (budget.limit - least) / (budget.cost({}) - least)
    monkeypatch.setattr(
        "hf_vdneuron.steering.expected_units",
        lambda _: {path: units * (share if removable[path] else 1) for path, units in start.items()},
    )
    steering.look_(model, plan, step=100)
    assert steering.removed == pytest.approx(1)


def test_the_weight_stays_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = steered(tmp_path, target_speedup=2.0, max_steps=600, logging_steps=20)
    monkeypatch.setattr("hf_vdneuron.steering.steer_kl_weight", lambda weight, **_: 2 * weight)
    monkeypatch.setattr("hf_vdneuron.steering.kl_brake", lambda *_: 1.0)
    trainer.train()
    weights = [logs["kl_weight"] for logs in trainer.state.log_history if logs.get("kl_weight")]
    assert weights[-1] == pytest.approx(FURTHEST * first_kl_weight(NUM_ROWS, 1 / 2))


def test_one_move_of_the_controller() -> None:
    assert steer_kl_weight(0.02, behind=0.0, share_of_phase=0.01) == 0.02
    moved = steer_kl_weight(0.02, behind=0.1, share_of_phase=0.1)
    assert moved == pytest.approx(0.02 * 2.718281828 ** (CONTROLLER_GAIN / 100))
    assert steer_kl_weight(moved, behind=-0.1, share_of_phase=0.1) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("removed", "brake"), [(-0.1, 1.0), (0.5, 1.0), (0.86, 1.0), (0.93, 0.5), (1.0, 0.0), (1.3, 0.0)]
)
def test_the_brake_holds_where_a_posterior_is_ahead(removed: float, brake: float) -> None:
    assert kl_brake(0.5, removed) == pytest.approx(brake)


def test_the_path_rises_from_nothing_to_all() -> None:
    path = [removal_path(step / 50) for step in range(51)]
    assert path == sorted(path)
    assert path[0] == 0
    assert path[-1] == pytest.approx(1, abs=0.01)


def test_a_target_out_of_reach_ends_a_run_before_its_first_step(tmp_path: Path) -> None:
    trainer = steered(tmp_path, target_sparsity=0.9)
    trainer = VDTrainer(
        model=tiny_bert(),
        args=trainer.args,
        vd_config=VDConfig(exclude=("*attention*",)),
        train_dataset=trainer.train_dataset,
    )
    with pytest.raises(ValueError, match=r"`target_sparsity` is 0\.9, out of reach: with every patched"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_leaves_next_to_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = PhasePlan(0, 100, 0)
    for target, is_warned in ((40.0, False), (200.0, True)):
        model = patch_model_(tiny_bert())
        Steering(LENGTH, lambda: NUM_ROWS).begin_(model, steered(tmp_path, target_speedup=target).args, plan, step=0)
        assert ("may do no better than chance" in caplog.text) == is_warned


def test_latency_is_measured_once_and_kept_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(model: PreTrainedModel, inputs: dict[str, Any]) -> LatencyTable:
        calls.append(tuple(inputs["input_ids"].shape))
        return LatencyTable(
            len(inputs["input_ids"]),
            LENGTH,
            device_name(model.device),
            str(model.dtype),
            1.0,
            0.1,
            {Unit.HEAD: [2, 4], Unit.NEURON: [12, 24]},
            {Unit.HEAD: [0.3, 0.4], Unit.NEURON: [0.4, 0.7]},
        )

    monkeypatch.setattr("hf_vdneuron.steering.measure_latency_table", measured)
    options = {"target_speedup": 1.5, "speedup_from": "latency", "latency_batch_size": 2}
    trainer = steered(tmp_path, save_strategy="steps", save_steps=6, **options)
    trainer.train()
    assert calls == [(2, LENGTH)]
    expected = read_mask(trainer.model)
    table = trainer._steering._table
    resumed = steered(tmp_path, save_strategy="steps", save_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert len(calls) == 1
    counts = unit_counts(Costs(resumed.model, length=LENGTH).sublayers, read_mask(resumed.model))
    assert counts == unit_counts(Costs(trainer.model, length=LENGTH).sublayers, expected)
    assert table.predict(Costs(trainer.model, length=LENGTH).sublayers, counts) <= table.dense / 1.5
    other = steered(tmp_path, **{**options, "latency_batch_size": 3})
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert calls == [(2, LENGTH), (3, LENGTH)]  # measured otherwise, it would say nothing


def test_a_model_that_cannot_be_timed_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        trainer_options={"max_length": 1_000},
        **(PRUNING | {"kl_weight": None, "target_speedup": 1.5, "speedup_from": "latency"}),
    )
    with pytest.raises(ValueError, match=r"cannot be timed on 1 x 1000 token ids: .* Lower `max_length`"):
        trainer.train()


def test_what_an_earlier_run_removed_stays_removed(tmp_path: Path) -> None:
    first = steered(tmp_path, target_speedup=1.3)
    first.train()
    gone = read_mask(first.model).keep
    second = steered(tmp_path, first.model, target_speedup=1.6)
    second.train()
    kept = read_mask(second.model).keep
    assert any(not keep.all() for keep in gone.values())
    assert [path for path, keep in gone.items() if (kept[path] & ~keep).any()] == []


def test_the_way_begins_where_an_earlier_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A posterior that moves not at all has gone none of it, and one that lets go what is left over has arrived."""
    model = patch_model_(tiny_bert())
    sublayers = find_sublayers(model)
    half = {part.path: torch.arange(part.num_units) < part.num_units // 4 * 3 for part in sublayers}
    mask_model_(model, RelevanceMask({part.path: half[part.path].expand(len(part.sides), -1) for part in sublayers}))
    start = expected_units(model)
    trainer = steered(tmp_path, model, target_speedup=2.0)
    steering, plan = Steering(LENGTH, lambda: NUM_ROWS), PhasePlan(0, 100, 0)
    steering.begin_(model, trainer.args, plan, step=0)
    steering.look_(model, plan, step=0)
    steering.look_(model, plan, step=50)
    assert steering.removed == pytest.approx(0)
    # Three quarters are there, and the target leaves a half of all: two thirds of them.
    left = {path: units * 2 / 3 * KEPT_RATE for path, units in start.items()}
    monkeypatch.setattr("hf_vdneuron.steering.expected_units", lambda _: left)
    steering.look_(model, plan, step=100)
    assert steering.removed == pytest.approx(1)


def test_a_target_that_an_earlier_run_met_is_refused(tmp_path: Path) -> None:
    first = steered(tmp_path, target_speedup=2.0)
    first.train()
    with pytest.raises(ValueError, match=r"`target_speedup` is 1\.2, which the model meets with what an earlier run"):
        steered(tmp_path, first.model, target_speedup=1.2).train()
