# SPDX-License-Identifier: Apache-2.0
"""Experts of a mixture, which lie in two parameters and in no layer: where their neurons are, and what runs them.

It travels as remote code beside `modeling_vdneuron` and needs nothing but torch and transformers.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


__all__ = ["EXPERTS", "ConfigView", "experts_config", "fits_grouped", "is_experts"]

#: Parameters of all experts of a layer together -> the axis that follows their number of neurons, and the other axes.
EXPERTS = {
    "experts.gate_up_proj": (1, slice(None, None, 2)),  # mixtral, qwen2_moe, qwen3_moe
    "experts.down_proj": (2, slice(2)),
}

#: What grouped matrix products of torch want the length of a row in bytes to be a multiple of.
_ROW_BYTES = 16


class ConfigView:
    """A config as one layer sees it. It never goes stale: a copy would miss another attention implementation.

    Args:
        config: Config of the model.
        **own: What is otherwise for the layer.
    """

    def __init__(self, config: PreTrainedConfig, **own: object) -> None:
        self._config = config
        vars(self).update(own)

    def __getattr__(self, name: str) -> object:
        return getattr(self._config, name)


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds all experts of a layer, in two parameters."""
    return all(module._parameters.get(end.rpartition(".")[2]) is not None for end in EXPERTS)


def experts_config(config: PreTrainedConfig, down_proj: Tensor) -> PreTrainedConfig | ConfigView:
    """Choose an implementation of experts that takes their number of neurons.

    Args:
        config: Config of the model.
        down_proj: What reads the neurons of all experts, shape `(experts, hidden, neurons)`.

    Returns:
        The config; seen with plain matrix products where grouped ones would refuse the length of a row.
    """
    fits = fits_grouped(down_proj.shape[2], down_proj.element_size())
    if fits or config._experts_implementation != "grouped_mm":
        return config
    # A program cannot hold a loop over those experts that have tokens, which is quicker otherwise.
    instead = "batched_mm" if torch.compiler.is_compiling() else "eager"
    return ConfigView(config, _experts_implementation=instead)


def fits_grouped(num_neurons: int, itemsize: int) -> bool:
    """Tell whether grouped matrix products take experts of so many neurons, of so many bytes each."""
    return num_neurons > 0 and num_neurons * itemsize % _ROW_BYTES == 0
