"""As small as it gets within a tolerance: against a search over every size, and in whole runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from runs import PRUNING, StopAt, make_trainer, rows, tiny_bert
from torch import Tensor, nn
from transformers import EvalPrediction

from hf_vdneuron.budget import Costs, speedup, unit_counts
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.keepsake import Keepsake
from hf_vdneuron.masks import mask_model_, read_mask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.schedules import PhasePlan
from hf_vdneuron.tolerance import (
    CHOSEN_SPEEDUP,
    CUT_SPEEDUP,
    CUT_VALUE,
    DENSE_VALUE,
    FINAL_VALUE,
    size_mask,
    sizes_at,
)
from hf_vdneuron.trainer import VDTrainer


LENGTH = 8
BY_SCORE = Tolerance("score", 0.1, greater_is_better=True)
BY_LOSS = Tolerance("loss", 0.1, greater_is_better=False)


@torch.no_grad()
def posterior(seed: int = 0) -> nn.Module:
    """A patched model whose weights differ in relevance."""
    model = patch_model_(tiny_model("bert"))
    generator = torch.Generator().manual_seed(seed)
    for layer in variational_layers(model).values():
        layer.log_var.add_(4 * torch.randn(layer.log_var.shape, generator=generator))
    return model


SHARES = (0.9, 0.5, 0.3, 0.1, 0.03)


@pytest.mark.parametrize("share_left", SHARES)
def test_a_size_costs_what_it_says(share_left: float) -> None:
    model = posterior()
    costs = Costs(model, length=LENGTH)
    kept = costs.macs(unit_counts(costs.sublayers, size_mask(model, unit_relevance(model), share_left, length=LENGTH)))
    unit = max(costs.macs({}) - costs.macs({part.path: part.num_units - 1}) for part in costs.sublayers)
    assert share_left * costs.macs({}) - unit <= kept <= share_left * costs.macs({})


def test_sizes_are_nested() -> None:
    model = posterior()
    for share in SHARES:
        before = read_mask(model).keep
        mask_model_(model, size_mask(model, unit_relevance(model), share, length=LENGTH))
        assert not any((keep & ~before[path]).any() for path, keep in read_mask(model).keep.items())


def test_a_size_is_that_of_the_posterior_and_not_of_the_model() -> None:
    first, second = (
        size_mask(posterior(), unit_relevance(posterior(seed)), 0.5, length=LENGTH).keep for seed in (1, 2)
    )
    assert any(not torch.equal(keep, second[path]) for path, keep in first.items())


@pytest.mark.parametrize(
    ("recover_steps", "expected"),
    [
        pytest.param(50, {30 + 10 * number: [number] for number in range(6)}, id="ten steps each"),
        pytest.param(2, {30: [0, 1], 31: [2, 3], 32: [4, 5]}, id="fewer steps than sizes"),
        pytest.param(0, {30: [*range(6)]}, id="no step"),
    ],
)
def test_when_a_run_turns_to_a_size(recover_steps: int, expected: dict[int, list[int]]) -> None:
    plan = PhasePlan(20, 10, recover_steps)
    found = {step: numbers for step in range(200) if (numbers := sizes_at(plan, step, 5))}
    assert found == expected
    assert [number for numbers in found.values() for number in numbers] == [*range(6)]


@pytest.mark.parametrize("threshold", [0.0, 0.04, 0.3, 0.5, 0.77, 1.0])
def test_halving_comes_as_near_as_it_can(threshold: float) -> None:
    keepsake = Keepsake()
    for _ in range(8):
        share = keepsake.next_share
        if share >= threshold:
            keepsake.share_left = share
        else:
            keepsake.too_small = share
    assert keepsake.too_small <= threshold <= keepsake.share_left
    assert keepsake.share_left - keepsake.too_small == 1 / 2**8


def test_a_keepsake_is_the_model_that_was_kept(tmp_path: Path) -> None:
    model = posterior()
    mask_model_(model, size_mask(model, unit_relevance(model), 0.5, length=LENGTH))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Keepsake().save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    keepsake, loaded = Keepsake(), Keepsake()
    keepsake.take_(model, 0.75, 0.5)
    keepsake.is_final, keepsake.too_small = True, 0.25
    keepsake.save(tmp_path)
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            value.zero_()
    loaded.load_(tmp_path)
    assert (loaded.value, loaded.share_left, loaded.too_small, loaded.is_final) == (0.75, 0.5, 0.25, True)
    loaded.give_back_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded.load_(tmp_path / "elsewhere")
    assert loaded == Keepsake()


@pytest.mark.parametrize(
    ("tolerance", "value", "allowed"),
    [
        pytest.param(BY_SCORE, 0.8, True, id="at the limit"),
        pytest.param(BY_SCORE, 0.7999, False, id="below it"),
        pytest.param(BY_SCORE, 0.95, True, id="better"),
        pytest.param(BY_LOSS, 1.0, True, id="loss at the limit"),
        pytest.param(BY_LOSS, 1.001, False, id="loss above it"),
        pytest.param(BY_SCORE, float("nan"), False, id="not a number"),
        pytest.param(BY_LOSS, float("nan"), False, id="loss not a number"),
    ],
)
def test_what_is_allowed(tolerance: Tolerance, value: float, allowed: bool) -> None:
    assert tolerance.allows(value, dense=0.9) is allowed


# ---- In a run ----


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def judged(tmp_path: Path, **options: Any) -> VDTrainer:
    given = {"eval_dataset": rows(), "compute_metrics": accuracy, **options.pop("trainer_options", {})}
    return make_trainer(tmp_path, trainer_options=given, **options)


#: Three steps for each of five sizes; the posterior in closed form or trained.
SEARCH = {"max_steps": 18, "finetune_fraction": 3.0, "recover_fraction": 15.0}
POSTERIORS = pytest.mark.parametrize(
    "how",
    [
        pytest.param({**SEARCH, "sparsify_fraction": 0.0}, id="in closed form"),
        pytest.param({**SEARCH, **PRUNING, "max_steps": 21, "sparsify_fraction": 3.0}, id="trained"),
    ],
)


def play_(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> Iterator[float]:
    """Let the evaluation say so, one after the other."""
    left = iter(values)
    monkeypatch.setattr(VDTrainer, "_judge", lambda self: next(left))
    return left


def logged(trainer: VDTrainer, name: str) -> list[float]:
    return [logs[name] for logs in trainer.state.log_history if name in logs]


@POSTERIORS
@pytest.mark.parametrize(
    ("verdicts", "shares"),
    [
        pytest.param("ggggg", [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32], id="all are good"),
        pytest.param("gbgbg", [1 / 2, 1 / 4, 3 / 8, 5 / 16, 11 / 32], id="some are good"),
        pytest.param("bbbbg", [1 / 2, 3 / 4, 7 / 8, 15 / 16, 31 / 32], id="only a large one is good"),
    ],
)
def test_the_smallest_good_size_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], verdicts: str, shares: list[float]
) -> None:
    # Once before fine-tuning. The dense model was scored on these rows already.
    values = {"g": 0.5, "b": 9.0}
    left = play_(monkeypatch, [0.0, *(values[verdict] for verdict in verdicts)])
    trainer = judged(tmp_path, max_loss_increase=1.0, **how)
    trainer.train()
    assert next(left, None) is None
    speedups = logged(trainer, CUT_SPEEDUP)
    assert logged(trainer, CUT_VALUE) == [values[verdict] for verdict in verdicts]
    for speed, share in zip(speedups, shares, strict=True):
        assert 1 / speed <= share + 1e-9
    chosen = max(speed for speed, verdict in zip(speedups, verdicts, strict=True) if verdict == "g")
    assert logged(trainer, CHOSEN_SPEEDUP) == [chosen]
    assert logged(trainer, FINAL_VALUE) == [0.5]
    assert speedup(trainer.model, read_mask(trainer.model), length=trainer.max_length) == chosen


@POSTERIORS
def test_what_is_handed_back_is_what_was_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """To the last bit, though a worse one was trained behind it."""
    play_(monkeypatch, [0.0, 0.5, 9.0, 9.0, 9.0, 9.0])
    kept: list[dict[str, Tensor]] = []
    take_ = Keepsake.take_
    monkeypatch.setattr(Keepsake, "take_", lambda self, *given: (take_(self, *given), kept.append(self.state)))
    trainer = judged(tmp_path, max_loss_increase=1.0, **how)
    trainer.train()
    state = trainer.model.state_dict()
    assert len(kept) == 2  # the dense one, and one size
    assert all(torch.equal(state[name], value) for name, value in kept[-1].items())
    assert any(not torch.equal(value, kept[0][name]) for name, value in kept[-1].items())


@POSTERIORS
def test_where_no_size_will_do_the_model_is_as_it_was_fine_tuned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    play_(monkeypatch, [0.0, *[9.0] * 5])
    trainer = judged(tmp_path, max_loss_increase=1.0, **how)
    trainer.train()
    monkeypatch.undo()
    assert "nothing is removed" in caplog.text
    dense = trainer.milestone("dense_loss")
    assert trainer.milestone(FINAL_VALUE) == dense
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dense, abs=1e-6)
    teacher = trainer.teacher.state_dict()
    dense_state = trainer.prune().state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in dense_state.items())


def test_each_size_has_a_warm_up_and_a_decay(tmp_path: Path) -> None:
    trainer = judged(tmp_path, max_loss_increase=1.0, sparsify_fraction=0.0, warmup_steps=1, **SEARCH)
    trainer.train()
    rates = [logs["learning_rate"] for logs in trainer.state.log_history if "learning_rate" in logs]
    assert rates[3:] == pytest.approx(rates[3:6] * 5)
    assert rates[3] > rates[5] > 0


@POSTERIORS
@pytest.mark.parametrize(
    "options",
    [{"max_metric_drop": 0.05, "metric_for_best_model": "accuracy"}, {"max_loss_increase": 0.02}],
    ids=["accuracy", "loss"],
)
def test_a_run_ends_within_its_tolerance(tmp_path: Path, how: dict[str, Any], options: dict[str, Any]) -> None:
    trainer = judged(tmp_path, **options, **how)
    trainer.train()
    tolerance, dense = trainer.args.tolerance, trainer.milestone(DENSE_VALUE)
    final = trainer.milestone(FINAL_VALUE)
    assert tolerance.allows(final, dense)
    trainer.prune()
    assert trainer.evaluate()[f"eval_{tolerance.metric}"] == pytest.approx(final, abs=1e-5)


@POSTERIORS
def test_without_recovery_every_size_is_judged_at_the_end(tmp_path: Path, how: dict[str, Any]) -> None:
    trainer = judged(tmp_path, max_loss_increase=100.0, **{**how, "recover_fraction": 0.0})
    trainer.train()
    assert len(logged(trainer, CUT_VALUE)) == trainer.args.num_sizes
    assert trainer.milestone(FINAL_VALUE) == logged(trainer, CUT_VALUE)[-1]


@pytest.mark.parametrize("stop", [2, 3, 6, 15])
def test_a_run_that_is_stopped_is_judged(tmp_path: Path, stop: int) -> None:
    trainer = judged(tmp_path, max_loss_increase=100.0, sparsify_fraction=0.0, **SEARCH)
    trainer.add_callback(StopAt(stop))
    trainer.train()
    now = speedup(trainer.model, read_mask(trainer.model), length=trainer.max_length)
    if stop < 3:
        assert now == 1
        assert trainer.milestone(FINAL_VALUE) is None
    else:
        assert now == logged(trainer, CHOSEN_SPEEDUP)[-1] > 1
        assert trainer.milestone(FINAL_VALUE) is not None


@POSTERIORS
def test_a_resumed_run_chooses_the_same(tmp_path: Path, how: dict[str, Any]) -> None:
    """Before, within and at the end of the search."""
    folder = tmp_path / "whole"

    def run(output_dir: Path, resume_from: int | None = None) -> dict[str, Tensor]:
        options = {"save_strategy": "steps", "save_steps": 1, "max_loss_increase": 0.005, **how}
        trainer = judged(output_dir, model=tiny_bert(dropout=0.1), **options)
        trainer.train(resume_from_checkpoint=resume_from and str(folder / f"checkpoint-{resume_from}"))
        return trainer.model.state_dict()

    expected = run(folder)
    assert any(not keep.all() for name, keep in expected.items() if ".keep_" in name)
    last = how["max_steps"]
    for step in (2, last - 15, last - 12, last - 11, last - 1):
        state = run(tmp_path / str(step), step)
        assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_sizes_are_saved_as_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_(monkeypatch, [0.0, 0.5, 9.0, 0.5, 0.5, 9.0])
    trainer = judged(tmp_path, max_loss_increase=1.0, save_sizes=True, bf16=True, sparsify_fraction=0.0, **SEARCH)
    trainer.train()
    sizes = [speed for number, speed in enumerate(logged(trainer, CUT_SPEEDUP)) if number in (0, 2, 3)]
    folders = sorted((tmp_path / "sizes").iterdir())
    assert [folder.name for folder in folders] == [f"{size:.2f}x" for size in sizes]
    dense = Costs(tiny_bert(), length=trainer.max_length).macs({})
    for folder, size in zip(folders, sizes, strict=True):
        model = from_pretrained(folder)
        assert dense / Costs(model, length=trainer.max_length).macs({}) == pytest.approx(size)
        assert model.dtype == torch.float32


def test_a_posterior_is_cut_to_another_size_by_resuming(tmp_path: Path) -> None:
    first = judged(tmp_path / "first", target_speedup=1.3, save_posterior=True, max_steps=12)
    first.train()
    (checkpoint,) = (tmp_path / "first").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{first.plan.recover_start}"
    second = judged(tmp_path / "second", target_speedup=2.0, max_steps=12)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.milestone("dense_loss") == first.milestone("dense_loss")
    kept = [read_mask(trainer.model).keep for trainer in (first, second)]
    assert all(
        bool((small.all(0) <= large.all(0)).all()) for large, small in zip(*map(dict.values, kept), strict=True)
    )
    assert speedup(second.model, second.mask(), length=second.max_length) >= 2.0


BY_ACCURACY = {"max_metric_drop": 0.3, "metric_for_best_model": "accuracy"}


@pytest.mark.parametrize("first", [{"target_speedup": 1.3}, {"max_loss_increase": 0.1}], ids=["target", "tolerance"])
def test_a_posterior_is_judged_by_a_metric_of_its_own(tmp_path: Path, first: dict[str, Any]) -> None:
    """Whatever the run before was judged by."""
    judged(tmp_path, save_posterior=True, **first).train()
    trainer = judged(tmp_path, **BY_ACCURACY)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert trainer.milestone(DENSE_VALUE) == trainer.milestone("dense_accuracy")


def test_a_posterior_without_a_judged_dense_model_is_refused(tmp_path: Path) -> None:
    judged(tmp_path, target_speedup=1.3, save_posterior=True, trainer_options={"compute_metrics": None}).train()
    with pytest.raises(ValueError, match=r"step 8 does not say how good the dense model was"):
        judged(tmp_path, **BY_ACCURACY).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_tolerance_goes_with_scores_on_the_way(tmp_path: Path) -> None:
    """Of several sets, whose metrics have the names of their sets."""
    data = {"one": rows()[:24], "two": rows()[24:]}
    trainer = judged(
        tmp_path, eval_strategy="steps", eval_steps=1, trainer_options={"eval_dataset": data}, **BY_ACCURACY
    )
    trainer.train()
    assert trainer.milestone(FINAL_VALUE) is not None


def test_a_tolerance_can_be_judged_on_several_sets(tmp_path: Path) -> None:
    data = {"one": rows()[:24], "two": rows()[24:]}
    trainer = judged(tmp_path, max_loss_increase=0.1, trainer_options={"eval_dataset": data})
    trainer.train()
    both = judged(tmp_path, max_loss_increase=0.1)
    both.train()
    assert trainer.milestone(DENSE_VALUE) == pytest.approx(both.milestone(DENSE_VALUE), abs=1e-6)


def test_a_run_without_an_evaluation_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`max_loss_increase 0.1` is asked for.*pass an `eval_dataset`"):
        make_trainer(tmp_path, max_loss_increase=0.1)


def test_a_metric_that_the_evaluation_lacks_is_refused_before_training(tmp_path: Path) -> None:
    trainer = judged(tmp_path, max_metric_drop=0.1, metric_for_best_model="f1")
    with pytest.raises(ValueError, match=r"gives no `f1`.*expected one of accuracy, loss"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_metric_drop": 0.1}, "nothing says of which metric: set `metric_for_best_model`"),
        ({"max_loss_increase": -0.1}, "`max_loss_increase` is -0.1: expected a number of at least 0"),
        ({"max_loss_increase": 0.1, "target_speedup": 2.0}, "expected at most one target"),
        ({"max_metric_drop": 0.1, "metric_for_best_model": "eval_loss"}, "use `max_loss_increase`"),
        ({"max_loss_increase": 0.1, "speedup_from": "latency"}, "asks for no speed-up"),
        ({"save_posterior": True, "save_total_limit": 1}, "would take its checkpoint away"),
        ({"save_posterior": True, "sparsify_fraction": 0.0}, "no posterior to save"),
    ],
    ids=[
        *("no metric", "negative", "beside a target", "loss as a metric", "beside seconds"),
        *("posterior that is rotated away", "posterior that is never there"),
    ],
)
def test_wrong_tolerances_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judged(tmp_path, **options)
