"""A posterior in closed form inside a run: what it is fitted to, when it cuts, and how a run with it is resumed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import PRUNING, StopAt, make_trainer, rows, tiny_bert
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertForMaskedLM,
    TrainerCallback,
    default_data_collator,
)
from transformers.utils.generic import ModelOutput
from zoo import any_mask, masks

from hf_vdneuron import budget, fitting_trainer
from hf_vdneuron.budget import Costs, units_left
from hf_vdneuron.curvature import estimate_curvature
from hf_vdneuron.elbo import variational_parameters
from hf_vdneuron.evidence import closed_form_evidence, unit_evidence
from hf_vdneuron.laplace import fit_posterior_
from hf_vdneuron.masks import mask_model_, read_mask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.schedules import PRETRAINING_EVIDENCE
from hf_vdneuron.sharding import dense_copy
from hf_vdneuron.sublayers import Unit
from hf_vdneuron.trainer import VDTrainer


TARGET = 1.6
LENGTH = 6

#: Three steps of fine-tuning, then a cut.
CLOSED = {"sparsify_fraction": 0.0, "finetune_fraction": 0.125, "recover_fraction": 0.75, "target_speedup": TARGET}
NUM_STEPS = 21
CUT = 3


def closed(folder: Path, **options: Any) -> VDTrainer:
    trainer_options = {"max_length": LENGTH, "eval_dataset": rows(), **options.pop("trainer_options", {})}
    return make_trainer(folder, trainer_options=trainer_options, **{"max_steps": NUM_STEPS, **CLOSED, **options})


def speedup(model: nn.Module) -> float:
    return budget.speedup(model, read_mask(model), length=LENGTH)


class Speedups(TrainerCallback):
    """Notes how fast the model of each step is."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **run: Any) -> None:
        self.seen.append(speedup(model))


def test_evidence_is_that_of_the_training_loss(tmp_path: Path) -> None:
    trainer = closed(tmp_path)
    expected = patch_model_(tiny_bert())
    # The order of the rows does not matter, nor how they are dealt out.
    batches = DataLoader(rows(), batch_size=5, collate_fn=default_data_collator)
    curvature = estimate_curvature(expected, batches)
    fit_posterior_(expected, curvature, num_data=PRETRAINING_EVIDENCE)
    evidence = unit_evidence(expected, curvature, num_data=PRETRAINING_EVIDENCE)
    for path, found in trainer.closed_form_evidence().items():
        torch.testing.assert_close(found, evidence[path], rtol=1e-3, atol=1e-2)


def test_evidence_of_what_is_left_is_that_under_the_masks(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_bert().double(), trainer_options={"max_length": LENGTH}, **CLOSED)
    mask = any_mask(trainer.model, seed=3)
    mask_model_(trainer.model, mask)
    masked = patch_model_(dense_copy(trainer.model))
    curvature = estimate_curvature(masked, trainer._examples(), loss=trainer._loss)
    expected = closed_form_evidence(masked, curvature)
    for path, found in trainer.closed_form_evidence().items():
        kept = mask.keep[path].all(0)
        assert not kept.all()
        torch.testing.assert_close(found[:, kept], expected[path][:, kept], rtol=1e-4, atol=1e-4, check_dtype=False)
        assert not found[:, ~kept].any()


def test_nothing_is_worth_nothing(tmp_path: Path) -> None:
    trainer = closed(tmp_path)
    mask_model_(trainer.model, masks(trainer.model)["all_empty"])
    assert not any(worth.any() for worth in trainer.closed_form_evidence().values())


def test_the_model_itself_is_left_alone(tmp_path: Path) -> None:
    trainer = closed(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.closed_form_evidence()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.model.training


def test_a_loss_of_ones_own_counts(tmp_path: Path) -> None:
    """A loss that does not depend on the model is no evidence for anything."""

    def flat(outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return 0 * outputs.logits.sum()

    trainer = closed(tmp_path, trainer_options={"compute_loss_func": flat})
    assert max(worth.max().item() for worth in trainer.closed_form_evidence().values()) < 1e-3
    assert max(worth.max().item() for worth in closed(tmp_path).closed_form_evidence().values()) > 1


@pytest.mark.parametrize("num_examples", [8, 20])
def test_only_so_many_examples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_examples: int) -> None:
    monkeypatch.setattr(fitting_trainer, "NUM_EXAMPLES", num_examples)
    trainer = closed(tmp_path)
    first, second = (torch.cat([batch["input_ids"] for batch in trainer._examples()]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first) == num_examples
    every = {tuple(row["input_ids"].tolist()) for row in rows()}
    assert {tuple(row) for row in first.tolist()} < every


class Stream(IterableDataset):
    """Rows whose number nobody knows."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows())


def test_data_of_unknown_length_will_do(tmp_path: Path) -> None:
    trainer = closed(tmp_path, data=Stream())
    trainer.train()
    assert speedup(trainer.model) >= TARGET


# ---- Cuts ----


def test_the_cut_precedes_recovery(tmp_path: Path) -> None:
    watcher = Speedups()
    trainer = closed(tmp_path, trainer_options={"callbacks": [watcher]})
    trainer.train()
    assert watcher.seen[:CUT] == [1.0] * CUT
    assert len(set(watcher.seen[CUT:])) == 1
    # Exceeded by less than one head more.
    assert TARGET <= watcher.seen[-1] < 1.2 * TARGET
    cuts = [logs["step"] for logs in trainer.state.log_history if "cut_loss" in logs]
    dense = [logs["step"] for logs in trainer.state.log_history if "dense_loss" in logs]
    assert (dense, cuts) == ([CUT], [CUT])
    trainer.prune()
    costs, full = (Costs(model, length=LENGTH).macs({}) for model in (trainer.model, tiny_bert()))
    assert full / costs == pytest.approx(watcher.seen[-1])


@pytest.mark.parametrize("stop", [2, 3, 12])
def test_a_run_that_is_stopped_arrives(tmp_path: Path, stop: int) -> None:
    """But not one that was stopped while it was fine-tuned."""
    trainer = closed(tmp_path, trainer_options={"callbacks": [StopAt(stop)]})
    trainer.train()
    if stop < CUT:
        assert speedup(trainer.model) == 1
        with pytest.raises(ValueError, match="Nothing has decided what goes"):
            trainer.prune()
    else:
        assert speedup(trainer.model) >= TARGET
        assert trainer.milestone("cut_loss") is not None
        assert trainer.prune().num_parameters() < tiny_bert().num_parameters()


@pytest.mark.parametrize(
    "fractions",
    [
        pytest.param({"recover_fraction": 0.0}, id="no recovery"),
        pytest.param({"finetune_fraction": 0.0}, id="fine-tuned already"),
    ],
)
def test_a_phase_can_be_left_out(tmp_path: Path, fractions: dict[str, float]) -> None:
    trainer = closed(tmp_path, max_steps=8, **fractions)
    trainer.train()
    assert speedup(trainer.model) >= TARGET
    assert trainer.milestone("dense_loss") is not None
    cut = trainer.milestone("cut_loss")
    loss = trainer.evaluate()["eval_loss"]
    assert (loss == cut) is ("recover_fraction" in fractions)


def test_nothing_is_removed_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Nothing has decided what goes: 0 steps"):
        closed(tmp_path, finetune_fraction=0.0).prune()


def test_another_run_goes_on_from_what_is_left(tmp_path: Path) -> None:
    trainer = closed(tmp_path)
    trainer.train()
    first = read_mask(trainer.model).keep
    trainer.args.target_speedup = 2 * TARGET
    trainer.train()
    assert speedup(trainer.model) >= 2 * TARGET
    assert not any((keep & ~first[path]).any() for path, keep in read_mask(trainer.model).keep.items())


@torch.no_grad()
def missed(model: nn.Module, dense: nn.Module) -> float:
    """Squared difference of the logits on all rows."""
    ids = torch.stack([row["input_ids"] for row in rows()])
    return (model.eval()(ids).logits - dense.eval()(ids).logits).square().sum().item()


def test_what_is_left_makes_up_for_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    misses = []
    for name in ("made up for", "only cut"):
        # A step that hardly moves the model.
        trainer = closed(tmp_path / name, finetune_fraction=1.0, recover_fraction=0.0, max_steps=1, learning_rate=1e-9)
        trainer.train()
        misses.append(missed(trainer.prune(), tiny_bert()))
        monkeypatch.setattr(VDTrainer, "make_up_for_", lambda self, dense: None)
    assert misses[0] < 0.7 * misses[1]


@pytest.mark.parametrize(("target", "num_stages"), [(1.3, 1), (3.0, 2), (5.0, 3)])
def test_a_far_target_is_reached_in_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: float, num_stages: int
) -> None:
    """Each of which is judged by what the ones before have left."""
    reached, weigh = [], VDTrainer.closed_form_evidence

    def note(trainer: VDTrainer) -> dict[str, Tensor]:
        reached.append(speedup(trainer.model))
        return weigh(trainer)

    monkeypatch.setattr(VDTrainer, "closed_form_evidence", note)
    trainer = closed(tmp_path, target_speedup=target)
    trainer.train()
    assert len(reached) == num_stages
    assert reached[0] == 1
    assert sorted(set(reached)) == reached
    assert speedup(trainer.model) >= target


ALIGNED = {"layout": "uniform", "round_heads_to": 2, "round_neurons_to": 4}


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({}, id="in closed form"),
        pytest.param({**PRUNING, "kl_weight": None, "sparsify_fraction": 0.3}, id="trained"),
        pytest.param({"target_speedup": None, "max_loss_increase": 100.0}, id="within a tolerance"),
    ],
)
def test_layers_can_be_alike(tmp_path: Path, asked: dict[str, Any]) -> None:
    trainer = closed(tmp_path, **ALIGNED, **asked)
    trainer.train()
    left = units_left(trainer.prune())
    for unit, step in {Unit.HEAD: 2, Unit.NEURON: 4}.items():
        assert len(set(left[unit])) == 1
        assert left[unit][0] % step == 0
    assert sum(left[Unit.NEURON]) < 48


def test_a_mixed_precision_run_arrives(tmp_path: Path) -> None:
    trainer = closed(tmp_path, bf16=True)
    trainer.train()
    assert speedup(trainer.model) >= TARGET
    assert trainer.prune().dtype == torch.float32


def test_a_language_model_need_not_count_its_tokens(tmp_path: Path) -> None:
    trainer = closed(
        tmp_path,
        model=tiny_bert(BertForMaskedLM),
        data=rows(language_model=True),
        trainer_options={"eval_dataset": None},
    )
    trainer.train()
    assert speedup(trainer.model) >= TARGET


def test_a_model_that_came_patched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model` came patched, .* `sparsify_fraction`"):
        closed(tmp_path, model=patch_model_(tiny_bert()))


def test_what_stands_still_costs_no_memory(tmp_path: Path) -> None:
    trainer = closed(tmp_path)
    trainer.train()
    own = variational_parameters(trainer.model)
    assert own
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in own)
    assert own.isdisjoint(trainer.optimizer.state)
    held = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert own.isdisjoint(held)


def test_logs_say_nothing_of_a_posterior_that_is_not_trained(tmp_path: Path) -> None:
    trainer = closed(tmp_path)
    trainer.train()
    names = set().union(*trainer.state.log_history)
    assert names >= {"heads", "neurons", "expected_speedup", "distillation"}
    assert not names & {"kl", "kl_weight", "irrelevant_weights", "expected_removal"}


# ---- Going on ----


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("closed")
    trainer = closed(folder, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder, trainer.model.state_dict()


@pytest.mark.parametrize("step", [1, CUT, CUT + 1, 20])
def test_a_resumed_run_ends_bit_equal(
    uninterrupted: tuple[Path, dict[str, Tensor]], tmp_path: Path, step: int
) -> None:
    folder, expected = uninterrupted
    trainer = closed(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    state = trainer.model.state_dict()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_a_resumed_run_in_mixed_precision_hears_the_same_teacher(tmp_path: Path) -> None:
    whole = closed(tmp_path / "whole", bf16=True, save_strategy="steps", save_steps=CUT + 2)
    whole.train()
    resumed = closed(tmp_path / "resumed", bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CUT + 2}"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_one_fine_tuning_gives_many_sizes(tmp_path: Path) -> None:
    trainer = closed(tmp_path, save_posterior=True)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{CUT}"]
    smaller = closed(tmp_path / "smaller", target_speedup=2 * TARGET)
    smaller.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CUT}"))
    assert speedup(smaller.model) >= 2 * TARGET
    alone = closed(tmp_path / "alone", target_speedup=2 * TARGET)
    alone.train()
    state = alone.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in smaller.model.state_dict().items())
