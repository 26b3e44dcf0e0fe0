# SPDX-License-Identifier: Apache-2.0
"""The options of a run: what transformers' own arguments say, and what sparsification adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_vdneuron.relevance import DROPOUT_RATE_THRESHOLD
from hf_vdneuron.schedules import Decay, PhasePlan


__all__ = ["VDTrainingArguments"]


@dataclass
class VDTrainingArguments(TrainingArguments):
    """Arguments of `VDTrainer`.

    `num_train_epochs` or `max_steps` is the length of the whole run. The fractions divide it into fine-tuning,
    sparsification and recovery, each with its own warm-up and decay. With 1,000 steps and the default fractions, the
    first 300 fine-tune, 500 sparsify and 200 recover.

    A model that is fine-tuned already starts with `finetune_fraction=0`.
    """

    finetune_fraction: float = field(
        default=0.3, metadata={"help": "Share of the run that fine-tunes the dense model; 0 skips it."}
    )
    sparsify_fraction: float = field(
        default=0.5, metadata={"help": "Share of the run that trains the posterior; 0 skips it."}
    )
    recover_fraction: float = field(
        default=0.2, metadata={"help": "Share of the run that trains what is left; 0 skips it."}
    )
    kl_weight: float | None = field(
        default=None,
        metadata={
            "help": "Final weight of the KL term. By default `num_data` / 3,000,000: a pretrained weight stands for "
            "far more evidence than the examples of one task."
        },
    )
    kl_ramp: float = field(
        default=0.6, metadata={"help": "Share of the sparsification over which the KL weight rises, in [0, 1]."}
    )
    kl_start: float = field(
        default=1.0,
        metadata={"help": "First KL weight relative to the final one, in (0, 1]; it rises exponentially."},
    )
    log_var_distance: float = field(
        default=2.0,
        metadata={
            "help": "How far Adam can move a log-variance over the sparsification, in nats. Its learning rate is this "
            "distance over the number of steps, so the default holds for short and long runs."
        },
    )
    group_scale_distance: float = field(
        default=3.0, metadata={"help": "The same for the scale of each group's means, which starts at 1."}
    )
    dropout_rate_threshold: float = field(
        default=DROPOUT_RATE_THRESHOLD,
        metadata={"help": "A weight is irrelevant if its dropout rate is above this, in (0, 1)."},
    )
    distillation_weight: float = field(
        default=0.9,
        metadata={
            "help": "Share of the teacher's loss in sparsification and recovery, in [0, 1]; 0 trains without a "
            "teacher. By default the teacher is the model as fine-tuned."
        },
    )
    distillation_temperature: float = field(default=2.0, metadata={"help": "Temperature of both softmaxes, above 0."})
    num_data: int | None = field(
        default=None,
        metadata={
            "help": "Number of terms in the sum that the loss is the mean of: training examples (the default) or, for "
            "a language model, target tokens."
        },
    )

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of its range, or gradient checkpointing is reentrant.
        """
        super().__post_init__()
        fractions = (self.finetune_fraction, self.sparsify_fraction, self.recover_fraction)
        if min(fractions) < 0 or sum(fractions) <= 0:
            raise ValueError(
                "`finetune_fraction`, `sparsify_fraction` and `recover_fraction` are "
                f"{', '.join(map(str, fractions))}: expected shares of at least 0, not all 0."
            )
        for name, low, high in (
            ("kl_ramp", 0.0, 1.0),
            ("dropout_rate_threshold", 0.0, 1.0),
            ("distillation_weight", 0.0, 1.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` is {getattr(self, name)}: expected a number from {low:g} to {high:g}.")
        for name in (
            "kl_weight",
            "kl_start",
            "log_var_distance",
            "group_scale_distance",
            "distillation_temperature",
            "num_data",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` is {value}: expected a number above 0.")
        options = self.gradient_checkpointing_kwargs
        if self.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs` asks for `use_reentrant=True`, which loses the gradient of the KL: "
                "leave it out or set it to False."
            )
        self.decay  # noqa: B018  # refuses an unsupported scheduler before any work is done

    @property
    def decay(self) -> Decay:
        """How learning rates fall within fine-tuning and recovery.

        Raises:
            ValueError: If `lr_scheduler_type` has no per-phase counterpart.
        """
        name = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)).removesuffix("_with_warmup")
        if name not in set(Decay):
            raise ValueError(
                f"`lr_scheduler_type` is `{name}`: each phase has its own warm-up and decay, which can be "
                f"{', '.join(Decay)}."
            )
        return Decay(name)

    def phase_plan(self, num_steps: int) -> PhasePlan:
        """Divide a run into phases.

        Args:
            num_steps: Optimizer steps of the whole run.

        Returns:
            The plan.
        """
        return PhasePlan.from_fractions(
            num_steps,
            finetune=self.finetune_fraction,
            sparsify=self.sparsify_fraction,
            recover=self.recover_fraction,
        )
