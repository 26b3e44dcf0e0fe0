# SPDX-License-Identifier: Apache-2.0
"""What a model says, all of it, and whether two say the same."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


__all__ = ["agree", "run_alike", "tensors_in"]

#: How far two float32 computations of the same output may lie apart, relative to its largest value.
TOLERANCE = 1e-4

#: Any seed will do.
_SEED = 0

#: From here on a value stands for "never", as where a model masks its logits, and says nothing of the size of others.
FILL = 1e9


def tensors_in(outputs: object) -> Iterator[Tensor]:
    """List the floating-point tensors in the outputs of a model, however nested.

    Args:
        outputs: What its forward pass returns.

    Yields:
        The tensors, in order.
    """
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from tensors_in(tuple(outputs.values()))
    elif isinstance(outputs, tuple | list):
        for value in outputs:
            yield from tensors_in(value)


def run_alike(model: nn.Module, inputs: Mapping[str, Any], instead: Mapping[str, Tensor] | None = None) -> object:
    """Run a model with the same random numbers in every call, for those that draw some even in evaluation.

    Args:
        model: The model.
        inputs: Keyword arguments of its forward pass.
        instead: Names of parameters -> values to run it with.

    Returns:
        Its outputs. Random state is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        return functional_call(model, dict(instead or {}), kwargs=dict(inputs))


def agree(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Tell whether two lists of tensors are the same but for rounding.

    Args:
        some: Float32 tensors.
        others: Others.

    Returns:
        Whether there are as many, of the same shapes, each within `TOLERANCE` of its largest value below `FILL`.
    """
    return all(one.shape == other.shape and _is_close(one, other) for one, other in zip(some, others, strict=True))


def _is_close(one: Tensor, other: Tensor) -> bool:
    size = other.abs()
    largest = torch.where(size < FILL, size, 0).max() if size.numel() else size.sum()
    scale = torch.where(size < FILL, largest, size)
    return bool(((one == other) | ((one - other).abs() <= TOLERANCE * scale)).all())
