# SPDX-License-Identifier: Apache-2.0
"""What a model does with the number of loss terms in a step, whatever its signature says."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import nn


__all__ = ["honours_num_items"]


@torch.no_grad()
def honours_num_items(model: nn.Module, inputs: Mapping[str, Any]) -> bool | None:
    """Find out whether a model divides its loss by `num_items_in_batch`.

    Many heads take the argument and ignore it, and the Trainer then multiplies their gradients by the number of
    micro-batches (huggingface/transformers#47688) and of processes.

    Args:
        model: A model in training mode, as it is again afterwards.
        inputs: One micro-batch, with labels.

    Returns:
        Whether its loss depends on the number; None if this micro-batch cannot tell, having no target at all.
    """
    model.eval()
    outputs = [model(**inputs, num_items_in_batch=torch.tensor(count)) for count in (1, 2)]
    model.train()
    losses = [out["loss"] if isinstance(out, dict) else out[0] for out in outputs]
    first, second = (loss.item() for loss in losses)
    # The loss of no targets is not a number, and half of nothing is nothing.
    return None if not (isfinite(first) and isfinite(second) and first) else first != second
