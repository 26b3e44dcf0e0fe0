# SPDX-License-Identifier: Apache-2.0
"""Models without memory, to compare real ones with: what a class builds from a config, down to every shape."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


__all__ = ["skeleton", "tensor_shapes"]

_Model = TypeVar("_Model", bound=PreTrainedModel)


def skeleton(cls: type[_Model], config: PreTrainedConfig) -> _Model:
    """Build a model without memory.

    Args:
        cls: Its class.
        config: Its config, which is copied.

    Returns:
        The model, on the `meta` device.
    """
    with torch.device("meta"):
        return cls(deepcopy(config))


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """List the shapes of all that a model saves.

    Args:
        model: Any model, on any device.

    Returns:
        Name in its state dict -> shape.
    """
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
