# SPDX-License-Identifier: Apache-2.0
"""Learn from a dense teacher: its logits become the targets."""

from torch import Tensor
from torch.nn import functional as F


__all__ = ["IGNORED_LABEL", "distillation_loss"]

#: Label of positions that a token-level loss skips, in transformers and in torch's cross-entropy.
IGNORED_LABEL = -100


def distillation_loss(logits: Tensor, teacher_logits: Tensor, *, temperature: float, labels: Tensor | None) -> Tensor:
    r"""Compare a student's predictions with its teacher's.

    .. math:: T^2\, KL(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(z / T))

    The factor :math:`T^2` keeps gradients of one size over temperatures. A single output is a regression, compared by
    squared error.

    Args:
        logits: Student's logits :math:`z`, shape `(..., num_labels)`.
        teacher_logits: Teacher's logits :math:`t`, same shape.
        temperature: :math:`T > 0`.
        labels: Labels; where they have one entry per prediction, those with the ignored label are left out.

    Returns:
        Scalar in nats (squared units for a regression), mean over predictions.

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
        https://arxiv.org/abs/1503.02531
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    if logits.shape[-1] == 1:
        return F.mse_loss(logits, teacher_logits)
    if labels is not None and labels.shape == logits.shape[:-1]:
        counted = labels != IGNORED_LABEL
        logits, teacher_logits = logits[counted], teacher_logits[counted]
    num_labels = logits.shape[-1]
    student = F.log_softmax(logits.reshape(-1, num_labels) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.reshape(-1, num_labels) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
