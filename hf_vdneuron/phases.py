# SPDX-License-Identifier: Apache-2.0
"""What happens where the phases of a run meet: noise comes on, the teacher is taken, what is irrelevant is cut."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_vdneuron.checks import require_all_phases, require_own_teacher, require_posterior
from hf_vdneuron.distillation import Teacher
from hf_vdneuron.elbo import em_step_, set_variational_, variational_layers
from hf_vdneuron.monitoring import RunningMeans
from hf_vdneuron.optimization import reset_variational_
from hf_vdneuron.schedules import Phase
from hf_vdneuron.steering import Steering
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = ["PhaseCallback"]


class PhaseCallback(TrainerCallback):
    """Leads a model through the phases of every run of its trainer.

    Where a step stands is a function of its number, so a resumed run needs nothing of the one before it but the
    model, the optimizer, the teacher and the steering. A tolerance cuts by a callback of its own.

    Args:
        teacher: Takes the fine-tuned model.
        steering: Weighs the KL.
        means: What the logs average; every run starts its own.
        score: Function `(milestone) -> None` that evaluates the model and logs the metrics under this name.
        cut: Function that masks what is irrelevant.

    Attributes:
        is_cut: Whether this run has masked all that is irrelevant.
    """

    def __init__(
        self,
        teacher: Teacher,
        steering: Steering,
        means: RunningMeans,
        score: Callable[[str], None],
        cut: Callable[[], None],
    ) -> None:
        self.teacher = teacher
        self.steering = steering
        self.means = means
        self.score = score
        self.cut = cut
        self.is_cut = False

    def on_train_begin(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Forget the run before this one, and refuse one that would not do what it says.

        Args:
            args: Arguments of the run.
            state: Where it stands: at its start, or where it is resumed.
            **run: Model and optimizer.

        Raises:
            ValueError: If the run cannot be done.
        """
        plan, step = args.phase_plan(state.max_steps), state.global_step
        self.means.clear()
        self.is_cut = args.removes and step > plan.recover_start
        if step <= plan.sparsify_start:
            self.teacher.forget_own_()
        require_all_phases(args, state.max_steps)
        if args.removes:
            require_posterior(run["model"])
            if args.distillation_weight and step < state.max_steps:
                require_own_teacher(self.teacher.model, step, made_at=plan.sparsify_start)
        self.steering.begin_(run["model"], args, plan, step=step)

    def on_step_begin(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Do what the coming optimizer step needs; a boundary's own work is done at its very step.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Model and optimizer.
        """
        plan, step, model = args.phase_plan(state.max_steps), state.global_step, run["model"]
        if args.removes and step == plan.sparsify_start:
            self.score("dense")
            if args.distillation_weight:
                self.teacher.copy_(model)
            if plan.sparsify_steps:
                reset_variational_(run["optimizer"])
                self.steering.look_(model, plan, step=step)
        if args.removes and args.tolerance is None and step == plan.recover_start:
            self._cut_()
        sparsifying = plan.phase_at(step) is Phase.SPARSIFY
        set_variational_(model, noise=sparsifying, collect_kl=sparsifying, frozen=not sparsifying)

    def on_substep_end(self, *_: Any, **run: Any) -> None:
        """Only the first micro-batch of a step computes the KL.

        Args:
            **run: Model and optimizer.
        """
        for layer in variational_layers(run["model"]).values():
            layer.collect_kl = False

    def on_optimizer_step(self, *_: Any, **run: Any) -> None:
        """Move the prior once per step.

        Args:
            **run: Model and optimizer.
        """
        em_step_(run["model"])

    def on_step_end(  # type: ignore[override]
        self, args: VDTrainingArguments, state: TrainerState, control: TrainerControl, **run: Any
    ) -> None:
        """Correct the KL weight for the steps that come, and have the posterior saved when it is done.

        Args:
            args: Arguments of the run.
            state: Where it stands, the step just done included.
            control: Takes the wish to save.
            **run: Model and optimizer.
        """
        plan = args.phase_plan(state.max_steps)
        if plan.sparsify_start < state.global_step <= plan.recover_start:
            self.steering.look_(run["model"], plan, step=state.global_step)
        control.should_save |= args.save_posterior and state.global_step == plan.recover_start

    def on_train_end(self, args: VDTrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:  # type: ignore[override]
        """Cut where no step of recovery did: there is none, or training was stopped before.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            **run: Model and optimizer.
        """
        plan, model, step = args.phase_plan(state.max_steps), run["model"], state.global_step
        if args.removes and step >= plan.posterior_start and not self.is_cut:
            if step == plan.sparsify_start:
                self.score("dense")
            if args.tolerance is None:
                self._cut_()
        set_variational_(model, noise=False, collect_kl=False, frozen=True)

    def _cut_(self) -> None:
        self.cut()
        self.is_cut = True
        self.score("cut")
