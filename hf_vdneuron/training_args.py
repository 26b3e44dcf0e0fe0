# SPDX-License-Identifier: Apache-2.0
"""The options of a run: what transformers' own arguments say, and what sparsification adds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_vdneuron.goal_args import GoalArguments, SpeedupFrom
from hf_vdneuron.judgement import Tolerance
from hf_vdneuron.relevance import DROPOUT_RATE_THRESHOLD
from hf_vdneuron.schedules import Decay, Phase, PhasePlan
from hf_vdneuron.selection import FREE, Layout


__all__ = ["VDTrainingArguments"]

#: Name of the loss among the metrics of an evaluation.
_LOSS = "loss"

#: Shares of a run: of fine-tuning; of the training of a posterior, where it is trained; of recovery behind that, and
#: behind a posterior in closed form.
FINETUNE_SHARE, SPARSIFY_SHARE, RECOVER_SHARE, LONG_RECOVER_SHARE = 0.3, 0.5, 0.2, 0.7

#: What only a posterior that is trained depends on.
_OF_TRAINING = ("kl_weight", "kl_ramp", "kl_start", "log_var_distance", "group_scale_distance")

#: What a finite number has to be: names of the options, test, and the test in words.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        (
            "finetune_fraction",
            "sparsify_fraction",
            "recover_fraction",
            "hidden_distillation_weight",
            "max_metric_drop",
            "max_loss_increase",
        ),
        lambda value: value >= 0,
        "a number of at least 0",
    ),
    (("kl_ramp", "distillation_weight"), lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    (("dropout_rate_threshold",), lambda value: 0 < value < 1, "a number between 0 and 1, without the two"),
    (("kl_start",), lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    (("target_speedup",), lambda value: value > 1, "a number above 1"),
    (("target_sparsity",), lambda value: 0 < value < 1, "a number between 0 and 1, without the two"),
    (
        ("latency_batch_size", "target_params", "num_sizes", "round_heads_to", "round_neurons_to"),
        lambda value: value >= 1,
        "a number of at least 1",
    ),
    (
        ("kl_weight", "log_var_distance", "group_scale_distance", "distillation_temperature", "num_data"),
        lambda value: value > 0,
        "a number above 0",
    ),
)


@dataclass
class VDTrainingArguments(GoalArguments, TrainingArguments):
    """Arguments of `VDTrainer`.

    `num_train_epochs` or `max_steps` is the length of the whole run. The fractions divide it into fine-tuning,
    sparsification and recovery, each with its own warm-up and decay. A model that is fine-tuned already starts with
    `finetune_fraction=0`.

    With one of the targets, the run arrives at it; with a tolerance, as much goes as the evaluation set allows. Either
    way the posterior is in closed form by default, from gradients on some training examples, and all steps behind the
    cut recover: 300 and 700 of 1,000. With a `sparsify_fraction` it is trained instead, and the weight of the KL term
    is found on the way to a target.

    Without any, the dropout-rate rule decides how much a trained posterior lets go, at a fixed weight of the KL: 300
    steps of 1,000 fine-tune, 500 sparsify and 200 recover.
    """

    logging_steps: float = field(
        default=0.02,
        metadata={
            "help": "Steps between two logs, or below 1 their share of the run; the report draws what is logged."
        },
    )
    finetune_fraction: float = field(
        default=FINETUNE_SHARE, metadata={"help": "Share of the run that fine-tunes the dense model; 0 skips it."}
    )
    sparsify_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the run that trains the posterior, by default 0.5. 0, the default with a target or a "
            "tolerance, takes the posterior in closed form there, and removes nothing elsewhere."
        },
    )
    recover_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the run that trains what is left; 0 skips it. By default 0.2 behind a trained "
            "posterior, and 0.7 otherwise."
        },
    )
    recover_pruned: bool = field(
        default=True,
        metadata={
            "help": "Whether recovery runs through a pruned copy, which has the model's gradients for less: what "
            "computes the loss then sees smaller parameters."
        },
    )
    kl_weight: float | None = field(
        default=None,
        metadata={
            "help": "Final weight of the KL term of a posterior that is trained. By default it is found for a target; "
            "without one it is `num_data` / 3,000,000, as a pretrained weight stands for far more evidence than the "
            "examples of one task."
        },
    )
    kl_ramp: float = field(
        default=0.6,
        metadata={
            "help": "Share of the sparsification over which the KL weight rises from `kl_start`, in [0, 1]. Without "
            "effect where that is 1; refused where a target steers the weight."
        },
    )
    kl_start: float = field(
        default=1.0,
        metadata={
            "help": "First KL weight relative to the final one, in (0, 1]; it rises exponentially. 1 is no rise, "
            "and all there is where a target steers the weight."
        },
    )
    log_var_distance: float = field(
        default=2.0,
        metadata={
            "help": "How far a log-variance would move over the sparsification, in nats, if Adam went the same way at "
            "its full rate all the time. The full rate is this distance over the number of steps, so the default "
            "holds for short and long runs; the real way is shorter, as the rate warms up, holds for half the phase "
            "and then falls to 0."
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
    hidden_distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the teacher's hidden states beside its logits, at least 0: the share of their signal "
            "that is missed, mean over layers, is added this many times to the teacher's loss."
        },
    )
    save_posterior: bool = field(
        default=False,
        metadata={
            "help": "Save a checkpoint right before the cut. A run of the same steps and fractions that resumes "
            "from it with another target or tolerance arrives at another size, and only has to recover."
        },
    )
    save_sizes: bool = field(
        default=False,
        metadata={
            "help": "Save every size that a tolerance finds good enough as a model of its own, in `output_dir`/sizes."
        },
    )
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
            ValueError: If a value is out of its range, there are two targets, a KL schedule beside one, hidden states
                to learn but no teacher, gradient checkpointing is reentrant, or checkpoints would go to the Hub.
        """
        # transformers would take it from `logging_steps`, and a share does not go with the steps between checkpoints.
        self.eval_steps = self.save_steps if self.eval_steps is None else self.eval_steps
        super().__post_init__()
        self._check_ranges()
        if self.hidden_distillation_weight and not self.distillation_weight:
            raise ValueError(
                f"`hidden_distillation_weight` is {self.hidden_distillation_weight:g}, but `distillation_weight` is "
                "0, which trains without a teacher: set both, or none."
            )
        options = self.gradient_checkpointing_kwargs
        if self.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs` asks for `use_reentrant=True`, which loses the gradient of the KL: "
                "leave it out or set it to False."
            )
        strategy = HubStrategy(self.hub_strategy)
        if self.push_to_hub and strategy in {HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS}:
            raise ValueError(
                f"`hub_strategy` is `{strategy.value}`: checkpoints hold pickles, which are never uploaded; expected "
                f"`{HubStrategy.END.value}` or `{HubStrategy.EVERY_SAVE.value}`."
            )
        self._check_steering()
        self._check_choices()
        self.decay  # noqa: B018  # refuses an unsupported scheduler before any work is done

    def _check_ranges(self) -> None:
        kinds: dict[str, type[StrEnum]] = {"speedup_from": SpeedupFrom, "layout": Layout}
        for name, kind in kinds.items():
            if getattr(self, name) not in list(kind):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: expected {' or '.join(kind)}.")
            setattr(self, name, kind(getattr(self, name)))
        for names, is_valid, expected in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and is_valid(value)):
                    raise ValueError(f"`{name}` is {value}: expected {expected}.")
        if sum(self.fractions.values()) <= 0:
            raise ValueError(
                "`finetune_fraction`, `sparsify_fraction` and `recover_fraction` are all 0: expected one above 0."
            )

    def _check_choices(self) -> None:
        if self.tolerance_name is not None and self.speedup_from is SpeedupFrom.LATENCY:
            raise ValueError(
                f"`speedup_from` is `{self.speedup_from}`, but `{self.tolerance_name}` asks for no speed-up: leave it "
                "out."
            )
        if self.save_posterior and (self.save_total_limit is not None or self.save_strategy == SaveStrategy.BEST):
            raise ValueError(
                "`save_posterior` is set, but `save_total_limit` or `save_strategy='best'` would take its checkpoint "
                "away again: expected neither."
            )
        if self.alignment != FREE and self.asked is None:
            raise ValueError(
                "`layout`, `round_heads_to` or `round_neurons_to` is set, but the dropout-rate rule, which decides "
                "without a target, looks at no numbers: set a target or a tolerance too, or leave them out."
            )
        if self.save_sizes and self.tolerance_name is None:
            raise ValueError(
                "`save_sizes` is set, but there is no tolerance that looks at several sizes: set `max_metric_drop` or "
                "`max_loss_increase`, or leave it out."
            )
        if self.save_posterior and not self.removes:
            raise ValueError("`save_posterior` is set, but `sparsify_fraction` is 0: there is no posterior to save.")

    def _check_steering(self) -> None:
        if self.asked is None:
            return
        is_trained = self.fractions[Phase.SPARSIFY] > 0
        if is_trained and (self.target is None or self.kl_weight is not None):
            return
        for known in fields(VDTrainingArguments):
            if getattr(self, known.name) == known.default:
                continue
            if known.name in _OF_TRAINING and not is_trained:
                raise ValueError(
                    f"`{known.name}` is {getattr(self, known.name)}, but the posterior is not trained, as "
                    "`sparsify_fraction` is 0, the default with a target or a tolerance: leave it out, or give the "
                    f"sparsification a share of the run, such as {SPARSIFY_SHARE}."
                )
            if known.name in ("kl_ramp", "kl_start"):
                raise ValueError(
                    f"`{known.name}` is {getattr(self, known.name)}, but with a target the KL weight is steered and "
                    "has no schedule: leave it out, or set `kl_weight` too."
                )

    @property
    def tolerance(self) -> Tolerance | None:
        """How much worse than the dense model the run may end, None if that is not what was asked for.

        Raises:
            ValueError: If it does not say which metric is meant.
        """
        if self.max_loss_increase is not None:
            return Tolerance(_LOSS, self.max_loss_increase, greater_is_better=False)
        if self.max_metric_drop is None:
            return None
        if self.metric_for_best_model is None:
            raise ValueError(
                f"`max_metric_drop` is {self.max_metric_drop:g}, but nothing says of which metric: set "
                "`metric_for_best_model` to one that the evaluation gives, such as 'accuracy', or use "
                "`max_loss_increase`."
            )
        metric = self.metric_for_best_model.removeprefix("eval_")
        if metric == _LOSS:
            raise ValueError(
                f"`max_metric_drop` is {self.max_metric_drop:g}, but `metric_for_best_model` is the loss (the default "
                "where the best model is loaded at the end): name another metric, or use `max_loss_increase`."
            )
        is_loss = metric.endswith(_LOSS)
        better = not is_loss if self.greater_is_better is None else self.greater_is_better
        return Tolerance(metric, self.max_metric_drop, greater_is_better=better)

    @property
    def fractions(self) -> dict[Phase, float]:
        """Share of the run of each phase, relative to their sum."""
        sparsify = self.sparsify_fraction
        if sparsify is None:
            sparsify = SPARSIFY_SHARE if self.asked is None else 0.0
        recover = self.recover_fraction
        if recover is None:
            recover = RECOVER_SHARE if sparsify > 0 else LONG_RECOVER_SHARE
        return {Phase.FINETUNE: self.finetune_fraction, Phase.SPARSIFY: sparsify, Phase.RECOVER: recover}

    @property
    def removes(self) -> bool:
        """Whether the run makes a cut, by a posterior that it trains or by one in closed form."""
        return self.fractions[Phase.SPARSIFY] > 0 or self.asked is not None

    @property
    def goal(self) -> str:
        """What decides how much goes, for people: the target or tolerance with its value, or the rule."""
        if (tolerance := self.tolerance) is not None:
            return f"{self.tolerance_name} {tolerance.allowed:g}" + (
                "" if tolerance.metric == _LOSS else f" of {tolerance.metric}"
            )
        if self.target is None:
            return f"dropout rate above {self.dropout_rate_threshold}"
        source = f" in {self.speedup_from}" if self.target == "target_speedup" else ""
        value = getattr(self, self.target)
        return f"{self.target} {value:,}{source}" if isinstance(value, int) else f"{self.target} {value:g}{source}"

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

    def phase(self, state: TrainerState) -> Phase:
        """Tell callbacks where a run stands.

        Args:
            state: State of the run, as callbacks get it beside these arguments.

        Returns:
            Phase of the step that comes next.
        """
        return self.phase_plan(state.max_steps).phase_at(state.global_step)

    def phase_plan(self, num_steps: int) -> PhasePlan:
        """Divide a run into phases.

        Args:
            num_steps: Optimizer steps of the whole run.

        Returns:
            The plan.
        """
        shares = self.fractions
        return PhasePlan.from_fractions(
            num_steps,
            finetune=shares[Phase.FINETUNE],
            sparsify=shares[Phase.SPARSIFY],
            recover=shares[Phase.RECOVER],
        )
