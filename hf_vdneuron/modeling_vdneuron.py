# SPDX-License-Identifier: Apache-2.0
"""Models whose layers have sizes of their own: what is left of each, and classes that build, load and save them.

This file needs nothing but torch and transformers, because it also travels as remote code beside the weights of every
pruned model. One file serves all architectures: it describes a pruned model by the shapes that differ from those of
its native class, builds the native model and shrinks it before any weight is loaded.
"""

import inspect
import os
import reprlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, cast

import transformers
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME


__all__ = [
    "FEATURE_COUNTS",
    "PrunedModel",
    "PrunedStructure",
    "adopt_",
    "auto_class_members",
    "native_class",
    "pruned_class",
]

#: Version of the format in `config.vdneuron`.
_VERSION = 1

#: Layers that can shrink -> attributes that count what the first two axes of their weight run over.
FEATURE_COUNTS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nx", "nf"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
}

#: Attributes of attention modules that follow their number of heads. A new architecture adds its names here; a
#: checkpoint can set no other attribute.
_ATTRIBUTES = frozenset({
    "num_attention_heads",  # bert, roberta, electra
    "all_head_size",  # bert, roberta, electra: heads times their size
    "n_heads",  # distilbert
    "dim",  # distilbert: heads times their size
})

#: Weights and their index, as transformers names them.
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")

#: Base of `PrunedModel` for type checkers, which do not see the native class come in beside it.
_AnyModel: Any = object


@dataclass(frozen=True)
class PrunedStructure:
    """What is left of a pruned model: whatever differs from the native class of the same config.

    In JSON, as stored in `config.vdneuron`:

        {"version": 1,
         "shapes": {"encoder.layer.0.attention.self.query": [4, 16], ...},
         "attributes": {"encoder.layer.0.attention.self": {"num_attention_heads": 1, "all_head_size": 4}, ...}}

    Paths start from the base model, so one structure serves every head on it. Biases and the sizes that layers
    remember follow from the shapes, and so does which attention modules have no head left: theirs are all empty.

    Args:
        shapes: Path of a layer -> shape of its weight.
        attributes: Path of a module -> attribute -> value: of the native one, the share that the rows of the layers
            right inside the module keep.
    """

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, model: nn.Module) -> "PrunedStructure":
        """Read all sizes off a model, whether smaller than the native ones or not.

        Args:
            model: Base model, on any device.

        Returns:
            Shapes of all layers that can shrink, and all attributes that go with them.
        """
        modules = dict(model.named_modules())
        counted = {path: sorted(_ATTRIBUTES & vars(module).keys()) for path, module in modules.items()}
        return cls(
            {path: tuple(module.weight.shape) for path, module in modules.items() if _is_matrix(module)},
            {path: {name: vars(modules[path])[name] for name in names} for path, names in counted.items() if names},
        )

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "PrunedStructure":
        """Read the structure in `config.vdneuron`, as `from_json` does."""
        return cls.from_json(getattr(config, "vdneuron", None))

    @classmethod
    def from_json(cls, data: object) -> "PrunedStructure":
        """Read a structure from untrusted JSON.

        Args:
            data: What was in `config.vdneuron`.

        Returns:
            The structure, not yet compared with a model.

        Raises:
            ValueError: If anything in `data` is not of the expected type and range.
        """
        fields = _mapping(data, "structure")
        names = {"version", "shapes", "attributes"}
        _require(set(fields) == names, f"expected {sorted(names)}, got {reprlib.repr(list(fields))}")
        version = _count(fields["version"], "version")
        _require(version == _VERSION, f"expected version {_VERSION}, which this hf_vdneuron reads, got {version}")
        shapes = {path: _shape(shape, path) for path, shape in _mapping(fields["shapes"], "shapes").items()}
        _require(len(shapes) > 0, "expected smaller layers in `shapes`, got none")
        attributes = {
            path: {name: _count(value, name) for name, value in _mapping(values, path).items()}
            for path, values in _mapping(fields["attributes"], "attributes").items()
        }
        return cls(shapes, attributes)

    def to_json(self) -> dict[str, Any]:
        """Write the structure as JSON that `from_json` reads."""
        return {
            "version": _VERSION,
            "shapes": {path: list(shape) for path, shape in self.shapes.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
        }

    def apply_(self, model: nn.Module) -> None:
        """Shrink a native model in place, once everything fits. New weights of shrunk layers are not initialized.

        Args:
            model: Base model of the native class and config, on any device.

        Raises:
            ValueError: If the structure does not fit the model.
        """
        native, modules = PrunedStructure.of(model), dict(model.named_modules())
        shares: dict[str, set[Fraction]] = {}  # of the rows that the layers right inside a module keep
        for path, shape in self.shapes.items():
            _check_shape(path, native.shapes.get(path, ()), shape)
            axis = _out_axis(modules[path])
            left, rows = shape[axis], native.shapes[path][axis]
            if left < rows:
                shares.setdefault(path.rpartition(".")[0], set()).add(Fraction(left, rows))
        for path in {**self.attributes, **native.attributes}:
            counts, values = native.attributes.get(path, {}), self.attributes.get(path, {})
            _check_attributes(path, counts, values, shares.get(path, {Fraction(1)}))

        for path, shape in self.shapes.items():
            _resize_(modules[path], shape)
        for path in native.attributes:
            modules[path].__dict__.update(self.attributes.get(path, {}))


def _is_matrix(module: nn.Module | None) -> bool:
    """Whether the module is a layer that can shrink; grouped convolutions tie their two axes."""
    return isinstance(module, tuple(FEATURE_COUNTS)) and getattr(module, "groups", 1) == 1


def _out_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, Conv1D) else 0


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(f"`config.vdneuron` is damaged: {reason}. Download or save the model again.")


def _mapping(value: object, name: str) -> dict[str, object]:
    is_mapping = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    _require(is_mapping, f"expected {reprlib.repr(name)} to map names to values, got {reprlib.repr(value)}")
    return cast(dict[str, object], value)


def _count(value: object, name: str) -> int:
    is_count = type(value) is int and value >= 0  # a bool is an `int` too
    _require(is_count, f"expected a count for {reprlib.repr(name)}, got {reprlib.repr(value)}")
    return cast(int, value)


def _shape(value: object, path: str) -> tuple[int, ...]:
    _require(isinstance(value, list), f"expected a shape for {reprlib.repr(path)}, got {reprlib.repr(value)}")
    return tuple(_count(size, path) for size in cast(list[object], value))


def _check_shape(path: str, native: tuple[int, ...], shape: tuple[int, ...]) -> None:
    _require(len(native) > 0, f"this model has no layer {reprlib.repr(path)} that can shrink")
    is_smaller = len(shape) == len(native) and shape != native and all(map(int.__le__, shape, native))
    _require(
        is_smaller and shape[2:] == native[2:],  # the kernel of a convolution keeps its size
        f"expected a weight of {reprlib.repr(path)} smaller than {native}, got {reprlib.repr(shape)}",
    )


def _check_attributes(path: str, native: Mapping[str, int], values: Mapping[str, int], shares: set[Fraction]) -> None:
    """Heads are cut as a whole: what counts them, or their features, keeps the same share as the rows beside it."""
    _require(
        all({**native, **values} == {name: value * share for name, value in native.items()} for share in shares),
        f"expected the attributes of {reprlib.repr(path)} to follow its layers, got {reprlib.repr(dict(values))}",
    )


def _resize_(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a layer weights of another size. A layer built anew would lose its hooks, and warn if it is empty."""
    names = next(names for kind, names in FEATURE_COUNTS.items() if isinstance(module, kind))
    for name, size in zip(names, shape, strict=False):  # a kernel is not counted
        setattr(module, name, size)
    sizes = {"weight": shape, "bias": (shape[_out_axis(module)],)}
    for name, old in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(old.new_empty(sizes[name]), requires_grad=old.requires_grad))
    module.__dict__["_is_hf_initialized"] = False  # how `init_weights` knows what is left to do


class _HeadlessAttention(nn.Module):
    """Takes the place of an attention module that lost all heads: what it adds is a constant."""

    native_class: type[nn.Module]
    config: PreTrainedConfig
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return no features, or `hidden` ones if the output projection is in here; and the weights of no head."""
        batch, num_queries, _ = hidden_states.shape
        num_keys = num_queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if encoder_hidden_states is None and past_key_values is not None:
            if isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = past_key_values.self_attention_cache
            # One head, not none: transformers reads the length of the sequence off layer 0, unless it is empty.
            head = hidden_states.new_zeros(batch, 1, num_queries, 1)
            num_keys = past_key_values.update(head, head, self.layer_idx)[0].shape[2]
        output = hidden_states.new_zeros(batch, num_queries, 0)
        for child in self.children():
            if _is_matrix(child) and child.get_parameter("weight").shape[1 - _out_axis(child)] == 0:
                output = child(output)
        is_eager = self.config._attn_implementation == "eager"
        return output, hidden_states.new_zeros(batch, 0, num_queries, num_keys) if is_eager else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (_HeadlessAttention, self.native_class), self.__getstate__()


class PrunedModel(_AnyModel):
    """What `pruned_class` adds to a native class: the structure in its config decides the sizes of its layers."""

    native_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        structure = PrunedStructure.from_config(config)
        super().__init__(config, *args, **kwargs)
        structure.apply_(self.base_model)
        adopt_(self)
        self.init_weights()

    @classmethod
    def is_remote_code(cls) -> bool:
        """Deny it, wherever this file lies: transformers converts no keys of remote code, and these are its own."""
        return False

    def _get_static_cache_init_shape(self) -> None:
        """Let a static cache take its sizes from the tensors: layers differ in their number of heads."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, and beside the weights the code that loads them.

        All files are written aside and moved into place once they are complete: a save that is killed leaves the
        earlier one.

        Args:
            save_directory: Folder to save to; made if missing.
            is_main_process: Whether this process writes the files.
            *args: Passed on to the native method.
            push_to_hub: Whether to upload it afterwards, to `repo_id` or a repository named like the folder.
            **kwargs: Passed on to the native method, and to `push_to_hub`.
        """
        code = Path(__file__)
        members = {auto: f"{code.stem}.{name}" for auto, name in auto_class_members(self.config).items()}
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **members}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
            super().save_pretrained(staging, is_main_process, *args, **kwargs)
            if is_main_process:
                shutil.copyfile(code, Path(staging, code.name))
                _publish(Path(staging), folder)
        if push_to_hub and is_main_process:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (PrunedModel, self.native_class), self.__getstate__()


def _publish(staging: Path, folder: Path) -> None:
    """Move a complete save into place. Nothing loads without `config.json`: it goes first and comes last."""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    if any(path.match(pattern) for pattern in _WEIGHT_FILES for path in staging.iterdir()):
        for stale in [path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)]:
            stale.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        path.replace(folder / path.name)


@cache
def _extension(mixin: type, native: type) -> type:
    """Subclass a native class under its own name: transformers goes by it in losses, recorders, key conversions."""
    names = {name: getattr(native, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(native.__name__, (mixin, native), {**names, "native_class": native})


def _blank(mixin: type, native: type) -> object:
    """Make an instance for copy and pickle to fill: they cannot find its class by name."""
    return object.__new__(_extension(mixin, native))


def native_class(cls: type) -> type:
    """Return the class of transformers behind a pruned class, or any other class itself."""
    return getattr(cls, "native_class", cls)


def pruned_class(native: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of pruned models of a native class.

    Args:
        native: A model class of transformers, such as `BertForSequenceClassification`.

    Returns:
        A subclass of the same name, the same object in every call. It reads the structure from `config.vdneuron`.
    """
    return _extension(PrunedModel, native_class(native))


def adopt_(model: PreTrainedModel) -> None:
    """Make a model with smaller layers, and its base model, instances of their pruned classes, in place.

    Attention modules without heads get a forward pass that needs none. They stay instances of their native class, so
    transformers goes on recording their outputs, and keep their empty layers.

    Args:
        model: A model, with or without a head, whose config holds its structure.
    """
    for module in model.base_model.modules():
        matrices = [child.get_parameter("weight") for child in module.children() if _is_matrix(child)]
        is_empty = len(matrices) > 0 and all(matrix.numel() == 0 for matrix in matrices)
        if is_empty and "attention_mask" in inspect.signature(module.forward).parameters:
            module.__class__ = _extension(_HeadlessAttention, native_class(type(module)))
    for part in (model.base_model, model):
        part.__class__ = _extension(PrunedModel, native_class(type(part)))


def auto_class_members(config: PreTrainedConfig) -> dict[str, str]:
    """List the model classes of transformers that a config can build.

    Args:
        config: Config of a model.

    Returns:
        Name of an auto class -> name of its model class, such as `AutoModel` -> `BertModel`.
    """
    autos = {name: getattr(modeling_auto, name) for name in modeling_auto.__all__ if name.startswith("AutoModel")}
    members = {name: auto._model_mapping.get(type(config), None) for name, auto in autos.items()}
    first = {name: found[0] if isinstance(found, tuple) else found for name, found in members.items()}
    return {name: member.__name__ for name, member in first.items() if member is not None}


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Give every model class of transformers its pruned class here, for `auto_map` to name."""
    native = getattr(transformers, name, None)
    if not (isinstance(native, type) and issubclass(native, PreTrainedModel)):
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return pruned_class(native)
