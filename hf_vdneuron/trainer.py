# SPDX-License-Identifier: Apache-2.0
"""`VDTrainer`: transformers' Trainer, maximising the evidence lower bound. It adds KL, EM, phases and a teacher."""

from collections.abc import Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from hf_vdneuron.architectures import is_supported
from hf_vdneuron.checks import (
    require_decision,
    require_every_layer,
    require_examples,
    require_kl_gradient,
    require_known_patch,
    require_no_scheduler,
    require_one_process_per_device,
    require_supported_sharding,
)
from hf_vdneuron.config import VDConfig
from hf_vdneuron.discovery import discover
from hf_vdneuron.distillation import (
    Teacher,
    distillation_loss,
    hidden_state_loss,
    predictions,
    require_hidden_states,
)
from hf_vdneuron.elbo import kl_divergence, variational_layers, variational_parameters
from hf_vdneuron.judging_trainer import JudgingTrainer
from hf_vdneuron.keepsake import Keepsake
from hf_vdneuron.loss_scaling import honours_num_items
from hf_vdneuron.masks import RelevanceMask, read_mask
from hf_vdneuron.monitoring import RunningMeans, structure_logs
from hf_vdneuron.optimization import phase_scheduler, split_variational_
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.phases import PhaseCallback
from hf_vdneuron.precision import leave_mixed_precision_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import irrelevant_weight_share, relevance_mask
from hf_vdneuron.resumable_trainer import Trial
from hf_vdneuron.schedules import Phase
from hf_vdneuron.sharding import dense_copy, is_sharded
from hf_vdneuron.steering import Steering
from hf_vdneuron.targets import DEFAULT_LENGTH
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["VDTrainer"]


class VDTrainer(JudgingTrainer):
    r"""Fine-tunes, sparsifies and recovers a model in one `train()`.

    In sparsification it minimises, per example, `nll + kl_weight * kl / num_data` (1): the KL counts once per
    optimizer step, and EM moves the prior once after it. Then what the target leaves no room for is masked, or what a
    tolerance can do without, or without either what the dropout-rate rule finds irrelevant, and recovery trains the
    rest. `prune()` removes it for good.

    With a target or a tolerance, sparsification takes no step unless it is given some: the posterior is in closed form
    then, from gradients on some training examples, and what a cut leaves makes up for it by least squares.

    Args:
        model: Model to train; a dense one is patched in place, of an unknown type once some examples were looked at.
        args: Arguments of the run.
        vd_config: How to patch, for a model that is not patched yet.
        teacher: Dense model whose logits, and hidden states if asked for, are targets; by default the fine-tuned one.
        max_length: Tokens of a sequence for which a speed-up is asked and logged.
        **kwargs: Whatever `Trainer` takes. `optimizers` can bring an optimizer, but no scheduler.

    Raises:
        ValueError: If the arguments are of the wrong class, a patched model comes with a config, the optimizer with a
            scheduler, the data without a length, a tolerance without data to judge by, the run with a parallelism that
            loses the KL, or the model without anything to remove.
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
        require_no_scheduler(kwargs.get("optimizers"))
        require_one_process_per_device(args)
        self.vd_config = vd_config or VDConfig()  # None for a model that came patched
        self.max_length = max_length
        self._teacher = Teacher(teacher)
        self._means = RunningMeans()
        self._honours_num_items: bool | None = None
        self._steering = Steering(max_length, lambda: self.num_data)
        self._keepsake = Keepsake()
        self._phases = PhaseCallback(self._teacher, self._steering, self._means, self._score, self._cut_)
        if model is not None and is_supported(model):
            self._patch_(model)
        super().__init__(model=model, args=args, **kwargs)
        if not is_supported(self.model):
            self._discover_and_patch_()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        require_supported_sharding(plugin, has_tolerance=args.tolerance is not None)
        if teacher is not None:
            teacher.to(args.device).requires_grad_(False).eval()
        self.add_callback(self._phases)
        self._watch_tolerance_()
        is_trained = args.fractions[Phase.SPARSIFY] > 0
        if args.removes and (args.tolerance is not None or not is_trained):
            require_known_patch(self.vd_config)
        if is_trained:
            self._require_trainable_posterior()

    def call_model_init(self, trial: Trial | None = None) -> PreTrainedModel:
        """Make a fresh model and patch it.

        Args:
            trial: Trial of a hyperparameter search.

        Returns:
            The model that `model_init` makes, patched.
        """
        return cast(PreTrainedModel, self._patch_(super().call_model_init(trial)))

    def _patch_(self, model: nn.Module) -> nn.Module:
        if variational_layers(model):
            self.vd_config = None
            return model
        return patch_model_(model, self.vd_config)

    def _require_trainable_posterior(self) -> None:
        require_every_layer(self.model)
        if self.train_dataset is not None:
            self.num_data  # noqa: B018  # refuses data of unknown length

    def _discover_and_patch_(self) -> None:
        if self.train_dataset is not None:
            discover(self.model, self.example_inputs())
        self._patch_(self.model)

    @property
    def teacher(self) -> nn.Module | None:
        """Model whose logits are the targets; without a given one, None until sparsification starts."""
        return self._teacher.model

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
        return self._steering.kl_weight(self.args, self.plan, step=self.state.global_step)

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
        if self.args.num_data is None and self.plan.sparsify_steps:
            require_examples(inputs, labels)
        asked = {**inputs, "output_hidden_states": True} if self._distils_hidden_states else inputs
        nll, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        # The Trainer divides a micro-batch's mean by their number, and leaves alone what is scaled already.
        parts = self.current_gradient_accumulation_steps
        divided_by = parts if self._loss_is_scaled(num_items_in_batch) else 1
        self._means.add("nll", nll * divided_by)
        loss = self._distil(nll, outputs, inputs, labels, divided_by)
        if any(layer.collect_kl for layer in variational_layers(self.model).values()):
            require_kl_gradient(self.model)
            kl = kl_divergence(self.model) / self.num_data
            self._means.add("kl", kl)
            # The step's KL comes with its first micro-batch, undivided, so that it is exact for any accumulation.
            loss = loss + self.kl_weight * kl * (parts // divided_by)
        return (loss, outputs) if return_outputs else loss

    def _distil(
        self, nll: Tensor, outputs: ModelOutput, inputs: dict[str, Any], labels: Tensor | None, divided_by: int
    ) -> Tensor:
        """Mix in the teacher's loss, divided like the nll, whose place it takes."""
        weight, learns = self.args.distillation_weight, self.phase is not Phase.FINETUNE
        # The first step tries it in any phase: nobody should pay for fine-tuning to hear that the rest is impossible.
        if weight == 0 or not self._has_lessons or not (learns or self.state.global_step == 0):
            return nll
        logits = predictions(outputs, "model")
        if self._distils_hidden_states:
            require_hidden_states(outputs)
        if self.teacher is None:
            return nll
        with self.accelerator.autocast():  # which the model has of its own accord
            lesson = self._teacher.outputs(inputs, hidden_states=self._distils_hidden_states)
        loss = distillation_loss(
            logits,
            predictions(lesson, "teacher"),
            labels=labels,
            temperature=self.args.distillation_temperature,
            configured=getattr(getattr(self.model, "config", None), "problem_type", None),
        )
        missed = hidden_state_loss(outputs, lesson, inputs) if self._distils_hidden_states else None
        if not learns:
            return nll
        self._means.add("distillation", loss)
        if missed is not None:
            self._means.add("hidden_distillation", missed)
            loss = loss + self.args.hidden_distillation_weight * missed
        return (1 - weight) * nll + weight * loss / divided_by

    @property
    def _distils_hidden_states(self) -> bool:
        """Whether hidden states of the coming step are compared with the teacher's."""
        if self.args.hidden_distillation_weight == 0 or not self._has_lessons:
            return False
        return self.state.global_step == 0 if self.phase is Phase.FINETUNE else self.teacher is not None

    @property
    def _has_lessons(self) -> bool:
        """Whether some step of the run has a teacher."""
        return self.args.removes or (self.teacher is not None and self.plan.recover_steps > 0)

    def _loss_is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell whether the Trainer takes the loss as already divided over the micro-batches of the step."""
        honours = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return honours or self.compute_loss_func is not None

    def _detect_loss_scaling_(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out once whether the model divides its loss by `num_items_in_batch`, as the Trainer believes."""
        is_own = self.compute_loss_func is not None or self.label_smoother is not None
        known = self._honours_num_items is not None or not self.model_accepts_loss_kwargs
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if not (is_own or known or parts == 1):
            self._honours_num_items = honours_num_items(model, inputs)
            self.model_accepts_loss_kwargs = self._honours_num_items is not False

    # ---- Optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make an optimizer, or take the one given, with groups of their own for log-variances and group scales.

        Args:
            model: Model to optimise, if not the trainer's own.

        Returns:
            The optimizer.
        """
        for parameter in variational_parameters(self.model if model is None else model):
            # What stands still all the time needs no memory for gradients and moments.
            parameter.requires_grad_(self.plan.sparsify_steps > 0)
        optimizer = super().create_optimizer(model)
        split_variational_(
            optimizer,
            (self.model if model is None else model).named_parameters(),
            {"log_var": self.args.log_var_distance, "group_scale": self.args.group_scale_distance},
            num_steps=self.plan.sparsify_steps,
        )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Shape every rate over each phase; variational rates are above 0 in sparsification only.

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
                num_recoveries=1 if self.args.tolerance is None else self.args.num_sizes,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- What is left ----

    def mask(self) -> RelevanceMask:
        """Tell what is kept: by the target, tolerance or rule until the cut of a run, by the masks after it.

        Returns:
            The mask of a cut that was made now and, for a target, in one stage.
        """
        # A tolerance cuts where it judges.
        if self._is_to_be_cut and self.args.tolerance is None:
            return self._choose()
        return read_mask(self.model)

    @property
    def _is_to_be_cut(self) -> bool:
        return self.args.removes and not self._phases.is_cut

    def prune(self) -> PreTrainedModel:
        """Remove irrelevant heads and neurons for good; the trainer then holds, saves and pushes the pruned model.

        Every process has to call this. A sharded model is put together first, on every process: the pruned model is
        a new object then.

        Another `train()` starts with a new optimizer, as the weights are new ones.

        Returns:
            The trainer's model, smaller.

        Raises:
            ValueError: If no step has sparsified and the model carries no mask.
        """
        step, plan = self.state.global_step, self.plan
        # A run that asks for nothing has nothing to decide.
        first = plan.posterior_start if self.args.removes else 1
        require_decision(self.model, has_decided=self.state.max_steps > 0 and step >= first, step=step)
        leave_mixed_precision_(self.model)
        mask = self.mask()
        if is_sharded(self.model):
            self.model = self.callback_handler.model = cast(PreTrainedModel, dense_copy(self.model))
        prune_model_(self.model, mask)
        self._phases.is_cut = True
        self.model_wrapped = self.model
        self.optimizer, self.lr_scheduler = None, None
        return self.model

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what sparsification adds to the logs of a training step.

        Args:
            logs: What the Trainer logs.
            start_time: Start of training.
        """
        if "loss" in logs:
            logs |= self._means.take()
            if variational_layers(self.model):
                threshold = self.args.dropout_rate_threshold
                # What the rule would keep shows how far the posterior is; the target's cut is the same at every step.
                is_trained = self.plan.sparsify_steps > 0
                undecided = is_trained and self._is_to_be_cut
                mask = relevance_mask(self.model, threshold) if undecided else read_mask(self.model)
                if is_trained:
                    irrelevant = irrelevant_weight_share(self.model, threshold)
                    logs |= {"kl_weight": self.kl_weight, "irrelevant_weights": irrelevant}
                if self.phase is Phase.SPARSIFY:
                    logs |= self._steering.logs()
                logs |= structure_logs(self.model, mask, length=self.max_length)
        super().log(logs, start_time)

    # ---- Private methods of the Trainer, watched by tests/test_trainer.py ----

    def _determine_best_metric(self, metrics: dict[str, float], trial: Trial | None) -> bool:
        """Let only recovery compete for the best model of a sparsifying run: earlier ones have not been masked."""
        if self.args.removes and self.state.global_step <= self.plan.recover_start:
            return False
        # A tolerance goes back to the best size itself.
        if self.args.tolerance is not None:
            return False
        return super()._determine_best_metric(metrics, trial)
