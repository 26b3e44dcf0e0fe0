"""As small as it gets within a tolerance: against a search over every size, and in whole runs."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from runs import PRUNING, make_trainer, rows, tiny_bert
from torch import Tensor, nn
from transformers import EvalPrediction

from hf_vdneuron.budget import speedup
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.tolerance import CUT_VALUE, DENSE_VALUE, FINAL_VALUE, HALVINGS, LADDER, smallest_cut
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


def share_kept(model: nn.Module) -> float:
    """Share of the heads and neurons that the masks keep."""
    kept = torch.cat([keep.all(0) for keep in read_mask(model).keep.values()])
    return kept.float().mean().item()


@pytest.mark.parametrize("threshold", [0.15, 0.5, 0.62, 0.93, 0.985], ids=lambda share: f"good above {share:g}")
def test_the_smallest_good_cut_is_found(threshold: float) -> None:
    """Score 1 down to a size and 0 below it: what is found lies within a halved step above that size."""
    model = posterior()
    seen: list[float] = []

    def judge() -> float:
        seen.append(share_kept(model))
        return float(seen[-1] >= threshold)

    chosen, cuts = smallest_cut(model, model, BY_SCORE, 1.0, judge, length=LENGTH)
    assert min(seen) < threshold
    assert chosen is [cut for cut in cuts if cut.value == 1][-1]
    mask_model_(model, chosen.mask)
    assert share_kept(model) == min(share for share in seen if share >= threshold)
    bad = max((cut.share_left for cut in cuts if cut.value == 0), default=0.0)
    assert chosen.share_left - bad <= 0.1 / 2**HALVINGS + 1e-9


def test_cuts_are_nested_sizes_of_one_posterior() -> None:
    model = posterior()
    _, cuts = smallest_cut(model, model, BY_SCORE, 1.0, lambda: 1.0, length=LENGTH)
    assert [cut.share_left for cut in cuts[: len(LADDER)]] == list(LADDER)
    assert len(cuts) == len(LADDER) + HALVINGS
    assert all(before.speedup <= after.speedup for before, after in pairwise(cuts))
    for cut in cuts:
        assert cut.speedup == pytest.approx(speedup(model, cut.mask, length=LENGTH))
        assert 1 / cut.speedup <= cut.share_left + 1e-9
    for larger, smaller in pairwise(cuts):
        kept = [(larger.mask.keep[path].all(0), keep.all(0)) for path, keep in smaller.mask.keep.items()]
        # But for the units that fill up what is left of a budget.
        assert sum(int((small & ~large).sum()) for large, small in kept) <= 2


def test_the_model_carries_the_mask_that_it_had() -> None:
    model = posterior()
    path, keep = next(iter(read_mask(model).keep.items()))
    keep[:, 0] = False
    mask_model_(model, RelevanceMask({path: keep}))
    _, cuts = smallest_cut(model, model, BY_SCORE, 1.0, lambda: 1.0, length=LENGTH)
    assert torch.equal(read_mask(model).keep[path], keep)
    assert all(not cut.mask.keep[path].all(0)[0] for cut in cuts)


def test_without_a_good_cut_all_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    model = posterior()
    chosen, cuts = smallest_cut(model, model, BY_LOSS, 1.0, lambda: 1.2, length=LENGTH)
    assert chosen is None
    assert max(cut.share_left for cut in cuts) > LADDER[0]
    assert "nothing is removed" in caplog.text


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


@pytest.mark.parametrize(
    "options",
    [{"max_metric_drop": 0.05, "metric_for_best_model": "accuracy"}, {"max_loss_increase": 0.02}],
    ids=["accuracy", "loss"],
)
def test_a_run_ends_with_the_smallest_that_was_good_enough(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = judged(tmp_path, recover_fraction=0.0, **options)
    trainer.train()
    tolerance, dense = trainer.args.tolerance, trainer.milestone(DENSE_VALUE)
    values = [logs[CUT_VALUE] for logs in trainer.state.log_history if CUT_VALUE in logs]
    assert len(values) >= len(LADDER)
    final = trainer.milestone(FINAL_VALUE)
    assert tolerance.allows(final, dense)
    # Cuts are logged from the largest on.
    good = [value for value in values if tolerance.allows(value, dense)]
    assert final == (good[-1] if good else dense)
    trainer.prune()
    metric = f"eval_{tolerance.metric}"
    assert trainer.evaluate()[metric] == pytest.approx(final, abs=1e-5)


def test_a_run_that_ends_worse_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before fine-tuning, every cut, and what is left after recovery. The dense model was scored on these rows already.
    values = iter([1.0, *[1.0] * (len(LADDER) + HALVINGS), 3.0])
    monkeypatch.setattr(VDTrainer, "_judge", lambda self: next(values))
    trainer = judged(tmp_path, max_loss_increase=1.0)
    trainer.train()
    assert next(values, None) is None
    limit = trainer.milestone("dense_loss") + 1
    assert f"`loss` is 3 in the end, and {limit:.4g} is the worst that `max_loss_increase 1` allows" in caplog.text


def test_a_resumed_run_chooses_the_same(tmp_path: Path) -> None:
    """Before, at and after the step at which it chooses."""
    folder = tmp_path / "whole"

    def run(output_dir: Path, resume_from: int | None = None) -> dict[str, Tensor]:
        options = {"save_strategy": "steps", "save_steps": 1, "max_loss_increase": 0.02} | PRUNING
        trainer = judged(output_dir, model=tiny_bert(dropout=0.1), **options)
        trainer.train(resume_from_checkpoint=resume_from and str(folder / f"checkpoint-{resume_from}"))
        return trainer.model.state_dict()

    expected = run(folder)
    for step in (7, 8, 9):
        state = run(tmp_path / str(step), step)
        assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


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
