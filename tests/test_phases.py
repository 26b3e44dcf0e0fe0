"""Where phases meet: what is cut, when, and which teacher stands there."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FINETUNE_ONLY, PRUNING, RECOVER_ONLY, StopAt, arguments, make_trainer, rows, tiny_bert
from torch import nn
from transformers import TrainerCallback

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.masks import read_mask
from hf_vdneuron.trainer import VDTrainer


EVERY_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}

SCORED = {"eval_dataset": rows()}


class Masks(TrainerCallback):
    """Notes how many features each step's model has masked when the optimizer moves it."""

    def __init__(self) -> None:
        self.ended = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.ended.append(num_masked(model))


def num_masked(model: nn.Module) -> int:
    return sum(int((~keep).sum()) for name, keep in model.named_buffers() if ".keep_" in name)


def steps_scored(trainer: VDTrainer, milestone: str) -> list[int]:
    return [logs["step"] for logs in trainer.state.log_history if f"{milestone}_loss" in logs]


def test_the_cut_precedes_recovery(tmp_path: Path) -> None:
    trainer, masks = make_trainer(tmp_path, trainer_options=SCORED, **PRUNING), Masks()
    trainer.add_callback(masks)
    trainer.train()
    assert masks.ended[:8] == [0] * 8
    assert len(set(masks.ended[8:])) == 1
    assert masks.ended[8] > 0
    assert (steps_scored(trainer, "dense"), steps_scored(trainer, "cut")) == ([4], [8])


@pytest.mark.parametrize("best", [{}, EVERY_STEP], ids=["plain", "best-model"])
def test_without_recovery_the_cut_ends_the_run(tmp_path: Path, best: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, trainer_options=SCORED, max_steps=8, recover_fraction=0, **PRUNING, **best)
    trainer.train()
    assert num_masked(trainer.model) > 0
    assert trainer.state.best_model_checkpoint is None
    assert steps_scored(trainer, "cut") == [8]
    assert trainer.evaluate()["eval_loss"] == trainer.milestone("cut_loss")
    expected = read_mask(trainer.model).keep
    assert all(torch.equal(keep, expected[path]) for path, keep in trainer.mask().keep.items())
    trainer.prune()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.milestone("cut_loss"), abs=1e-5)


def test_a_finished_run_without_recovery_ends_the_same_when_resumed(tmp_path: Path) -> None:
    options = {"max_steps": 8, "recover_fraction": 0, "save_strategy": "steps", "save_steps": 4, **PRUNING}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert num_masked(trainer.model) > 0
    for step in (4, 8):
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        state = resumed.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("stop", "cuts"), [(3, []), (4, []), (6, [6]), (8, [8]), (10, [8])], ids=lambda value: str(value)
)
def test_a_run_stopped_past_the_start_of_sparsification_is_cut(tmp_path: Path, stop: int, cuts: list[int]) -> None:
    options = SCORED | {"callbacks": [StopAt(stop)]}
    trainer = make_trainer(tmp_path, trainer_options=options, **PRUNING)
    trainer.train()
    assert trainer.state.global_step == stop
    assert steps_scored(trainer, "cut") == cuts
    layers = variational_layers(trainer.model).values()
    assert not any(layer.noise or layer.collect_kl for layer in layers)


def test_without_sparsification_every_model_competes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_options=SCORED, **EVERY_STEP, sparsify_fraction=0)
    trainer.train()
    losses = {logs["step"]: logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs}
    assert trainer.state.best_global_step == min(losses, key=losses.get)


def teacher_state(trainer: VDTrainer) -> dict[str, torch.Tensor]:
    return deepcopy(trainer.teacher.state_dict())


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("fresh", [True, False], ids=["model-init", "same-model"])
def test_every_run_has_its_own_teacher(tmp_path: Path, fresh: bool) -> None:
    start = {"model_init": lambda: tiny_bert()} if fresh else {"model": tiny_bert()}
    trainer = VDTrainer(**start, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    first = teacher_state(trainer)
    trainer.args.learning_rate = 1e-2
    trainer.train()
    assert differ(first, teacher_state(trainer))


def test_an_old_teacher_does_not_outlive_its_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    for name, value in RECOVER_ONLY.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.teacher is None
    assert not any("distillation" in logs for logs in trainer.state.log_history)


def test_the_users_teacher_outlives_every_run(tmp_path: Path) -> None:
    teacher = tiny_bert()
    trainer = make_trainer(tmp_path, trainer_options={"teacher": teacher})
    for _ in range(2):
        trainer.train()
        assert trainer.teacher is teacher


def test_no_teacher_is_made_where_none_is_asked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, distillation_weight=0)
    trainer.train()
    assert trainer.teacher is None


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_steps": 0}, id="no-step"),
        pytest.param({"max_steps": 2}, id="two-steps"),
        pytest.param({"max_steps": -1, "num_train_epochs": 0}, id="no-epoch"),
        pytest.param({"max_steps": -1, "num_train_epochs": -1}, id="negative-epochs"),
    ],
)
def test_a_run_too_short_for_its_phases_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, **options)
    before = deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=r"_fraction` is .* optimizer steps.* Raise `max_steps`"):
        trainer.train()
    assert not differ(before, trainer.model.state_dict())


def test_what_was_not_logged_does_not_leak_into_the_next_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_strategy="no", max_steps=5, **FINETUNE_ONLY)
    for _ in range(2):
        trainer.train()
        assert trainer._means._counts == {"nll": 5}
