"""What a run leaves of its way: curves without holes, and the posterior as it was before the cut."""

import json
from math import inf, isclose, isfinite, log, nan
from pathlib import Path

import pytest
import torch
from runs import PRUNING, make_trainer
from transformers import TrainerControl

from hf_vdneuron.elbo import num_weights
from hf_vdneuron.history import PosteriorCallback, report_training
from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.relevance import log_alpha_histogram
from hf_vdneuron.report import Curve, SizesReport
from hf_vdneuron.schedules import PhasePlan
from hf_vdneuron.sublayers import Unit
from hf_vdneuron.trainer import VDTrainer


PLAN = PhasePlan(2, 3, 1)


def test_curves_are_read_from_the_log() -> None:
    training = report_training(
        [
            {"loss": 0.5, "heads": 8, "learning_rate": 1e-3, "grad_norm": 2.0, "step": 1},
            {"dense_score": 0.5, "step": 1},
            {"loss": 0.25, "heads": 6, "step": 2},
            {"train_runtime": 1.0, "step": 2},
        ],
        PLAN,
    )
    assert training.phases == PLAN
    assert training.dropout_rates is None
    assert training.curves == {
        "loss": Curve([1, 2], [0.5, 0.25]),
        "heads": Curve([1, 2], [8, 6]),
        "learning_rate": Curve([1], [1e-3]),
    }


@pytest.mark.parametrize("value", [inf, -inf, nan], ids=str)
def test_what_json_does_not_know_is_left_out(value: float) -> None:
    log_history = [{"expected_speedup": 1.0, "step": 1}, {"expected_speedup": value, "loss": value, "step": 2}]
    assert report_training(log_history, PLAN).curves == {"expected_speedup": Curve([1], [1.0])}


BY_ACCURACY = Tolerance("accuracy", 0.1, greater_is_better=True)


def sizes_log(values: list[float], **more: float) -> list[dict[str, float]]:
    cuts = [{"size_speedup": 1.5 + index, "size_value": value, "step": 3} for index, value in enumerate(values)]
    return [{"size_dense_accuracy": 0.9, "step": 1}, *cuts, {**more, "step": 6}]


CHOICE = {"size_dense": 0.9, "size_limit": 0.8}


@pytest.mark.parametrize(
    ("values", "chosen"), [([0.9, 0.8, 0.7], 1), ([0.9, 0.7, 0.8], 2), ([0.7, 0.6, nan], None)], ids=str
)
def test_the_sizes_to_choose_from_are_read_from_the_log(values: list[float], chosen: int | None) -> None:
    speedup = 1.0 if chosen is None else 1.5 + chosen
    log_history = [*sizes_log(values, size_chosen=speedup, **CHOICE), {"size_final": 0.85, "step": 9}]
    sizes = report_training(log_history, PLAN, BY_ACCURACY).sizes
    finite = [value for value in values if isfinite(value)]
    assert sizes == SizesReport(
        metric="accuracy",
        dense=0.9,
        limit=0.8,
        speedups=[1.5, 2.5, 3.5][: len(finite)],
        values=finite,
        chosen=chosen,
        final=0.85,
    )


def test_a_run_that_was_stopped_before_it_chose_has_no_sizes() -> None:
    assert report_training(sizes_log([]), PLAN, BY_ACCURACY).sizes is None
    assert report_training(sizes_log([0.9], size_chosen=1.5, **CHOICE), PLAN).sizes is None


def test_sizes_are_those_of_the_latest_choice() -> None:
    first, second = (sizes_log(values, size_chosen=1.5, **CHOICE) for values in ([0.9, 0.8, 0.7], [0.85]))
    assert report_training([*first, *second], PLAN, BY_ACCURACY).sizes.values == [0.85]


def run(folder: Path, **options: object) -> VDTrainer:
    trainer = make_trainer(folder, trainer_options={"callbacks": [PosteriorCallback()]}, **{**PRUNING, **options})
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


@pytest.mark.parametrize("fractions", [{}, {"recover_fraction": 0.0}], ids=["with recovery", "without recovery"])
def test_the_posterior_is_seen_before_the_cut(fractions: dict[str, float], tmp_path: Path) -> None:
    trainer = run(tmp_path, **fractions, target_sparsity=0.5)
    training = report_training(trainer.state.log_history, trainer.plan)
    rates = training.dropout_rates
    assert {"loss", "nll", "kl", "heads", "neurons"} <= training.curves.keys()
    assert rates.counts.keys() == {"head", "neuron"}
    assert sum(map(sum, rates.counts.values())) == num_weights(trainer.model)
    assert any(isclose(edge, log(99)) for edge in rates.log_alpha_edges)
    # Masked weights have a dropout rate of 1, beyond every edge: after the cut the last bin holds them.
    after_cut = log_alpha_histogram(trainer.model, torch.tensor(rates.log_alpha_edges))
    assert rates.counts["neuron"][-1] < after_cut[Unit.NEURON][-1]
    logged = [entry["step"] for entry in trainer.state.log_history if "dropout_rates" in entry]
    assert logged == [trainer.plan.recover_start]


def test_the_histogram_survives_being_resumed(tmp_path: Path) -> None:
    whole = run(tmp_path, save_strategy="steps", save_steps=9)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    reports = [report_training(trainer.state.log_history, trainer.plan) for trainer in (whole, resumed)]
    assert reports[0].dropout_rates == reports[1].dropout_rates
    assert reports[0].dropout_rates is not None
    assert json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]


def test_without_sparsification_there_is_nothing_to_see(tmp_path: Path) -> None:
    trainer = run(tmp_path, sparsify_fraction=0.0, max_steps=2)
    assert report_training(trainer.state.log_history, trainer.plan).dropout_rates is None


@pytest.mark.parametrize(("step", "is_seen"), [(4, False), (6, True), (8, False), (12, False)])
def test_a_run_that_stops_within_sparsification_is_looked_at(step: int, is_seen: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.state.max_steps, trainer.state.global_step = 12, step
    PosteriorCallback().on_train_end(trainer.args, trainer.state, TrainerControl(), model=trainer.model)
    assert bool(trainer.state.log_history) == is_seen
    if is_seen:
        (entry,) = trainer.state.log_history
        assert torch.tensor(list(entry["dropout_rates"]["counts"].values())).sum() == num_weights(trainer.model)
