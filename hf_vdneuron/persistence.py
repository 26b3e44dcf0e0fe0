# SPDX-License-Identifier: Apache-2.0
"""Load any model, pruned or not, without running code from its repository and without unpickling."""

import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from hf_vdneuron.modeling_vdneuron import auto_class_members, pruned_class


__all__ = ["from_pretrained"]

#: Arguments of `from_pretrained` that say where a repository lies, and nothing about the model in it.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

#: Holds for every load, whatever the caller asks for.
_SAFETY: dict[str, Any] = {"use_safetensors": True, "weights_only": True, "trust_remote_code": False}


def from_pretrained(
    path: str | os.PathLike[str], *, model_class: type | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a model that `save_pretrained` wrote, pruned or not.

    Code in the repository never runs, whatever its config asks for: classes are those of the installed transformers,
    and sizes come from the checked structure in the config. Weights are read from safetensors only.

    Args:
        path: Folder or Hub repository.
        model_class: Model class or auto class, such as `AutoModel` for the model without a head; by default the class
            that was saved.
        **kwargs: Passed on to the `from_pretrained` of the class.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there is no model, or it is damaged or not what it says it is.
    """
    try:
        return _load(path, model_class, kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"Cannot load `{os.fspath(path)}`: {reason}. Expected what `save_pretrained` writes: a folder or "
            "repository with `config.json` and all `.safetensors` files; pickled weights are never read. Check the "
            "path, or download or save the model again."
        ) from error


def _load(path: str | os.PathLike[str], model_class: type | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    config = _read_config(path, hub)
    native = _find_class(config, model_class)
    _refuse_pickles(path, config, kwargs.get("variant"), hub)
    is_pruned = getattr(config, "vdneuron", None) is not None
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = _read_weights(pruned_class(native) if is_pruned else native, path, kwargs)
    if is_pruned:
        _require_complete(model, info["missing_keys"])
    loaded: Any = (model, info) if wants_info else model
    return loaded


def _read_weights(
    cls: type[PreTrainedModel], path: str | os.PathLike[str], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Let the class load itself, safely, and report on its keys."""
    # The config can name an attention kernel too, and a kernel is code from some repository.
    kwargs = {"attn_implementation": None, **kwargs}
    try:
        loaded: Any = cls.from_pretrained(path, output_loading_info=True, **_SAFETY, **kwargs)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # how transformers reports any mismatch
            raise
        raise ValueError("its weights have other shapes than its config says") from error
    return loaded


def _require_complete(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Check that nothing of the cut layers starts anew: a head or a pooler may, but they were saved for certain."""
    layers = {key: key.removeprefix(f"{model.base_model_prefix}.").rpartition(".")[0] for key in missing}
    lost = sorted(key for key, layer in layers.items() if layer in model.config.vdneuron["shapes"])
    if lost:
        raise ValueError(f"its files lack the weights {reprlib.repr(lost)}")


def _read_config(path: str | os.PathLike[str], hub: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
    except Exception as error:  # damaged values trip config classes in all kinds of ways
        raise ValueError(f"its config cannot be read: {error}") from error


def _find_class(config: PreTrainedConfig, model_class: type | None) -> type[PreTrainedModel]:
    """Find the native class to load; a config can name no other object."""
    found: object = model_class
    if model_class is None:
        names = config.architectures
        found = _named(names[0] if isinstance(names, list) and names else None)
    elif not issubclass(model_class, PreTrainedModel):
        found = _named(auto_class_members(config).get(model_class.__name__))
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and _is_built_from(found, config)):
        got = (
            f"`config.architectures` {config.architectures}" if model_class is None else f"`model_class` {model_class}"
        )
        raise ValueError(f"expected a class of transformers that a `{type(config).__name__}` builds, got {got}")
    return found


def _named(name: object) -> object:
    return getattr(transformers, name, None) if isinstance(name, str) else None


def _is_built_from(found: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    return found.config_class is not None and isinstance(config, found.config_class)


def _refuse_pickles(
    path: str | os.PathLike[str], config: PreTrainedConfig, variant: str | None, hub: dict[str, Any]
) -> None:
    """Refuse what would lead transformers to other weights than safetensors: it asks for these only by default."""
    if _find_file(path, "adapter_config.json", hub) is not None:
        raise ValueError(
            "it holds a PEFT adapter, whose weights may be pickled: load its base model, then the adapter."
        )
    explicit = getattr(config, "transformers_weights", None)
    names = [] if explicit is None else [explicit]
    index = _find_file(path, ".".join(filter(None, ("model.safetensors.index", variant, "json"))), hub)
    if index is not None:
        names += _read_shards(index)
    others = [name for name in names if not (isinstance(name, str) and name.endswith(".safetensors"))]
    if others:
        raise ValueError(f"its weights must lie in `.safetensors` files, got {reprlib.repr(others)}")


def _read_shards(index: str) -> list[object]:
    """Read the names of the files that hold the weights, from the index beside them."""
    content = json.loads(Path(index).read_text(encoding="utf-8"))
    parts = [content.get(name) for name in ("weight_map", "metadata")] if isinstance(content, dict) else []
    if not (parts and all(isinstance(part, dict) for part in parts) and parts[0]):
        raise ValueError(f"`{Path(index).name}` must name the file of each weight")
    return list(parts[0].values())


def _find_file(path: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
