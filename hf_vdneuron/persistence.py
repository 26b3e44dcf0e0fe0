# SPDX-License-Identifier: Apache-2.0
"""Load any model, pruned or not, without running code from its repository and without unpickling."""

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
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
    values = _read_values(path, hub)
    files = _find_weights(path, values, kwargs.get("variant"), hub)
    if files:  # if not, transformers says what it looked for
        _require_plausible(values, [shape for file in files for shape in _read_shapes(file)])
    config = _read_config(path, hub)
    native = _find_class(config, model_class)
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
    paths = {key: key.removeprefix(f"{model.base_model_prefix}.") for key in missing}
    cut = model.config.vdneuron["shapes"].keys()
    lost = sorted(key for key, path in paths.items() if not cut.isdisjoint((path, path.rpartition(".")[0])))
    if lost:
        raise ValueError(f"its files lack the weights {reprlib.repr(lost)}")


def _read_values(path: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    """Read `config.json` as it stands."""
    try:
        return dict(PreTrainedConfig.get_config_dict(path, **hub)[0])
    except Exception as error:  # whatever is no JSON object trips it in all kinds of ways
        raise ValueError(f"its config cannot be read: {error}") from error


def _read_config(path: str | os.PathLike[str], hub: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
    except Exception as error:  # damaged values trip config classes in all kinds of ways
        raise ValueError(f"its config cannot be read: {error}") from error


def _require_plausible(values: Mapping[str, object], shapes: list[list[int]]) -> None:
    """Refuse counts that no such files can come from, before a config or a model of that size is built."""
    # Every layer has a tensor, and every label a row. Other sizes are compared with the tensors' own on loading.
    longest = max((size for shape in shapes for size in shape), default=0)
    limits = {"layers": len(shapes), "n_layer": len(shapes), "num_labels": longest}
    for name, value in _counts(values):
        if any(value > limit for ending, limit in limits.items() if name.endswith(ending)):
            raise ValueError(
                f"its config says `{name}` is {reprlib.repr(value)}, but its files hold {len(shapes)} tensors, the "
                f"longest axis being {longest}"
            )


def _counts(values: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """List the integers in a config and in the configs of its parts."""
    parts = [values]
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        yield from ((name, value) for name, value in part.items() if isinstance(value, int))


def _read_shapes(file: str) -> list[list[int]]:
    """Read the shapes of all tensors from the head of a file."""
    with safe_open(file, framework="pt") as weights:
        return [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - it has no other way


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


def _find_weights(
    path: str | os.PathLike[str], values: Mapping[str, Any], variant: str | None, hub: dict[str, Any]
) -> list[str]:
    """Find the files of weights; refuse what leads transformers to others, as safetensors is only its default."""
    if _find_file(path, "adapter_config.json", hub) is not None:
        raise ValueError(
            "it holds a PEFT adapter, whose weights may be pickled: load its base model, then the adapter."
        )
    explicit = values.get("transformers_weights")
    names = [".".join(filter(None, ("model", variant, "safetensors"))) if explicit is None else explicit]
    index = _find_file(path, ".".join(filter(None, ("model.safetensors.index", variant, "json"))), hub)
    if index is not None:
        names += _read_shards(index)
    others = [name for name in names if not (isinstance(name, str) and name.endswith(".safetensors"))]
    if others:
        raise ValueError(f"its weights must lie in `.safetensors` files, got {reprlib.repr(others)}")
    files = (_find_file(path, name, hub) for name in dict.fromkeys(names))
    return [file for file in files if file is not None]


def _read_shards(index: str) -> list[object]:
    """Read the names of the files that hold the weights, from the index beside them."""
    content = json.loads(Path(index).read_text(encoding="utf-8"))
    parts = [content.get(name) for name in ("weight_map", "metadata")] if isinstance(content, dict) else []
    if not (parts and all(isinstance(part, dict) for part in parts) and parts[0]):
        raise ValueError(f"`{Path(index).name}` must name the file of each weight")
    return list(parts[0].values())


def _find_file(path: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
