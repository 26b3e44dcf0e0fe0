# SPDX-License-Identifier: Apache-2.0
"""What a run needs: refuses, as early as it shows, one that would fail late or end elsewhere without a word."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_vdneuron.config import VDConfig
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.masks import read_mask
from hf_vdneuron.schedules import Phase
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = [
    "require_all_phases",
    "require_decision",
    "require_every_layer",
    "require_examples",
    "require_kl_gradient",
    "require_known_patch",
    "require_no_scheduler",
    "require_one_process_per_device",
    "require_own_teacher",
    "require_posterior",
    "require_supported_sharding",
]


#: Shares of layers that are left out in a training step, as configs call them.
_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")

#: Stage of DeepSpeed's ZeRO that spreads the parameters themselves.
ZERO_STAGE_OF_PARAMETERS = 3

#: Version of FSDP that leaves a weight a matrix.
SUPPORTED_FSDP_VERSION = 2


def require_no_scheduler(optimizers: tuple[object, object] | None) -> None:
    """Refuse a scheduler beside the optimizer that the user brings: it knows nothing of phases.

    Args:
        optimizers: The Trainer's argument of this name: optimizer and scheduler, each possibly None.

    Raises:
        ValueError: If there is a scheduler.
    """
    scheduler = None if optimizers is None else optimizers[1]
    if scheduler is not None:
        raise ValueError(
            f"`optimizers` brings a `{type(scheduler).__name__}`: expected `(optimizer, None)`, as each phase has its "
            "own warm-up and decay. Choose them with `warmup_steps` and `lr_scheduler_type`."
        )


def require_every_layer(model: nn.Module) -> None:
    """Refuse a model that leaves out whole layers in training at random, whose KL a step would then miss.

    Args:
        model: The model.

    Raises:
        ValueError: If its config says so.
    """
    config = getattr(model, "config", None)
    for name in _LAYER_DROPS:
        if getattr(config, name, 0):
            raise ValueError(
                f"`{name}` is {getattr(config, name)} in the config of the model, which leaves layers out in some "
                f"steps, and their part of the bound with them: expected 0. Set `model.config.{name} = 0`."
            )


def require_one_process_per_device(args: VDTrainingArguments) -> None:
    """Refuse ways to spread a model that lose its KL or cut its weights up.

    Args:
        args: Arguments of the run.

    Raises:
        ValueError: If the run would use `nn.DataParallel` or DeepSpeed's ZeRO-3.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} devices and would use `nn.DataParallel`, whose copies lose their KL: "
            "expected one process per device. Start the run with `accelerate launch`, or show it one device with "
            "`CUDA_VISIBLE_DEVICES=0`."
        )
    plugin = getattr(args, "deepspeed_plugin", None)
    if is_deepspeed_zero3_enabled() or getattr(plugin, "zero_stage", None) == ZERO_STAGE_OF_PARAMETERS:
        raise ValueError(
            "DeepSpeed's ZeRO-3 cuts weights into pieces that know no rows: expected whole weights on every device. "
            "Use stage 1 or 2, FSDP2 through `accelerate`, or plain data parallelism."
        )


def require_supported_sharding(plugin: FullyShardedDataParallelPlugin | None, *, has_tolerance: bool = False) -> None:
    """Refuse fully sharded data parallelism in ways that lose a posterior, its prior or its noise.

    Args:
        plugin: What accelerate knows of it, None without it.
        has_tolerance: Whether the run goes back to an earlier model where a tolerance is passed.

    Raises:
        ValueError: If it is of version 1, one process is to load the model for all, it checkpoints activations, it
            casts parameters to fewer digits than float32, or the run has a tolerance.
    """
    if plugin is None:
        return
    if has_tolerance:
        raise ValueError(
            "A tolerance goes back to a whole model where it is passed, and FSDP holds none: expected plain data "
            "parallelism or one process. Ask for a target instead."
        )
    if plugin.fsdp_version != SUPPORTED_FSDP_VERSION:
        raise ValueError(
            f"FSDP of version {plugin.fsdp_version} makes one vector of many weights: expected version 2, which keeps "
            "their rows. Set `fsdp_version: 2` in the config of accelerate."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` is on, with which accelerate sends parameters to the processes but no "
            "buffers, such as priors and masks: expected every process to load the model. Set "
            "`fsdp_cpu_ram_efficient_loading: false` in the config of accelerate."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing` is on, which recomputes a layer with other noise than its loss was made "
            "of, so that gradients are wrong: expected it off. Set `gradient_checkpointing=True` in the arguments."
        )
    dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    if dtype is not None and torch.finfo(dtype).bits < torch.finfo(torch.float32).bits:
        raise ValueError(
            f"FSDP would cast parameters to {dtype}, log-variances and group scales with them: expected float32. Set "
            "`mixed_precision: no` in the config of accelerate, and neither `bf16` nor `fp16` in the arguments."
        )


def require_all_phases(args: VDTrainingArguments, num_steps: int) -> None:
    """Refuse a run that is too short for what its fractions ask for.

    Args:
        args: Arguments of the run.
        num_steps: Optimizer steps of the whole run.

    Raises:
        ValueError: If a phase with a positive fraction gets no step.
    """
    plan = args.phase_plan(num_steps)
    for phase in Phase:
        fraction, steps = args.fractions[phase], getattr(plan, f"{phase}_steps")
        if fraction > 0 and steps < 1:
            raise ValueError(
                f"`{phase}_fraction` is {fraction:g}, but the whole run has {num_steps} optimizer steps, none of "
                f"them for this phase: expected at least 1. Raise `max_steps` or `num_train_epochs`, or set "
                f"`{phase}_fraction=0` to skip the phase."
            )


def require_known_patch(config: VDConfig | None) -> None:
    """Refuse to put a posterior in closed form in the place of one that somebody else began.

    Args:
        config: How the trainer patched its model, None if it came patched.

    Raises:
        ValueError: If it did.
    """
    if config is None:
        raise ValueError(
            "`model` came patched, with a posterior of its own, and this run would take another in closed form: pass "
            "it dense, with `vd_config`, or train its posterior with a `sparsify_fraction` and towards a target."
        )


def require_posterior(model: nn.Module) -> None:
    """Refuse to sparsify a dense model.

    Args:
        model: The model.

    Raises:
        ValueError: If it has no variational layer.
    """
    if not variational_layers(model):
        raise ValueError(
            "The model has no variational layer left to sparsify, as after `prune()`: set `sparsify_fraction=0` and "
            "no target to train it as it is, or make a new `VDTrainer` with it to sparsify it further."
        )


def require_decision(model: nn.Module, *, has_decided: bool, step: int) -> None:
    """Refuse to remove what nothing has decided about: there was no posterior, and no mask is there.

    Args:
        model: The model.
        has_decided: Whether its run came to a posterior.
        step: Steps done in it.

    Raises:
        ValueError: If it did not, and the model carries no mask.
    """
    if has_decided:
        return
    if variational_layers(model) and all(keep.all() for keep in read_mask(model).keep.values()):
        raise ValueError(
            f"Nothing has decided what goes: {step} steps are done, and none of them sparsified. Call `train()` first "
            "or choose yourself and call `prune_model_(model, mask)`, as with `relevance_mask(model)`."
        )


def require_own_teacher(teacher: nn.Module | None, step: int, made_at: int) -> None:
    """Refuse to go on without the teacher that the run began with.

    Args:
        teacher: What the checkpoint brought back, or the user's.
        step: Step of the checkpoint.
        made_at: Step at which the run takes its own teacher.

    Raises:
        ValueError: If the run is past that step without a teacher.
    """
    if teacher is None and step > made_at:
        raise ValueError(
            f"The checkpoint of step {step} holds no teacher: expected the model of step {made_at} in it. Resume from "
            f"a checkpoint that has one or from one of step {made_at} at most, pass `teacher`, or set "
            "`distillation_weight=0`."
        )


def require_examples(inputs: Mapping[str, Any], labels: Tensor | None) -> None:
    """Refuse to take examples for tokens: a language model's loss is a mean over target tokens.

    Args:
        inputs: One micro-batch.
        labels: Its labels.

    Raises:
        ValueError: If there is a class for each token.
    """
    tokens = inputs.get("input_ids")
    if labels is None or tokens is None or labels.is_floating_point():
        return  # one number per label, such as a multi-label head has, is no class
    if labels.shape == tokens.shape:
        raise ValueError(
            f"The labels are tokens, of shape {tuple(labels.shape)}: set `num_data` to the number of target tokens in "
            "the training set."
        )


def require_kl_gradient(model: nn.Module) -> None:
    """Refuse a KL that the posterior would not feel.

    Args:
        model: A patched model after a training forward that collects its KL.

    Raises:
        RuntimeError: If a layer's KL carries no gradient although its log-variances want one.
    """
    for name, layer in variational_layers(model).items():
        if layer.kl is not None and layer.log_var.requires_grad and not layer.kl.requires_grad:
            raise RuntimeError(
                f"The KL of layer `{name}` has no gradient: expected a forward that keeps its graph. If the model was "
                "set to reentrant checkpointing, which drops it, set `use_reentrant=False` there, or leave it to the "
                "arguments of the run."
            )
