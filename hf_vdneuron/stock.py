# SPDX-License-Identifier: Apache-2.0
"""Pruned models that need no structure: where all layers kept as much, the config of the native class can say it."""

import copy
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import islice, product
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.discovered import share_
from hf_vdneuron.modeling_vdneuron import native_class
from hf_vdneuron.modeling_vdneuron_experts import fits_grouped, is_experts
from hf_vdneuron.skeletons import skeleton, tensor_shapes
from hf_vdneuron.sublayers import Sublayer, Unit


__all__ = ["stock_sizes", "to_stock_"]

#: Numbers in configs of transformers that follow how many units a layer has, by their kind.
_COUNTS = {
    Unit.HEAD: (
        "num_attention_heads",
        "num_key_value_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    Unit.NEURON: (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "ffn_dim",
        "d_ff",
        "n_inner",
        "hidden_dim",
        "ffn_hidden_size",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ),
}

#: Numbers that modules remember of their config and make no use of once they are built.
_REMEMBERED = frozenset(_COUNTS[Unit.NEURON])

#: Names under which configs hold the size of a head, which otherwise follows from the number of heads.
_HEAD_SIZES = ("head_dim", "d_kv")

#: How many ways to set them are tried at most.
MAX_TRIALS = 64

#: What a config may raise, or a class that is built from it, if a number does not suit it.
_UNSUITABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def stock_sizes(model: PreTrainedModel) -> dict[str, int] | None:
    """Find out how a config says what is left of a model, if it can.

    Args:
        model: A model that was cut, with or without a head.

    Returns:
        Names in the config -> numbers; None if the native class with no such config is the same model.
    """
    dense = _build(model, {})
    if dense is None or not all(_runs_anywhere(module) for module in model.modules() if is_experts(module)):
        return None
    share_(model, dense)
    left, whole = find_sublayers(model), find_sublayers(dense)
    for sizes in islice(_proposals(model.config, left, whole), MAX_TRIALS):
        built = _build(model, sizes)
        if built is not None and _facts(built) == _facts(model):
            return sizes
    return None


def to_stock_(model: PreTrainedModel, sizes: Mapping[str, int]) -> PreTrainedModel:
    """Make a model that was cut an ordinary one of its native class, in place.

    Args:
        model: The model.
        sizes: What its config shall say.

    Returns:
        The same model.
    """
    for module in model.modules():
        module.__class__ = native_class(type(module))
        module.__dict__.update({name: sizes[name] for name in _REMEMBERED & vars(module).keys() & sizes.keys()})
    for name, number in sizes.items():
        setattr(model.config, name, number)
    for name in ("vdneuron", "auto_map"):
        model.config.__dict__.pop(name, None)
    return model


def _proposals(config: PreTrainedConfig, left: list[Sublayer], whole: list[Sublayer]) -> Iterator[dict[str, int]]:
    """Set each number in the config to the share that some sub-layers of its kind kept."""
    shares: dict[Unit, set[Fraction]] = {unit: set() for unit in Unit}
    for part, complete in zip(left, whole, strict=True):
        shares[part.unit].add(Fraction(part.num_units, max(1, complete.num_units)))
    names = [(unit, name) for unit, counts in _COUNTS.items() for name in counts if _number(config, name)]
    choices = [sorted(shares[unit]) for unit, _ in names]
    head_size = next((part.sides[0].slices[0].size for part in left if part.unit is Unit.HEAD), None)
    fixed = {name: head_size for name in _HEAD_SIZES if head_size and shares[Unit.HEAD] != {Fraction(1)}}
    for chosen in product(*choices):
        sizes = {name: _number(config, name) * share for (_, name), share in zip(names, chosen, strict=True)}
        # No class is made for layers without anything.
        if all(size.denominator == 1 and size > 0 for size in sizes.values()):
            known = {name: size for name, size in fixed.items() if hasattr(config, name)}
            yield {name: int(size) for name, size in sizes.items()} | known


def _runs_anywhere(experts: nn.Module) -> bool:
    """Tell whether experts run by the native forward pass alone, in bfloat16 too."""
    return fits_grouped(experts.get_parameter("down_proj").shape[2], torch.bfloat16.itemsize)


def _number(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    return value if type(value) is int else 0


def _build(model: PreTrainedModel, sizes: Mapping[str, int]) -> PreTrainedModel | None:
    """Build the native class with other numbers in its config, without weights; None if it refuses."""
    config = copy.deepcopy(model.config)
    config.vdneuron = None
    try:
        for name, number in sizes.items():
            setattr(config, name, number)
        # What is read from a file is checked, what is set is not.
        config = type(config).from_dict(config.to_dict())
        return skeleton(native_class(type(model)), config)
    except (*_UNSUITABLE, StrictDataclassError):
        return None


def _facts(model: nn.Module) -> dict[str, Any]:
    """Collect shapes and numbers that a forward pass can depend on, wherever they stand."""
    numbers = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | list)
        and name not in {"training", *_REMEMBERED}
        and not name.startswith("_")
    }
    return {**tensor_shapes(model), **numbers}
