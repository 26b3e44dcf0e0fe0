# SPDX-License-Identifier: Apache-2.0
"""Precision of what the method adds: posterior and prior in float32 at least, variances with its range at least."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


__all__ = ["at_least_float32", "leave_mixed_precision_", "with_range_of_float32"]


def at_least_float32(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Limit what a conversion of a module's tensors does to their precision; moves between devices go through.

    Log-variances, group scales and the prior move in small relative steps, which half precision rounds away.

    Args:
        convert: Function from a tensor to the converted one, as `nn.Module._apply` takes it.

    Returns:
        The same function, but for floating-point results narrower than float32: these come as float32.

    Example:
        >>> at_least_float32(Tensor.bfloat16)(torch.ones(2)).dtype
        torch.float32
        >>> at_least_float32(Tensor.double)(torch.ones(2)).dtype
        torch.float64
    """

    def convert_widely(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        dtype = torch.promote_types(converted.dtype, torch.float32)
        if not converted.is_floating_point() or converted.dtype == dtype:
            return converted
        # From the tensor itself, as the converted one has lost its digits.
        return tensor.to(converted.device, dtype)

    return convert_widely


def with_range_of_float32(dtype: torch.dtype) -> torch.dtype:
    """Replace a dtype in which the square of an ordinary activation or posterior scale could overflow or vanish.

    Args:
        dtype: A floating-point dtype.

    Returns:
        float32 for float16 and narrower ones; any other dtype as it is.

    Example:
        >>> with_range_of_float32(torch.float16), with_range_of_float32(torch.bfloat16)
        (torch.float32, torch.bfloat16)
    """
    reaches = torch.finfo(dtype).smallest_normal <= torch.finfo(torch.float32).smallest_normal
    return dtype if reaches else torch.float32


def leave_mixed_precision_(model: nn.Module) -> nn.Module:
    """Take the autocasting `forward` off that accelerate puts on a model in mixed precision, where it would stay.

    Args:
        model: A model, in place.

    Returns:
        The same model, with the `forward` of its class.
    """
    if model.__dict__.pop("_original_forward", None) is not None:
        del model.forward
    return model
