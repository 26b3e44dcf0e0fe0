# SPDX-License-Identifier: Apache-2.0
"""`VDTrainer`: transformers' Trainer, maximising the evidence lower bound. It adds KL, EM, phases and a teacher."""

from collections import defaultdict
from collections.abc import Sized
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils.generic import ModelOutput

from hf_vdneuron.budget import speedup, units_left
from hf_vdneuron.checkpoints import has_teacher, load_teacher_, native_names, save_teacher
from hf_vdneuron.config import VDConfig
from hf_vdneuron.distillation import distillation_loss
from hf_vdneuron.elbo import em_step_, kl_divergence, set_variational_, variational_layers
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.optimization import phase_scheduler, reset_variational_, split_variational_
from hf_vdneuron.patching import patch_model_, unpatch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import irrelevant_weight_share, relevance_mask
from hf_vdneuron.schedules import Phase, PhasePlan, kl_weight_at
from hf_vdneuron.sublayers import Unit
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["VDTrainer"]

#: Default number of examples that a pretrained weight stands for: the KL weight is `num_data` over it. At weight 1 the
#: KL of 840 nats per example drove a pretrained model to chance (method: fact 2).
PRETRAINING_EVIDENCE = 3_000_000

#: A trial of whichever library searches for hyperparameters.
Trial = object

#: Tokens of a sequence for the expected speed-up, where the data does not tell.
DEFAULT_LENGTH = 128


class VDTrainer(Trainer):
    r"""Fine-tunes, sparsifies and recovers a model in one `train()`.

    In sparsification it minimises, per example, `nll + kl_weight * kl / num_data` (1): the KL counts once per
    optimizer step, and EM moves the prior once after it. Then the dropout-rate rule masks what is irrelevant, and
    recovery trains the rest. `prune()` removes it for good.

    Args:
        model: Model to train. A dense one is patched in place.
        args: Arguments of the run.
        vd_config: How to patch, for a model that is not patched yet.
        teacher: Dense model whose logits are the targets; by default the model itself as fine-tuned.
        max_length: Tokens of a sequence for which the expected speed-up is logged.
        **kwargs: Whatever `Trainer` takes.

    Raises:
        ValueError: If the arguments are of the wrong class, or a patched model comes with a config.
    """

    args: VDTrainingArguments
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: VDTrainingArguments | None = None,
        vd_config: VDConfig | None = None,
        teacher: nn.Module | None = None,
        max_length: int = DEFAULT_LENGTH,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, VDTrainingArguments):
            raise ValueError(f"`args` is a `{type(args).__name__}`: expected `VDTrainingArguments`.")
        if vd_config is not None and model is not None and variational_layers(model):
            raise ValueError("`model` is patched already, in its own way: leave `vd_config` out.")
        self.vd_config = vd_config or VDConfig()
        self.teacher = teacher
        self.max_length = max_length
        self._metrics: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._honours_num_items: bool | None = None
        if model is not None:
            self._patch_(model)
        super().__init__(model=model, args=args, **kwargs)
        if teacher is not None:
            teacher.to(args.device).requires_grad_(False).eval()
        self.add_callback(_PhaseCallback(self))

    def call_model_init(self, trial: Trial | None = None) -> PreTrainedModel:
        """Make a fresh model and patch it.

        Args:
            trial: Trial of a hyperparameter search.

        Returns:
            The model that `model_init` makes, patched.
        """
        return cast(PreTrainedModel, self._patch_(super().call_model_init(trial)))

    def _patch_(self, model: nn.Module) -> nn.Module:
        return model if variational_layers(model) else patch_model_(model, self.vd_config)

    @property
    def plan(self) -> PhasePlan:
        """Optimizer steps of each phase; known once `train()` has counted its steps."""
        return self.args.phase_plan(self.state.max_steps)

    @property
    def phase(self) -> Phase:
        """Phase of the step that comes next."""
        return self.plan.phase_at(self.state.global_step)

    @property
    def num_data(self) -> int:
        """Number of terms that the loss is the mean of, :math:`N` in the bound.

        Raises:
            ValueError: If it has to be set.
        """
        if self.args.num_data is not None:
            return self.args.num_data
        if not isinstance(self.train_dataset, Sized):
            raise ValueError("`train_dataset` has no length: set `num_data` to the number of its examples.")
        return len(self.train_dataset)

    @property
    def kl_weight(self) -> float:
        """Weight of the KL term at the step that comes next; 0 outside sparsification."""
        if self.phase is not Phase.SPARSIFY:
            return 0.0
        final = self.args.kl_weight
        return kl_weight_at(
            *self.plan.position(self.state.global_step),
            kl_weight=self.num_data / PRETRAINING_EVIDENCE if final is None else final,
            ramp=self.args.kl_ramp,
            start=self.args.kl_start,
        )

    # ---- Objective ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Compute the negative evidence lower bound in training, the plain loss in evaluation.

        Args:
            model: The model, possibly wrapped.
            inputs: One micro-batch.
            return_outputs: Whether to return the outputs too.
            num_items_in_batch: Number of loss terms in all micro-batches of the step.

        Returns:
            The loss, with the outputs if asked for.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._detect_loss_scaling_(model, inputs)
        labels = inputs.get("labels")
        self._require_num_data(inputs, labels)
        nll, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._metrics["nll"].append(nll.detach())
        # The Trainer divides a micro-batch's mean by their number, and leaves alone what is scaled already.
        is_scaled, parts = self._loss_is_scaled(num_items_in_batch), self.current_gradient_accumulation_steps
        loss = self._distil(nll, outputs, inputs, labels, parts if is_scaled else 1)
        if any(layer.collect_kl for layer in variational_layers(self.model).values()):
            kl = kl_divergence(self.model) / self.num_data
            self._metrics["kl"].append(kl.detach())
            # The step's KL comes with its first micro-batch, undivided, so that it is exact for any accumulation.
            loss = loss + self.kl_weight * kl * (1 if is_scaled else parts)
        return (loss, outputs) if return_outputs else loss

    def _distil(
        self, nll: Tensor, outputs: ModelOutput, inputs: dict[str, Any], labels: Tensor | None, parts: int
    ) -> Tensor:
        """Mix in the teacher's loss over `parts`, which takes the place of the nll."""
        weight = self.args.distillation_weight
        if self.phase is Phase.FINETUNE or self.teacher is None or weight == 0:
            return nll
        with torch.no_grad():
            teacher_outputs = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"})
        temperature = self.args.distillation_temperature
        loss = distillation_loss(outputs["logits"], teacher_outputs["logits"], temperature=temperature, labels=labels)
        self._metrics["distillation"].append(loss.detach())
        return (1 - weight) * nll + weight * loss / parts

    def _require_num_data(self, inputs: dict[str, Any], labels: Tensor | None) -> None:
        """Refuse to take examples for tokens: a language model's loss is a mean over target tokens."""
        tokens = inputs.get("input_ids")
        if self.args.num_data is None and labels is not None and tokens is not None and labels.shape == tokens.shape:
            raise ValueError(
                f"The labels are tokens, of shape {tuple(labels.shape)}: set `num_data` to the number of target "
                "tokens in the training set."
            )

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell whether the Trainer takes the loss as already divided over the micro-batches of the step."""
        honours = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return honours or self.compute_loss_func is not None

    def _detect_loss_scaling_(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out once whether the model divides its loss by `num_items_in_batch`, as the Trainer believes.

        Many heads take the argument and ignore it, and the Trainer then multiplies their gradients by the number of
        micro-batches (huggingface/transformers#47688).
        """
        is_own = self.compute_loss_func is not None or self.label_smoother is not None
        known = self._honours_num_items is not None or not self.model_accepts_loss_kwargs
        if is_own or known or self.args.gradient_accumulation_steps == 1:
            return
        model.eval()
        with torch.no_grad():
            losses = [model(**inputs, num_items_in_batch=torch.tensor(count)).loss for count in (1, 2)]
        model.train()
        self._honours_num_items = not torch.equal(*losses)
        self.model_accepts_loss_kwargs = self._honours_num_items

    # ---- Optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give log-variances and group scales groups of their own.

        Args:
            model: Model to optimise, if not the trainer's own.

        Returns:
            The optimizer.
        """
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        split_variational_(
            optimizer,
            (self.model if model is None else model).named_parameters(),
            {"log_var": self.args.log_var_distance, "group_scale": self.args.group_scale_distance},
            num_steps=self.plan.sparsify_steps,
        )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Shape every rate over each phase; variational rates move in sparsification only, and hold there.

        Args:
            num_training_steps: Optimizer steps of the whole run.
            optimizer: Optimizer, if not the trainer's own.

        Returns:
            The scheduler.
        """
        if self.lr_scheduler is None:
            self.lr_scheduler = phase_scheduler(
                cast(torch.optim.Optimizer, self.optimizer if optimizer is None else optimizer),
                self.args.phase_plan(num_training_steps),
                decay=self.args.decay,
                warmup_steps=self.args.get_warmup_steps,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Phases ----

    def _enter_step_(self) -> None:
        """Do what the coming optimizer step needs; a boundary's own work is done at its very step."""
        step, plan = self.state.global_step, self.plan
        if step == plan.sparsify_start and plan.sparsify_steps:
            self._start_sparsification_()
        if step == plan.recover_start and plan.sparsify_steps:
            mask_model_(self.model, relevance_mask(self.model, self.args.dropout_rate_threshold))
            self._score("cut")
        sparsifying = self.phase is Phase.SPARSIFY
        set_variational_(self.model, noise=sparsifying, collect_kl=sparsifying, frozen=not sparsifying)

    def _start_sparsification_(self) -> None:
        self._score("dense")
        if self.teacher is None and self.args.distillation_weight:
            self.teacher = self._own_teacher()
        reset_variational_(cast(torch.optim.Optimizer, self.optimizer))

    def _score(self, milestone: str) -> None:
        """Evaluate at a boundary, and log the metrics under its name."""
        if self.eval_dataset is None:
            return
        for name in self.eval_dataset if isinstance(self.eval_dataset, dict) else [None]:
            prefix = milestone if name is None else f"{milestone}_{name}"
            output = self.evaluation_loop(self.get_eval_dataloader(name), prefix, metric_key_prefix=prefix)
            self.log(output.metrics or {})

    def milestone(self, name: str) -> float | None:
        """Look up a metric of the dense model (`dense_...`) or right after the cut (`cut_...`) in the log.

        Args:
            name: Name of the metric, such as `dense_score`.

        Returns:
            Its value; None if it was not measured.
        """
        return next((logs[name] for logs in reversed(self.state.log_history) if name in logs), None)

    def _own_teacher(self) -> nn.Module:
        """Copy the model as it is, dense and fixed."""
        return unpatch_model_(deepcopy(self.model)).requires_grad_(False).eval()

    def mask(self) -> RelevanceMask:
        """Tell what is kept: by the masks after sparsification, by the rule during it.

        Returns:
            The mask that `prune()` would apply now.
        """
        if self.plan.sparsify_steps and self.state.global_step <= self.plan.recover_start:
            return relevance_mask(self.model, self.args.dropout_rate_threshold)
        return read_mask(self.model)

    def prune(self) -> PreTrainedModel:
        """Remove irrelevant heads and neurons for good; the trainer then holds, saves and pushes the pruned model.

        Returns:
            The trainer's model, smaller.
        """
        # In mixed precision accelerate puts an autocasting `forward` on the model, where it would stay for good.
        if vars(self.model).pop("_original_forward", None) is not None:
            del self.model.forward
        prune_model_(self.model, self.mask())
        self.model_wrapped = self.model
        return self.model

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what sparsification adds to the logs of a training step.

        Args:
            logs: What the Trainer logs.
            start_time: Start of training.
        """
        if "loss" in logs and variational_layers(self.model):
            logs |= {name: torch.stack(values).mean().item() for name, values in self._metrics.items()}
            self._metrics.clear()
            logs |= self._structure_logs()
        super().log(logs, start_time)

    def _structure_logs(self) -> dict[str, float]:
        mask = self.mask()
        left = units_left(self.model, mask)
        return {
            "kl_weight": self.kl_weight,
            "irrelevant_weights": irrelevant_weight_share(self.model, self.args.dropout_rate_threshold),
            "heads": sum(left[Unit.HEAD]),
            "neurons": sum(left[Unit.NEURON]),
            "expected_speedup": speedup(self.model, mask, length=self.max_length),
        }

    # ---- Checkpoints: private methods of the Trainer, watched by tests/test_trainer.py ----

    def _determine_best_metric(self, metrics: dict[str, float], trial: Trial | None) -> bool:
        """Let only recovery compete for the best model: earlier ones have not been masked yet."""
        if self.plan.recover_steps and self.state.global_step <= self.plan.recover_start:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save under the names that a resumed run loads by (huggingface/transformers#48805)."""
        with native_names(self.model):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Trial | None) -> None:
        """Put the teacher beside the weights, as it is the model of a step that is gone."""
        super()._save_checkpoint(model, trial)
        if self.teacher is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            save_teacher(self.teacher, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Take the teacher back."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if has_teacher(resume_from_checkpoint):
            self.teacher = self._own_teacher() if self.teacher is None else self.teacher
            load_teacher_(self.teacher, resume_from_checkpoint)


class _PhaseCallback(TrainerCallback):
    """Tells the trainer where in a step it is."""

    def __init__(self, trainer: VDTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.trainer._enter_step_()

    def on_substep_end(self, *_: Any, **kwargs: Any) -> None:
        """Only the first micro-batch of a step computes the KL."""
        for layer in variational_layers(self.trainer.model).values():
            layer.collect_kl = False

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        em_step_(self.trainer.model)
