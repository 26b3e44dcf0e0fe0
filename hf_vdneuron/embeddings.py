# SPDX-License-Identifier: Apache-2.0
"""A copy of a model that knows fewer tokens, under new numbers.

Where a model keeps its vocabulary (embeddings, heads with and without ties, biases, counts, numbers of special tokens)
is not written down anywhere: it is whatever comes out otherwise when the class is built from a config of another size.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hf_vdneuron.skeletons import skeleton, tensor_shapes


__all__ = ["configured_ids", "vocabulary_size", "with_tokens"]

_Model = TypeVar("_Model", bound=PreTrainedModel)

#: Settings in configs and generation configs that hold ids of tokens: one, lists of them, or ids by name.
_ID_SETTINGS = re.compile(
    r".*_token_(id|ids|index)|(bad_words|force_words)_ids|(begin_)?suppress_tokens|(lang|task)_to_id"
)

#: Those that hold them among other numbers.
_MIXED_SETTINGS = ("forced_decoder_ids", "sequence_bias")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Count the tokens that a model can read.

    Args:
        model: A transformers model.

    Returns:
        `vocab_size` of its config, or of the config of its text part.

    Raises:
        TypeError: If it is no such model or has no vocabulary.
    """
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise TypeError(
            f"Cannot trim a `{type(model).__name__}`: expected a transformers model whose config has a `vocab_size`."
        )
    return size


def configured_ids(model: PreTrainedModel) -> set[int]:
    """List the tokens that the configs of a model name.

    Args:
        model: A transformers model.

    Returns:
        Their ids, without those that are no row of its vocabulary.

    Raises:
        ValueError: If a config holds ids in a form that cannot be renumbered.
    """
    size, found = vocabulary_size(model), set[int]()
    for config in _configs(model):
        mixed = [name for name in _MIXED_SETTINGS if getattr(config, name, None)]
        if mixed:
            raise ValueError(
                f"Cannot trim the vocabulary of `{type(model).__name__}`: `{mixed[0]}` of its {type(config).__name__} "
                "holds token ids among other numbers, got "
                f"{reprlib.repr(getattr(config, mixed[0]))}. Set it to None, and anew afterwards."
            )
        for _, value in _id_settings(config):
            found.update(_integers(value))
    return {index for index in found if 0 <= index < size}


@torch.no_grad()
def with_tokens(model: _Model, order: list[int]) -> _Model:
    """Copy a model with some of its tokens only.

    Args:
        model: A transformers model, pruned or not; it is left as it is.
        order: New id -> old id.

    Returns:
        The copy. What is left of its weights is the same to the last bit, and what was tied still is.

    Raises:
        ValueError: If the model is not built as its class and config say, if its class does not build both its input
            and output embeddings by `vocab_size`, or if positions would be counted from another padding token.
    """
    memo: dict[int, Any] = {}  # what `deepcopy` takes for a copy of the object with this id
    config = deepcopy(model.config, memo)
    for part in _with_parts(config):
        _renumber_(part, order)
    config.get_text_config().vocab_size = len(order)
    old, new = skeleton(type(model), model.config), skeleton(type(model), config)
    _require_native(model, old)
    tables = _find_tables(model, old, new)
    _require_same_positions(model, old, new, tables)

    rows = torch.tensor(order)
    for name, axis in tables.items():
        memo.setdefault(id(_tensor(model, name)), _selected(_tensor(model, name), axis, rows))
    copy = deepcopy(model, memo)
    for path, name, value in _changed_numbers(old, new):
        setattr(copy.get_submodule(path), name, value)
    if getattr(copy, "generation_config", None) is not None:
        _renumber_(copy.generation_config, order)
    return copy


def _configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig | GenerationConfig]:
    """List the config of a model, those of its parts, and how it generates."""
    yield from _with_parts(model.config)
    if getattr(model, "generation_config", None) is not None:
        yield model.generation_config


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _with_parts(part)


def _id_settings(config: PreTrainedConfig | GenerationConfig) -> list[tuple[str, object]]:
    return [(name, value) for name, value in vars(config).items() if _ID_SETTINGS.fullmatch(name)]


def _integers(value: object) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, list | tuple | dict):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _integers(child)


def _renumber_(config: PreTrainedConfig | GenerationConfig, order: list[int]) -> None:
    """Rewrite all ids in a config. What names no token goes on naming none."""
    new_ids = {old: new for new, old in enumerate(order)}
    for name, value in _id_settings(config):
        setattr(config, name, _mapped(value, new_ids))


def _mapped(value: object, new_ids: Mapping[int, int]) -> object:
    if isinstance(value, dict):
        return {name: _mapped(child, new_ids) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(child, new_ids) for child in value)
    return new_ids.get(value, value) if type(value) is int else value


def _require_native(model: PreTrainedModel, native: PreTrainedModel) -> None:
    difference = tensor_shapes(model).items() ^ tensor_shapes(native).items()
    if difference:
        raise ValueError(
            f"Cannot trim the vocabulary of `{type(model).__name__}`: expected the tensors that its class builds from "
            f"its config, got others: {reprlib.repr(sorted(difference))}. Unpatch it, or undo what else was changed."
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """List parameters and buffers, also those that are not saved; what is tied is there under all its names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _find_tables(model: PreTrainedModel, old: PreTrainedModel, new: PreTrainedModel) -> dict[str, int]:
    """Find the tensors that have an axis of the vocabulary, and that axis."""
    sizes, others = ({name: tuple(tensor.shape) for name, tensor in _tensors(built).items()} for built in (old, new))
    changes = {name: list(zip(shape, others[name], strict=True)) for name, shape in sizes.items()}
    tables = {name: [axis for axis, (was, now) in enumerate(change) if was != now] for name, change in changes.items()}
    tables = {name: axes for name, axes in tables.items() if axes}
    expected = vocabulary_size(old), vocabulary_size(new)
    odd = [name for name, axes in tables.items() if [changes[name][axis] for axis in axes] != [expected]]
    odd += [name for name in _embedding_names(model) if expected[0] != expected[1] and name not in tables]
    if odd:
        raise ValueError(
            f"Cannot trim the vocabulary of `{type(model).__name__}`: expected embeddings with one row for each of "
            f"the {expected[0]} tokens of its config, and `{odd[0]}` is built otherwise."
        )
    return {name: axes[0] for name, axes in tables.items()}


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Name the weights of the first and the last layer; tied ones have several names, of which one is enough."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    paths = {module: path for path, module in model.named_modules()}
    return [f"{paths[layer]}.weight".removeprefix(".") for layer in layers]


def _require_same_positions(
    model: PreTrainedModel, old: PreTrainedModel, new: PreTrainedModel, tables: Mapping[str, int]
) -> None:
    """Refuse to renumber padding where positions are counted from its number: they would all be other ones."""
    padded = {path for path, name, _ in _changed_numbers(old, new) if name == "padding_idx"}
    readers = {name.rpartition(".")[0] for name in tables}
    owners = (name.rpartition(".")[0] for name in _tensors(old))
    counters = [path for path in owners if path in padded - readers]
    if counters:
        raise ValueError(
            f"Cannot trim the vocabulary of `{type(model).__name__}`: `{counters[0]}` counts positions from the "
            "number of the padding token, which would change. Expected a padding token among the first ones."
        )


def _changed_numbers(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, str, int | None]]:
    """List the numbers that modules remember and that come out otherwise: path, attribute and new value."""
    for (path, was), now in zip(old.named_modules(), new.modules(), strict=True):
        for name, value in vars(now).items():
            if type(value) in {int, type(None)} and vars(was).get(name) != value:
                yield path, name, value


def _selected(tensor: Tensor, axis: int, rows: Tensor) -> Tensor:
    selected = tensor.index_select(axis, rows.to(tensor.device))
    return nn.Parameter(selected, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else selected
