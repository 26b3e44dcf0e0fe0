"""The trainer: objective, accumulation, phases, resuming, best models."""

import inspect
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    CHECKPOINTING,
    FINETUNE_ONLY,
    LENGTH,
    NUM_ROWS,
    PRUNING,
    RECOVER_ONLY,
    Rows,
    arguments,
    make_trainer,
    rows,
    tiny_bert,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertLMHeadModel,
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.generic import ModelOutput

from hf_vdneuron.config import PriorType, VDConfig
from hf_vdneuron.elbo import num_weights, variational_layers
from hf_vdneuron.functional import gaussian_kl
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.patching import patch_model_, unpatch_model_
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.schedules import Phase, default_kl_weight
from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments


Run = tuple[Path, dict[str, Tensor]]


class Silence(TrainerCallback):
    """Switches noise off again, after the trainer has entered a step."""

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        for layer in variational_layers(model).values():
            layer.noise = False


class RecordGradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.steps = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def gradients(
    tmp_path: Path, model: PreTrainedModel, accumulation: int, data: Rows, **options: Any
) -> dict[str, Tensor]:
    """Gradients of one sparsification step over 8 rows in `accumulation` micro-batches, without noise."""
    trainer = make_trainer(
        tmp_path,
        deepcopy(model),
        data=data,
        max_steps=1,
        finetune_fraction=0,
        recover_fraction=0,
        distillation_weight=0,
        kl_weight=2.0,
        kl_ramp=0,
        max_grad_norm=0,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        **options,
    )
    record = RecordGradients()
    trainer.add_callback(Silence())
    trainer.add_callback(record)
    trainer.train()
    return record.steps[0]


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize(
    ("model_class", "language_model"),
    [
        pytest.param(BertForSequenceClassification, False, id="ignores-num-items"),
        pytest.param(BertLMHeadModel, True, id="honours-num-items"),
    ],
)
def test_accumulation_gives_the_same_gradients(
    tmp_path: Path, model_class: type[PreTrainedModel], language_model: bool, accumulation: int
) -> None:
    model = tiny_bert(model_class, is_decoder=language_model)
    data = rows(language_model=language_model)
    options = {"num_data": NUM_ROWS * LENGTH} if language_model else {}
    once = gradients(tmp_path, model, 1, data, **options)
    several = gradients(tmp_path, model, accumulation, data, **options)
    assert once.keys() == several.keys()
    for name, gradient in once.items():
        if name.endswith("log_var"):  # without noise, the KL is all there is
            assert gradient.abs().max() > 0
            assert torch.equal(gradient, several[name]), name
        else:
            torch.testing.assert_close(several[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_kl_gradient_is_that_of_the_exact_divergence(tmp_path: Path) -> None:
    model = patch_model_(tiny_bert(), VDConfig(prior="group"))
    got = gradients(tmp_path, model, 1, rows())
    for name, layer in variational_layers(model).items():
        log_var = layer.log_var.detach().clone().requires_grad_()
        scale = layer.prior.prior_scales[0][layer.prior.feature_group]
        scale = scale.view(-1, 1) if layer.group_axis == 0 else scale.view(1, -1)
        kl = gaussian_kl(layer.weight.detach(), log_var, scale).sum()
        (expected,) = torch.autograd.grad(2.0 * kl / NUM_ROWS, log_var)
        torch.testing.assert_close(got[f"{name}.log_var"], expected, rtol=1e-4, atol=1e-9)


class Observe(TrainerCallback):
    """Notes what every step sees."""

    def __init__(self) -> None:
        self.seen = []

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        layers = variational_layers(model).values()
        rates = {group.get("variational", False): group["lr"] for group in optimizer.param_groups}
        theta = torch.cat([layer.prior.prior_scales.flatten() for layer in layers])
        noisy = {layer.noise for layer in layers}
        self.seen.append((state.global_step, noisy, rates, theta))


def test_phases_switch_noise_rates_and_prior(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    observe = Observe()
    trainer.add_callback(observe)
    trainer.train()
    assert [next(iter(noisy)) for _, noisy, *_ in observe.seen] == [False] * 4 + [True] * 4 + [False] * 4
    variational_rates = [rates[True] for *_, rates, _ in observe.seen]
    assert [rate > 0 for rate in variational_rates] == [False] * 4 + [True] * 4 + [False] * 4
    theta = [values for *_, values in observe.seen]
    moved = [not torch.equal(before, after) for before, after in pairwise(theta)]
    assert moved == [False] * 4 + [True] * 4 + [False] * 3  # step 4 still sees the prior it was patched with
    assert trainer.phase is Phase.RECOVER


def test_finetuning_a_patched_model_is_dense_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=5, **FINETUNE_ONLY)
    trainer.train()
    dense = Trainer(model=tiny_bert(), args=trainer.args, train_dataset=rows())
    dense.train()
    state = trainer.model.state_dict()
    for name, weight in dense.model.state_dict().items():
        # The loss does not depend on the bias of keys: its gradient is rounding, of which Adam makes steps.
        atol = 1e-2 if name.endswith("key.bias") else 1e-6
        torch.testing.assert_close(state[name], weight, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("fractions", [(0, 0.5, 0.5), (0.5, 0.5, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_a_fraction_of_zero_skips_a_phase(tmp_path: Path, fractions: tuple[float, ...]) -> None:
    names = ("finetune_fraction", "sparsify_fraction", "recover_fraction")
    trainer = make_trainer(tmp_path, max_steps=4, **dict(zip(names, fractions, strict=True)))
    trainer.train()
    assert not variational_layers(trainer.prune())


def test_logs_say_what_happens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_options={"eval_dataset": rows()})
    trainer.train()
    history = [logs for logs in trainer.state.log_history if "loss" in logs]
    always = {"nll", "kl_weight", "irrelevant_weights", "heads", "neurons", "expected_speedup"}
    assert all(always <= logs.keys() for logs in history)
    sparsify = history[4:8]
    assert all({"kl", "distillation"} <= logs.keys() for logs in sparsify)
    assert "kl" not in history[0]
    assert "kl" not in history[-1]
    assert history[0]["heads"] == 8
    assert history[0]["neurons"] == 48
    assert history[0]["expected_speedup"] == 1
    # The KL per example, from scratch: the first sparsification step still has the posterior it was patched with.
    assert sparsify[0]["kl"] * NUM_ROWS / num_weights(trainer.model) > 0
    assert [logs["kl_weight"] > 0 for logs in history] == [False] * 3 + [True] * 4 + [False] * 5
    milestones = [name for logs in trainer.state.log_history for name in logs if name.endswith("_loss")]
    assert [name for name in milestones if name in ("dense_loss", "cut_loss")] == ["dense_loss", "cut_loss"]


def run(output_dir: Path, *, resume_from: int | None = None, **options: Any) -> dict[str, Tensor]:
    """Train with dropout and noise, saving every step, and return the final state."""
    trainer = make_trainer(
        output_dir,
        tiny_bert(dropout=0.1),
        trainer_options={"eval_dataset": rows(), **options.pop("trainer_options", {})},
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        **(PRUNING | options),
    )
    checkpoint = None if resume_from is None else str(output_dir / f"checkpoint-{resume_from}")
    trainer.train(resume_from_checkpoint=checkpoint)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder)


#: A run whose KL weight is found on the way.
STEERED = {"kl_weight": None, "target_speedup": 1.5}


@pytest.fixture(scope="module")
def uninterrupted_to_target(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("steered")
    return folder, run(folder, **STEERED)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 8, 9, 11])
def test_a_resumed_run_ends_bit_equal(uninterrupted: Run, tmp_path: Path, step: int) -> None:
    require_same_end(uninterrupted, tmp_path, step)


@pytest.mark.parametrize("step", [4, 5, 6, 8, 9])
def test_a_resumed_run_to_a_target_ends_bit_equal(uninterrupted_to_target: Run, tmp_path: Path, step: int) -> None:
    require_same_end(uninterrupted_to_target, tmp_path, step, **STEERED)


def test_a_resumed_run_with_a_prior_that_learns_nothing_ends_bit_equal(tmp_path: Path) -> None:
    options = {"trainer_options": {"vd_config": VDConfig(prior=PriorType.WEIGHT)}}
    whole = tmp_path / "whole", run(tmp_path / "whole", **options)
    require_same_end(whole, tmp_path, 6, **options)
    assert not any("prior" in name for name in whole[1])


def require_same_end(uninterrupted: Run, tmp_path: Path, step: int, **options: Any) -> None:
    folder, expected = uninterrupted
    (tmp_path / f"checkpoint-{step}").symlink_to(folder / f"checkpoint-{step}")
    state = run(tmp_path, resume_from=step, **options)
    assert state.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert different == []


def copy_checkpoint(uninterrupted: Run, output_dir: Path, *, step: int, without: str) -> None:
    """Give a run a checkpoint of another one, but for one file."""
    copied = output_dir / f"checkpoint-{step}"
    shutil.copytree(uninterrupted[0] / copied.name, copied)
    (copied / without).unlink()


def test_a_checkpoint_that_lost_its_teacher_is_refused(uninterrupted: Run, tmp_path: Path) -> None:
    copy_checkpoint(uninterrupted, tmp_path, step=7, without="teacher.safetensors")
    with pytest.raises(ValueError, match="checkpoint of step 7 holds no teacher: expected the model of step 4"):
        run(tmp_path, resume_from=7)
    assert run(tmp_path, resume_from=7, distillation_weight=0)


class StopEarly(TrainerCallback):
    """Stops a run in its fine-tuning."""

    def on_step_end(self, args: VDTrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("trains", [False, True], ids=["before-any-run", "stopped-in-fine-tuning"])
def test_nothing_is_removed_before_anything_was_decided(tmp_path: Path, trains: bool) -> None:
    trainer = make_trainer(tmp_path, trainer_options={"callbacks": [StopEarly()]}, target_speedup=1.5)
    if trains:
        trainer.train()
    with pytest.raises(ValueError, match=rf"Nothing has decided what goes: {2 * trains} steps are done.*`train\(\)`"):
        trainer.prune()
    assert variational_layers(trainer.model)


def test_a_mask_of_ones_own_is_a_decision(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    keep = read_mask(trainer.model).keep
    for kept in keep.values():
        kept[1, 0] = False
    mask_model_(trainer.model, RelevanceMask(keep))
    assert trainer.prune().config.vdneuron is not None


def test_a_checkpoint_that_lost_its_steering_is_refused(uninterrupted_to_target: Run, tmp_path: Path) -> None:
    copy_checkpoint(uninterrupted_to_target, tmp_path, step=6, without="steering.json")
    with pytest.raises(ValueError, match="checkpoint of step 6 does not say which KL weight"):
        run(tmp_path, resume_from=6, **STEERED)
    assert run(tmp_path, resume_from=6, **(STEERED | {"kl_weight": 1e-3}))


class Witness(TrainerCallback):
    """Notes what a user's callback can see before every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Phase, bool]] = []

    def on_step_begin(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:
        kept = read_mask(run["model"]).keep.values()
        self.seen.append((args.phase(state), all(keep.all() for keep in kept)))


def test_callbacks_see_phase_and_masks(tmp_path: Path) -> None:
    witness = Witness()
    trainer = make_trainer(tmp_path, trainer_options={"callbacks": [witness]}, **PRUNING)
    trainer.train()
    assert [phase for phase, _ in witness.seen] == [*[Phase.FINETUNE] * 4, *[Phase.SPARSIFY] * 4, *[Phase.RECOVER] * 4]
    # The cut is made at the first step of recovery, behind the callbacks of the user.
    assert [whole for _, whole in witness.seen] == [True] * 9 + [False] * 3


@pytest.mark.parametrize("config", [VDConfig(query_key=True), None], ids=["ours", "patched-before"])
def test_a_saved_model_says_how_it_was_patched(tmp_path: Path, config: VDConfig | None) -> None:
    model = tiny_bert() if config else patch_model_(tiny_bert())
    trainer = make_trainer(tmp_path, model, trainer_options={"vd_config": config})
    trainer.save_model(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "vd_config.json"
    assert file.exists() == (config is not None)
    assert config is None or VDConfig.from_json(file.read_text(encoding="utf-8")) == config


@pytest.mark.parametrize("writes", [True, False], ids=["first", "other"])
def test_one_process_of_a_sharded_run_writes(tmp_path: Path, writes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(VDTrainingArguments, "should_save", writes)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "config.json").exists() == writes


def test_the_teacher_is_saved_before_anything_that_a_run_resumes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=5)
    monkeypatch.setattr(Trainer, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {path.name for path in (tmp_path / "checkpoint-5").iterdir()} == {"teacher.safetensors", "steering.json"}


def test_the_interrupted_run_is_one_that_could_differ(uninterrupted: Run) -> None:
    folder, _ = uninterrupted
    masks = load_file(folder / "checkpoint-9" / "model.safetensors")
    kept = torch.cat([value for name, value in masks.items() if ".keep_" in name])
    assert 0 < (~kept).sum() < len(kept)
    assert (folder / "checkpoint-5" / "teacher.safetensors").exists()
    assert not (folder / "checkpoint-4" / "teacher.safetensors").exists()


def test_best_model_and_early_stopping_count_only_recovery(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        trainer_options={"eval_dataset": rows(), "callbacks": [EarlyStoppingCallback(1)]},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.state.best_global_step > trainer.plan.recover_start
    assert trainer.state.global_step > trainer.plan.recover_start
    assert read_mask(trainer.model).keep


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"bf16": True}, id="bf16-autocast"),
        pytest.param({CHECKPOINTING: True}, id="gradient-checkpointing"),
        pytest.param({CHECKPOINTING: True, "gradient_accumulation_steps": 2}, id="checkpointing-accumulation"),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="torch-compile"),
    ],
)
# Dynamo itself instantiates the autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_ways_to_train(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, max_steps=6, **options)
    trainer.train()
    kl = [logs["kl"] for logs in trainer.state.log_history if "kl" in logs]
    assert len(kl) == 2
    assert all(value > 0 for value in kl)
    assert all(layer.log_var.dtype is torch.float32 for layer in variational_layers(trainer.model).values())


def test_gradient_checkpointing_keeps_the_kl_gradient(tmp_path: Path) -> None:
    model = patch_model_(tiny_bert())
    plain = gradients(tmp_path, model, 2, rows())
    checkpointed = gradients(tmp_path, model, 2, rows(), **{CHECKPOINTING: True})
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_reentrant_checkpointing_of_the_model_itself_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    enable = getattr(model, f"{CHECKPOINTING}_enable")
    enable(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}})
    trainer = make_trainer(tmp_path, model, finetune_fraction=0)
    with pytest.raises(RuntimeError, match=r"has no gradient.*`use_reentrant=False`"):
        trainer.train()


def test_layers_are_left_out_only_where_no_posterior_is_trained(tmp_path: Path) -> None:
    model = tiny_bert()
    model.config.layerdrop = 0.1
    with pytest.raises(ValueError, match=r"`layerdrop` is 0\.1"):
        make_trainer(tmp_path, model)
    make_trainer(tmp_path, unpatch_model_(model), target_speedup=1.5, sparsify_fraction=0.0)


def test_prune_keeps_the_score(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_options={"eval_dataset": rows()}, **PRUNING)
    trainer.train()
    masked = trainer.evaluate()["eval_loss"]
    dense_size = sum(p.numel() for p in tiny_bert().parameters())
    pruned = trainer.prune()
    assert pruned is trainer.model
    assert not any(isinstance(module, VariationalLayer) for module in pruned.modules())
    assert sum(p.numel() for p in pruned.parameters()) < dense_size
    assert trainer.evaluate()["eval_loss"] == pytest.approx(masked, abs=1e-5)


def test_a_pruned_model_trains_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_options={"eval_dataset": rows()}, **PRUNING)
    trainer.train()
    pruned = trainer.prune()
    before = deepcopy(pruned.state_dict())
    for name, value in RECOVER_ONLY.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.model is pruned
    assert [name for name, value in pruned.state_dict().items() if torch.equal(value, before[name])] == []
    assert all("nll" in logs for logs in trainer.state.log_history if "loss" in logs)
    assert not read_mask(trainer.prune()).keep


def test_a_pruned_model_cannot_be_sparsified_by_the_same_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.prune()
    with pytest.raises(ValueError, match="no variational layer left"):
        trainer.train()


def log_vars(model: nn.Module) -> Tensor:
    return torch.cat([layer.log_var.detach().flatten() for layer in variational_layers(model).values()])


@pytest.mark.parametrize("patched_before", [True, False])
def test_a_given_optimizer_moves_the_posterior_at_our_rates(tmp_path: Path, patched_before: bool) -> None:
    model = tiny_bert()
    if patched_before:
        patch_model_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    trainer = make_trainer(tmp_path, model, trainer_options={"optimizers": (optimizer, None)}, log_var_distance=2.0)
    observe = Observe()
    trainer.add_callback(observe)
    trainer.train()
    assert [rates[True] > 0 for _, _, rates, _ in observe.seen] == [False] * 4 + [True] * 4 + [False] * 4
    own = [group for group in optimizer.param_groups if group.get("variational")]
    assert [(group["initial_lr"], group["weight_decay"]) for group in own] == [(2.0 / 4, 0.0), (3.0 / 4, 0.0)]
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert (log_vars(model) != VDConfig().initial_log_var).all()


def test_a_given_scheduler_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="brings a `ConstantLR`"):
        make_trainer(tmp_path, model, trainer_options={"optimizers": (optimizer, scheduler)})


def test_the_pruned_model_leaves_mixed_precision_behind(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    pruned = trainer.prune().eval()
    pruned.save_pretrained(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows()])}
    torch.testing.assert_close(pruned(**inputs).logits, loaded(**inputs).logits, rtol=0, atol=1e-6)


def test_own_rates_and_no_weight_decay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, weight_decay=0.1, log_var_distance=2.0, group_scale_distance=1.0)
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [group for group in trainer.optimizer.param_groups if group.get("variational")]
    assert [{names[id(p)].rpartition(".")[2] for p in group["params"]} for group in groups] == [
        {"log_var"},
        {"group_scale"},
    ]
    assert [group["initial_lr"] for group in groups] == [2.0 / 4, 1.0 / 4]
    assert all(group["weight_decay"] == 0 for group in groups)
    listed = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in trainer.model.parameters())


def test_a_given_teacher_is_used_and_fixed(tmp_path: Path) -> None:
    teacher = tiny_bert()
    before = deepcopy(teacher.state_dict())
    trainer = make_trainer(tmp_path, trainer_options={"teacher": teacher}, distillation_weight=1.0)
    trainer.train()
    assert trainer.teacher is teacher
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_hidden_states_are_learned_after_fine_tuning(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hidden_distillation_weight=5.0)
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "nll" in logs]
    assert [("hidden_distillation" in one) for one in logs] == [("distillation" in one) for one in logs]
    learned = [one for one in logs if "distillation" in one]
    assert learned
    assert 0 < learned[0]["hidden_distillation"] < 0.1  # the teacher is the student itself, without noise
    last = learned[-1]  # in recovery, without a KL
    weight = trainer.args.distillation_weight
    lesson = last["distillation"] + 5 * last["hidden_distillation"]
    assert last["loss"] == pytest.approx((1 - weight) * last["nll"] + weight * lesson, rel=1e-3)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_hidden_states_are_divided_like_the_rest(tmp_path: Path, accumulation: int) -> None:
    trainer = make_trainer(tmp_path, hidden_distillation_weight=5.0, gradient_accumulation_steps=accumulation)
    trainer.train()
    last = [logs for logs in trainer.state.log_history if "hidden_distillation" in logs][-1]
    lesson = last["distillation"] + 5 * last["hidden_distillation"]
    weight = trainer.args.distillation_weight
    assert last["loss"] == pytest.approx((1 - weight) * last["nll"] + weight * lesson, rel=1e-3)


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("case", ["mean", "by-count", "loss-function"])
def test_logged_nll_does_not_depend_on_accumulation(tmp_path: Path, case: str, accumulation: int) -> None:
    def sum_over_count(outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    def first_nll(parts: int) -> float:
        is_language = case == "by-count"
        trainer = make_trainer(
            tmp_path,
            tiny_bert(BertLMHeadModel, is_decoder=True) if is_language else None,
            data=rows(language_model=is_language),
            trainer_options={"compute_loss_func": sum_over_count} if case == "loss-function" else None,
            num_data=NUM_ROWS,
            max_steps=3,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        )
        trainer.train()
        return next(logs["nll"] for logs in trainer.state.log_history if "nll" in logs)

    assert first_nll(accumulation) == pytest.approx(first_nll(1), rel=1e-5)


def test_nothing_is_kept_for_logs_that_never_come(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_strategy="no")
    trainer.train()
    assert trainer._means._counts["nll"] == 12
    assert all(total.numel() == 1 for total in trainer._means._sums.values())


QUESTIONS = [
    {"input_ids": row["input_ids"], "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}
    for row in rows()
]


def tuple_model() -> PreTrainedModel:
    model = tiny_bert()
    model.config.return_dict = False
    return model


NO_LESSON = {
    "question-answering": (lambda: tiny_bert(BertForQuestionAnswering), QUESTIONS, None, "returns `loss`, `start_log"),
    "tuple": (tuple_model, rows(), None, "returns tuple"),
    "teacher-of-other-labels": (tiny_bert, rows(), lambda: tiny_bert(num_labels=5), r"shape \(8, 5\): expected"),
    "teacher-with-tuple": (tiny_bert, rows(), tuple_model, "The teacher returns tuple"),
}


@pytest.mark.parametrize(("model", "data", "teacher", "message"), NO_LESSON.values(), ids=NO_LESSON)
def test_what_cannot_be_distilled_is_refused_before_fine_tuning(
    tmp_path: Path,
    model: Callable[[], PreTrainedModel],
    data: Rows,
    teacher: Callable[[], PreTrainedModel] | None,
    message: str,
) -> None:
    given = {"teacher": None if teacher is None else teacher()}
    trainer = make_trainer(tmp_path, model(), data=data, trainer_options=given)
    with pytest.raises(ValueError, match=f"{message}.*`distillation_weight=0`"):
        trainer.train()
    assert trainer.state.global_step == 0
    options = {"distillation_weight": 0, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = make_trainer(tmp_path, model(), data=data, trainer_options=given, **options)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("num_labels", [5, LENGTH], ids=["fewer-labels-than-tokens", "as-many-labels-as-tokens"])
def test_a_multi_label_head_is_distilled(tmp_path: Path, num_labels: int) -> None:
    model = tiny_bert(problem_type="multi_label_classification", num_labels=num_labels)
    data = [{"input_ids": row["input_ids"], "labels": torch.ones(num_labels)} for row in rows()]
    teacher = deepcopy(model)
    trainer = make_trainer(
        tmp_path, model, data=data, trainer_options={"teacher": teacher}, finetune_fraction=0, max_steps=2
    )
    trainer.train()
    first = next(logs for logs in trainer.state.log_history if "distillation" in logs)
    assert 0 < first["distillation"] < 1e-3  # the teacher is the student itself, without noise


def test_the_default_kl_weight_is_that_of_the_schedules(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_data=1000)
    trainer.train()
    weights = {logs["kl_weight"] for logs in trainer.state.log_history if "kl_weight" in logs}
    assert weights == {0, default_kl_weight(1000)}


def test_data_of_unknown_length_is_refused_at_once(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter(rows())

    with pytest.raises(ValueError, match="has no length: set `num_data`"):
        make_trainer(tmp_path, data=Stream())
    make_trainer(tmp_path, data=Stream(), num_data=NUM_ROWS)


def test_a_language_model_must_state_its_number_of_tokens(tmp_path: Path) -> None:
    model = tiny_bert(BertLMHeadModel, is_decoder=True)
    trainer = make_trainer(tmp_path, model, data=rows(language_model=True), finetune_fraction=0)
    with pytest.raises(ValueError, match="set `num_data`"):
        trainer.train()


def test_a_patched_model_keeps_its_own_config(tmp_path: Path) -> None:
    model = patch_model_(tiny_bert(), VDConfig(prior="group"))
    assert make_trainer(tmp_path, model).model is model
    with pytest.raises(ValueError, match="leave `vd_config` out"):
        make_trainer(tmp_path, model, trainer_options={"vd_config": VDConfig()})


def test_milestones_of_several_evaluation_sets(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_options={"eval_dataset": {"a": rows(), "b": rows()[:8]}})
    trainer.train()
    for name in ("dense_a_loss", "dense_b_loss", "cut_a_loss", "cut_b_loss"):
        assert trainer.milestone(name) > 0
    assert trainer.milestone("dense_loss") is None


def test_model_init_is_patched(tmp_path: Path) -> None:
    trainer = VDTrainer(model_init=lambda: tiny_bert(), args=arguments(tmp_path), train_dataset=rows())
    assert variational_layers(trainer.model)


def test_plain_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected `VDTrainingArguments`"):
        VDTrainer(model=tiny_bert(), args=None)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_determine_best_metric", ["self", "metrics", "trial"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_finish_current_push", ["self"]),
    ],
)
def test_private_methods_of_the_trainer_are_where_we_override_them(method: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(Trainer, method)).parameters) == parameters
