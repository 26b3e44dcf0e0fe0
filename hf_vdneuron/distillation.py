# SPDX-License-Identifier: Apache-2.0
"""Learn from a dense teacher: its logits become the targets, and its hidden states if asked for."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vdneuron.checkpoints import has_teacher, load_teacher_, save_teacher
from hf_vdneuron.precision import leave_mixed_precision_
from hf_vdneuron.sharding import dense_copy


__all__ = [
    "IGNORED_LABEL",
    "ProblemType",
    "Teacher",
    "distillation_loss",
    "hidden_state_loss",
    "predictions",
    "require_hidden_states",
]

#: Label of positions that a token-level loss skips, in transformers and in torch's cross-entropy.
IGNORED_LABEL = -100

#: Names of hidden states in the outputs of transformers, and of the mask over their positions.
_STACKS = {
    "hidden_states": "attention_mask",
    "encoder_hidden_states": "attention_mask",
    "decoder_hidden_states": "decoder_attention_mask",
}

#: Ends every refusal to distil.
_WAY_OUT = "or set `distillation_weight=0` to train without a teacher."


class ProblemType(StrEnum):
    """What logits parametrise, by the names of transformers' `config.problem_type`."""

    REGRESSION = "regression"
    """The predicted numbers themselves."""
    SINGLE_LABEL = "single_label_classification"
    """One categorical distribution over the last axis."""
    MULTI_LABEL = "multi_label_classification"
    """A Bernoulli distribution each."""


def problem_type(logits: Tensor, labels: Tensor | None, configured: str | None) -> ProblemType:
    """Tell what logits parametrise, in the way transformers chooses a loss.

    Args:
        logits: Logits, shape `(..., num_labels)`.
        labels: Labels, if there are any.
        configured: What the model's config says, if it does.

    Returns:
        The type.
    """
    if configured is not None:
        return ProblemType(configured)
    if logits.shape[-1] == 1:
        return ProblemType.REGRESSION
    is_multi = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return ProblemType.MULTI_LABEL if is_multi else ProblemType.SINGLE_LABEL


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    labels: Tensor | None,
    configured: str | None = None,
) -> Tensor:
    r"""Compare a student's predictions with its teacher's.

    .. math:: T^2\, KL(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(z / T))

    The factor :math:`T^2` keeps gradients of one size over temperatures. A multi-label head has a Bernoulli
    distribution per label, with the sigmoid for the softmax, and a regression is compared by squared error; both are
    means over labels, like the loss of transformers that they stand beside.

    Args:
        logits: Student's logits :math:`z`, shape `(..., num_labels)`.
        teacher_logits: Teacher's logits :math:`t`, same shape.
        temperature: :math:`T > 0`.
        labels: Labels; where they have one entry per prediction, those with the ignored label are left out.
        configured: `problem_type` of the model's config, if it says any.

    Returns:
        Scalar in nats (squared units for a regression), mean over predictions.

    Raises:
        ValueError: If the two predict different things.

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"The teacher's logits have shape {tuple(teacher_logits.shape)}: expected {tuple(logits.shape)}, as the "
            f"model's. Pass a `teacher` of the same head and labels, {_WAY_OUT}"
        )
    logits, teacher_logits = logits.float(), teacher_logits.float()
    kind = problem_type(logits, labels, configured)
    if kind is ProblemType.REGRESSION:
        return F.mse_loss(logits, teacher_logits)
    student, teacher = logits / temperature, teacher_logits / temperature
    if kind is ProblemType.MULTI_LABEL:
        return temperature**2 * _bernoulli_kl(teacher, student).mean()
    if labels is not None and labels.shape == logits.shape[:-1]:
        counted = labels != IGNORED_LABEL
        student, teacher = student[counted], teacher[counted]
    return temperature**2 * _categorical_kl(teacher, student)


def _categorical_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean divergence of the student's softmax over all axes but the last."""
    num_labels = student.shape[-1]
    log_student = F.log_softmax(student.reshape(-1, num_labels), dim=-1)
    log_teacher = F.log_softmax(teacher.reshape(-1, num_labels), dim=-1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def _bernoulli_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Divergence of the student's sigmoid, elementwise."""
    on, off = (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student) for sign in (1, -1))
    return teacher.sigmoid() * on + (-teacher).sigmoid() * off


def hidden_state_loss(outputs: object, teacher_outputs: object, inputs: Mapping[str, Any]) -> Tensor:
    r"""Compare a student's hidden states with its teacher's, layer by layer: pruning leaves their widths alone.

    .. math:: \frac1L \sum_l \frac{\sum_i \| h_{li} - t_{li} \|^2}{\sum_i \| t_{li} \|^2}

    over layers :math:`l` and attended positions :math:`i` of one example: the share of the teacher's signal that is
    missed.

    Args:
        outputs: Student's outputs, with hidden states of shape `(batch, positions, hidden_size)`.
        teacher_outputs: Teacher's outputs, likewise.
        inputs: The batch; its masks say which positions are attended.

    Returns:
        Scalar, not negative, mean over layers and examples.

    Raises:
        ValueError: If there are no hidden states, or those of the two have different shapes.
    """
    losses = []
    for name, mask_name in _STACKS.items():
        states, targets = (_hidden_states(either, name) for either in (outputs, teacher_outputs))
        if [state.shape for state in states] != [target.shape for target in targets]:
            raise ValueError(
                f"The teacher's `{name}` are {len(targets)} of shape {tuple(targets[0].shape) if targets else ()}: "
                f"expected {len(states)} of shape {tuple(states[0].shape) if states else ()}, as the model's. Pass a "
                "`teacher` of the same depth and width, or set `hidden_distillation_weight=0`."
            )
        attended = inputs.get(mask_name)
        # Nothing is pruned in front of the first layer.
        for state, target in zip(states[1:], targets[1:], strict=True):
            losses.append(_missed(state.float(), target.float(), attended))
    require_hidden_states(outputs)
    return torch.stack(losses).mean()


def require_hidden_states(outputs: object) -> None:
    """Refuse a model that does not show its hidden states.

    Args:
        outputs: What it returned when asked for them.

    Raises:
        ValueError: If there are none.
    """
    if not any(_hidden_states(outputs, name) for name in _STACKS):
        raise ValueError(
            "The model returns no hidden states to distil: set `hidden_distillation_weight=0` to learn from logits "
            "alone."
        )


def _hidden_states(outputs: object, name: str) -> Sequence[Tensor]:
    return (outputs.get(name) if isinstance(outputs, Mapping) else None) or ()


def _missed(state: Tensor, target: Tensor, attended: Tensor | None) -> Tensor:
    """Squared error relative to the squared target, both summed over attended positions of an example."""
    error, signal = (state - target).square().sum(-1), target.square().sum(-1)
    if isinstance(attended, Tensor) and attended.shape == error.shape:
        error, signal = (values * attended for values in (error, signal))
    return (error.sum(1) / signal.sum(1).clamp_min(torch.finfo(signal.dtype).tiny)).mean()


def predictions(outputs: object, whose: str) -> Tensor:
    """Take the logits out of what a model returns.

    Args:
        outputs: Outputs of a transformers model.
        whose: Word for the model in an error, such as "model" or "teacher".

    Returns:
        Its logits.

    Raises:
        ValueError: If there are none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(logits, Tensor):
        return logits
    got = ", ".join(f"`{name}`" for name in outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    raise ValueError(
        f"The {whose} returns {got}: expected an output with `logits` to distil. Set `return_dict=True` in its config "
        f"if it returns a tuple, {_WAY_OUT}"
    )


def _fixed_copy(student: nn.Module) -> nn.Module:
    return leave_mixed_precision_(dense_copy(student)).requires_grad_(False).eval()


class Teacher:
    """The dense model to learn from: the user's in every run, or else the student as each run has fine-tuned it.

    Args:
        given: The user's model, or None.
    """

    def __init__(self, given: nn.Module | None) -> None:
        self.given = given
        self._own: nn.Module | None = None

    @property
    def model(self) -> nn.Module | None:
        """The model to learn from, if there is one yet."""
        return self._own if self.given is None else self.given

    def forget_own_(self) -> None:
        """Drop the copy that an earlier run made."""
        self._own = None

    def copy_(self, student: nn.Module) -> None:
        """Take the student as it is, dense and fixed, unless the user gave a teacher.

        Args:
            student: A patched model, which is left alone.
        """
        if self.given is None:
            self._own = _fixed_copy(student)

    def save(self, checkpoint: str | Path) -> None:
        """Put the run's own copy into a checkpoint; the user has theirs.

        Args:
            checkpoint: Folder of a checkpoint, which need not exist yet.
        """
        if self._own is not None:
            save_teacher(self._own, checkpoint)

    def load_(self, checkpoint: str | Path, student: nn.Module) -> None:
        """Take the run's own copy back from a checkpoint, if there is one in it.

        Args:
            checkpoint: Folder of a checkpoint.
            student: The model, in its shape at that time.
        """
        self.forget_own_()
        if self.given is None and has_teacher(checkpoint):
            self._own = _fixed_copy(student)
            load_teacher_(self._own, checkpoint)

    def outputs(self, inputs: Mapping[str, Any], *, hidden_states: bool) -> object:
        """Ask the teacher about a batch.

        Args:
            inputs: The batch, with or without labels.
            hidden_states: Whether its hidden states are wanted too.

        Returns:
            Its outputs, without a graph.

        Raises:
            RuntimeError: If there is no teacher yet.
        """
        if self.model is None:
            raise RuntimeError("There is no teacher yet: call `copy_` first.")
        extra = {"output_hidden_states": True} if hidden_states else {}
        with torch.no_grad():
            # A decoder behind an encoder reads labels, shifted by one; without them it would read something else.
            reads_labels = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            kept = {name: value for name, value in inputs.items() if name != "labels" or reads_labels}
            return self.model(**kept, **extra)
