"""Runs that would fail late, or end elsewhere without a word."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import arguments, tiny_bert
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from hf_vdneuron.checks import (
    require_all_phases,
    require_every_layer,
    require_examples,
    require_kl_gradient,
    require_no_scheduler,
    require_one_process_per_device,
    require_own_teacher,
    require_posterior,
    require_supported_sharding,
)
from hf_vdneuron.elbo import set_variational_, variational_layers
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.trainer import VDTrainer


TOKENS = torch.ones(2, 3, dtype=torch.long)

#: What is supported, by the names of accelerate's plugin.
SHARDING = SimpleNamespace(
    fsdp_version=2, cpu_ram_efficient_loading=False, activation_checkpointing=False, mixed_precision_policy=None
)


@pytest.mark.parametrize("optimizers", [None, (None, None), (SimpleNamespace(), None)], ids=str)
def test_an_optimizer_may_come_alone(optimizers: tuple[object, object] | None) -> None:
    require_no_scheduler(optimizers)


def test_a_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="brings a `SimpleNamespace`: expected `\\(optimizer, None\\)`"):
        require_no_scheduler((None, SimpleNamespace()))


@pytest.mark.parametrize(
    ("devices", "stage", "message"),
    [
        (2, None, "sees 2 devices .* expected one process per device. Start the run with `accelerate launch`"),
        (1, 3, "ZeRO-3 cuts weights .* Use stage 1 or 2"),
    ],
    ids=["data-parallel", "zero-3"],
)
def test_parallelism_that_loses_the_kl_is_refused(devices: int, stage: int | None, message: str) -> None:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    with pytest.raises(ValueError, match=message):
        require_one_process_per_device(SimpleNamespace(n_gpu=devices, deepspeed_plugin=plugin))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fsdp_version": 1}, "version 1 makes one vector .* expected version 2"),
        ({"cpu_ram_efficient_loading": True}, "no buffers, such as priors and masks: expected every process to load"),
        ({"activation_checkpointing": True}, "other noise .* Set `gradient_checkpointing=True`"),
        ({"mixed_precision_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}, "cast parameters to torch.bf"),
        ({"mixed_precision_policy": MixedPrecisionPolicy(param_dtype=torch.float16)}, "expected float32"),
    ],
    ids=["flat-parameters", "one-process-loads", "its-own-checkpointing", "bfloat16", "float16"],
)
def test_sharding_that_loses_the_posterior_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_supported_sharding(SimpleNamespace(**{**vars(SHARDING), **change}))


@pytest.mark.parametrize("policy", [None, MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.float32)], ids=str)
def test_pieces_of_whole_rows_are_fine(policy: MixedPrecisionPolicy | None) -> None:
    require_supported_sharding(None, has_tolerance=True)
    require_supported_sharding(SimpleNamespace(**{**vars(SHARDING), "mixed_precision_policy": policy}))


@pytest.mark.parametrize("stage", [None, 1, 2])
def test_whole_weights_on_one_device_are_fine(tmp_path: Path, stage: int | None) -> None:
    require_one_process_per_device(arguments(tmp_path))
    require_one_process_per_device(SimpleNamespace(n_gpu=1, deepspeed_plugin=SimpleNamespace(zero_stage=stage)))


def test_a_trainer_refuses_it_before_anything_else(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 4
    model = tiny_bert()
    with pytest.raises(ValueError, match="sees 4 devices"):
        VDTrainer(model=model, args=args)
    assert not variational_layers(model)


@pytest.mark.parametrize(
    ("num_steps", "fractions", "phase"),
    [
        (-6, (0.3, 0.5, 0.2), "finetune"),
        (0, (0.3, 0.5, 0.2), "finetune"),
        (1, (0.3, 0.5, 0.2), "finetune"),
        (2, (0.3, 0.5, 0.2), "recover"),
        (2, (1, 1, 1), "sparsify"),
        (0, (0, 0, 1), "recover"),
    ],
    ids=str,
)
def test_a_run_too_short_for_its_phases_is_refused(
    tmp_path: Path, num_steps: int, fractions: tuple[float, ...], phase: str
) -> None:
    names = ("finetune_fraction", "sparsify_fraction", "recover_fraction")
    args = arguments(tmp_path, **dict(zip(names, fractions, strict=True)))
    with pytest.raises(ValueError, match=f"`{phase}_fraction` is .* has {num_steps} optimizer steps.*Raise"):
        require_all_phases(args, num_steps)


@pytest.mark.parametrize(("num_steps", "fractions"), [(3, (1, 1, 1)), (1, (0, 1, 0)), (2, (0, 1, 1))], ids=str)
def test_one_step_per_phase_is_enough(tmp_path: Path, num_steps: int, fractions: tuple[float, ...]) -> None:
    names = ("finetune_fraction", "sparsify_fraction", "recover_fraction")
    require_all_phases(arguments(tmp_path, **dict(zip(names, fractions, strict=True))), num_steps)


def test_a_dense_model_cannot_be_sparsified() -> None:
    require_posterior(patch_model_(tiny_bert()))
    with pytest.raises(ValueError, match=r"no variational layer left.*`sparsify_fraction=0`"):
        require_posterior(tiny_bert())


@pytest.mark.parametrize(("teacher", "step"), [(None, 4), (None, 0), (nn.Identity(), 9)], ids=str)
def test_a_teacher_may_come_later_or_from_a_checkpoint(teacher: nn.Module | None, step: int) -> None:
    require_own_teacher(teacher, step, made_at=4)


def test_a_teacher_that_is_gone_is_missed() -> None:
    with pytest.raises(ValueError, match="checkpoint of step 5 holds no teacher: expected the model of step 4"):
        require_own_teacher(None, 5, made_at=4)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(None, id="none"),
        pytest.param(torch.ones(2, dtype=torch.long), id="one-class"),
        pytest.param(torch.ones(2, 3), id="as-many-labels-as-tokens"),
    ],
)
def test_examples_are_counted(labels: Tensor | None) -> None:
    require_examples({"input_ids": TOKENS}, labels)


def test_inputs_may_be_no_tokens() -> None:
    require_examples({"pixel_values": torch.ones(2, 3)}, TOKENS)


def test_tokens_must_be_counted_by_the_user() -> None:
    with pytest.raises(ValueError, match="set `num_data`"):
        require_examples({"input_ids": TOKENS}, TOKENS)


@pytest.mark.parametrize("collect_kl", [True, False])
def test_a_kl_with_its_gradient_passes(collect_kl: bool) -> None:
    model = patch_model_(tiny_bert()).train()
    set_variational_(model, noise=False, collect_kl=collect_kl)
    model(TOKENS)
    require_kl_gradient(model)


def test_a_kl_without_a_gradient_is_found_in_any_layer() -> None:
    model = patch_model_(tiny_bert()).train()
    set_variational_(model, noise=False, collect_kl=True)
    model(TOKENS)
    layer = model.bert.encoder.layer[1].output.dense
    layer.kl = layer.kl.detach()
    with pytest.raises(RuntimeError, match=r"layer `bert\.encoder\.layer\.1\.output\.dense` has no gradient"):
        require_kl_gradient(model)
    layer.log_var.requires_grad_(False)
    require_kl_gradient(model)


@pytest.mark.parametrize("name", ["layerdrop", "encoder_layerdrop", "decoder_layerdrop"])
def test_layers_that_are_left_out_at_random_are_refused(name: str) -> None:
    model = tiny_bert()
    require_every_layer(model)
    setattr(model.config, name, 0.1)
    with pytest.raises(ValueError, match=rf"`{name}` is 0.1 .*Set `model.config.{name} = 0`"):
        require_every_layer(model)
