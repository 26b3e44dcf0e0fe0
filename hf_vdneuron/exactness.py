# SPDX-License-Identifier: Apache-2.0
"""What a model says, all of it, and whether two say the same."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor


__all__ = ["agree", "tensors_in"]

#: How far two float32 computations of the same output may lie apart, relative to its largest value.
TOLERANCE = 1e-4


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


def agree(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Tell whether two lists of tensors are the same but for rounding.

    Args:
        some: Float32 tensors.
        others: Others.

    Returns:
        Whether there are as many, of the same shapes, each within `TOLERANCE` of its largest value.
    """
    return all(one.shape == other.shape and _is_close(one, other) for one, other in zip(some, others, strict=True))


def _is_close(one: Tensor, other: Tensor) -> bool:
    largest = other[other.isfinite()].abs().max() if other.isfinite().any() else 0
    return bool(((one == other) | ((one - other).abs() <= TOLERANCE * largest)).all())
