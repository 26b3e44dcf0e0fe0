# SPDX-License-Identifier: Apache-2.0
"""A dense copy of a model, whole even where fully sharded data parallelism keeps the model in pieces."""

from copy import deepcopy

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.experts import set_weight_
from hf_vdneuron.functional import whole
from hf_vdneuron.layers import dense_layer
from hf_vdneuron.patching import unpatch_model_


__all__ = ["dense_copy", "is_sharded"]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether every process holds but a piece of each weight.

    Args:
        model: Any model.

    Returns:
        Whether `fully_shard` was called on it.
    """
    return isinstance(model, FSDPModule)


@torch.no_grad()
def dense_copy(model: nn.Module) -> nn.Module:
    """Copy a model as its posterior means under the masks.

    Args:
        model: A patched or dense model, which is left alone. Where it is sharded, every process has to call this, and
            every one gets the whole copy.

    Returns:
        A model without variational layers.

    Raises:
        TypeError: If the model is sharded and not of transformers, whose classes can be built from their config.
    """
    if not is_sharded(model):
        return unpatch_model_(deepcopy(model))
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"The model is a sharded `{type(model).__name__}`: expected one of transformers, as no other can be put "
            "together again. Use plain data parallelism."
        )
    copy = _own_class(model)(deepcopy(model.config))
    for name, parameter in copy.named_parameters():
        own = model.get_parameter(name)
        parameter.data = whole(own).detach().clone()
        parameter.requires_grad_(own.requires_grad)
    for name, buffer in copy.named_buffers():
        buffer.data = whole(model.get_buffer(name)).clone()
    for path, layer in variational_layers(model).items():
        set_weight_(dense_layer(copy, path), layer.mean)
    return copy.train(model.training)


def _own_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class that a model had before `fully_shard` put one of its own on it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # type: ignore[return-value]
