# SPDX-License-Identifier: Apache-2.0
"""What is left of a pruned model, as data: shapes that differ from those of its native class. Read, check, apply.

It travels as remote code beside `modeling_vdneuron` and needs nothing but torch and transformers.
"""

import inspect
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .modeling_vdneuron_experts import EXPERTS, is_experts


__all__ = [
    "FEATURE_COUNTS",
    "HEAD_COUNTS",
    "KEY_COUNTS",
    "WIDTHS",
    "PrunedStructure",
    "forward_arguments",
    "is_matrix",
    "native_class",
    "out_axis",
    "rescale_epsilon_",
    "takes_bias_per_head",
]

#: Versions of the format in `config.vdneuron` -> its fields. What needs no list of heads is written as version 1.
_VERSIONS = {1: {"version", "shapes", "attributes"}, 2: {"version", "shapes", "attributes", "heads"}}

#: Layers that can shrink -> attributes that count what the first two axes of their weight run over.
FEATURE_COUNTS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nx", "nf"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
}

#: Norms with statistics of each channel, which go with it.
_CHANNEL_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

#: Attributes of attention modules that count their heads, the first of them those of queries.
HEAD_COUNTS = (
    "num_attention_heads",  # bert and its like
    "num_heads",  # gpt2, opt, bloom, falcon, bart and their like
    "n_heads",  # distilbert, t5
)

#: Those that count their keys, which several heads can share.
KEY_COUNTS = (
    "num_kv_heads",  # falcon
    "num_key_value_heads",  # phi3
)

#: Those that hold the number of heads times their size.
WIDTHS = (
    "all_head_size",  # bert and its like
    "dim",  # distilbert
    "inner_dim",  # t5
    "split_size",  # gpt2, bloom, falcon
)

#: Attributes of attention modules that follow their number of heads. A new architecture adds its names above; a
#: checkpoint can set no other attribute.
_ATTRIBUTES = frozenset({*HEAD_COUNTS, *KEY_COUNTS, *WIDTHS})

#: Parameters of attention modules themselves, norms and tables in them, whose last axis follows their number of heads.
_VECTORS = frozenset({
    "q_bias",  # deberta
    "v_bias",  # deberta
    "q_norm.weight",  # olmo2: a norm over all heads
    "k_norm.weight",  # olmo2
    "relative_position_bias.relative_position_bias_table",  # swin
})

#: Arguments of attention modules that hold a value for each head of the native model.
_BIASES_PER_HEAD = frozenset({
    "position_bias",  # t5, mpnet
    "alibi",  # bloom, falcon
})

#: Switches in a config that say that such values are part of the attention mask.
_BIASED_MASKS = ("use_relative_position_bias", "use_shared_relative_position_bias")  # beit

#: Endings of parameters that lie in no layer that can shrink.
_LOOSE = (*_VECTORS, *EXPERTS)

#: What a norm calls the number that keeps it from dividing by zero.
_EPSILON = "variance_epsilon"


@dataclass(frozen=True)
class PrunedStructure:
    """What is left of a pruned model: whatever differs from the native class of the same config.

    In JSON, as stored in `config.vdneuron`:

        {"version": 1,
         "shapes": {"encoder.layer.0.attention.self.query": [4, 16], ...},
         "attributes": {"encoder.layer.0.attention.self": {"num_attention_heads": 1, "all_head_size": 4}, ...}}

    and, from version 2 on, where a bias for each native head comes from outside of the attention module,

         "heads": {"encoder.block.0.layer.0.SelfAttention": [0, 3], ...}

    Paths start from the base model, so one structure serves every head on it. Biases and the sizes that layers
    remember follow from the shapes, and so does which attention modules have no head left: theirs are all empty.

    Args:
        shapes: Path of a layer -> shape of its weight; path of a parameter that lies in no such layer -> its shape.
        attributes: Path of a module -> attribute -> value: of the native one, the share that the rows of the layers
            right inside the module keep.
        heads: Path of a module -> which of its native heads it kept.
    """

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, int]]
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "PrunedStructure":
        """Read all sizes off a model, whether smaller than the native ones or not.

        Args:
            model: Base model, on any device.

        Returns:
            Shapes of all that can shrink, all attributes that go with it, and the heads where some were removed.
        """
        modules = dict(model.named_modules())
        counted = {path: sorted(_ATTRIBUTES & vars(module).keys()) for path, module in modules.items()}
        vectors = {name: value for name, value in model.named_parameters() if _is_vector(name)}
        return cls(
            {
                path: tuple(module.get_parameter("weight").shape)
                for path, module in modules.items()
                if is_matrix(module) or (isinstance(module, _CHANNEL_NORMS) and module.weight is not None)
            }
            | {name: tuple(value.shape) for name, value in vectors.items()},
            {path: {name: vars(modules[path])[name] for name in names} for path, names in counted.items() if names},
            {path: tuple(module.kept_heads) for path, module in modules.items() if "kept_heads" in vars(module)},
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
        version = _count(fields.get("version"), "version")
        known = " or ".join(map(str, _VERSIONS))
        _require(version in _VERSIONS, f"expected version {known}, which this hf_vdneuron reads, got {version}")
        names = _VERSIONS[version]
        _require(set(fields) == names, f"expected {sorted(names)}, got {reprlib.repr(list(fields))}")
        shapes = {path: _shape(shape, path) for path, shape in _mapping(fields["shapes"], "shapes").items()}
        _require(len(shapes) > 0, "expected smaller layers in `shapes`, got none")
        attributes = {
            path: {name: _count(value, name) for name, value in _mapping(values, path).items()}
            for path, values in _mapping(fields["attributes"], "attributes").items()
        }
        heads = {path: _shape(kept, path) for path, kept in _mapping(fields.get("heads", {}), "heads").items()}
        return cls(shapes, attributes, heads)

    def to_json(self) -> dict[str, Any]:
        """Write the structure as JSON that `from_json` reads."""
        heads = {path: list(kept) for path, kept in self.heads.items()}
        return {
            "version": 2 if heads else 1,
            "shapes": {path: list(shape) for path, shape in self.shapes.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
            **({"heads": heads} if heads else {}),
        }

    def apply_(self, model: nn.Module) -> None:
        """Shrink a native model in place, once everything fits. New weights of shrunk layers are not initialized.

        Args:
            model: Base model of the native class and config, on any device.

        Raises:
            ValueError: If the structure does not fit the model.
        """
        native, modules = PrunedStructure.of(model), dict(model.named_modules())
        self._require_fits(native, modules)
        for path, shape in self.shapes.items():
            _resize_(model, path, shape)
        for path in native.attributes:
            modules[path].__dict__.update(self.attributes.get(path, {}))
        for path, kept in self.heads.items():
            modules[path].__dict__["kept_heads"] = list(kept)

    def _require_fits(self, native: "PrunedStructure", modules: Mapping[str, nn.Module]) -> None:
        """Compare everything with the native sizes and modules."""
        shares: dict[str, set[Fraction]] = {}  # of the rows that the layers right inside a module keep
        for path, shape in self.shapes.items():
            axis, fixed = _axes(path, modules.get(path))
            _check_shape(path, native.shapes.get(path, ()), shape, fixed)
            left, rows = shape[axis], native.shapes[path][axis]
            if left < rows:
                shares.setdefault(_block(path), set()).add(Fraction(left, rows))
        for path in native.shapes.keys() - self.shapes.keys():  # one parameter of experts does not shrink alone
            if path.endswith(tuple(EXPERTS)) and _block(path) in shares:
                shares[_block(path)].add(Fraction(1))
        for path in {**self.attributes, **native.attributes}:
            counts, values = native.attributes.get(path, {}), self.attributes.get(path, {})
            _check_attributes(path, counts, values, shares.get(path, {Fraction(1)}))
        for path, kept in shares.items():
            _require(
                len(kept) == 1, f"expected all layers of {reprlib.repr(path)} to keep the same share of their rows"
            )
        for path in {**self.heads, **shares}:
            _check_heads(path, modules.get(path), self.heads.get(path), shares.get(path, set()))


def native_class(cls: type) -> type:
    """Return the class of transformers behind a pruned class, or any other class itself."""
    return getattr(cls, "native_class", cls)


def forward_arguments(cls: type) -> tuple[str, ...]:
    """List the arguments of the native forward pass of a class of modules, in order."""
    return _forward_arguments(native_class(cls))


@cache
def _forward_arguments(native: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cast(type[nn.Module], native).forward).parameters)[1:]


def takes_bias_per_head(module: nn.Module) -> bool:
    """Tell whether a module is handed a bias for each head, and so has to know which ones it kept."""
    in_mask = any(getattr(getattr(module, "config", None), switch, False) for switch in _BIASED_MASKS)
    as_argument = not _BIASES_PER_HEAD.isdisjoint(forward_arguments(type(module)))
    return (as_argument or in_mask) and _num_heads(module) is not None


def is_matrix(module: nn.Module | None) -> bool:
    """Tell whether a module is a layer that can shrink; convolutions in few groups tie their two axes."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups in (1, module.in_channels)
    return isinstance(module, tuple(FEATURE_COUNTS))


def out_axis(module: nn.Module | None) -> int:
    """Tell along which axis of its weight a layer's output features run."""
    return 1 if isinstance(module, Conv1D) else 0


def _block(path: str) -> str:
    """Return the path of the module around a layer, or around the owner of a parameter that lies in no layer."""
    end = next((f".{end}" for end in _LOOSE if path.endswith(f".{end}")), f".{path.rpartition('.')[2]}")
    return path.removesuffix(end) if "." in path else ""


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str | None]:
    """Look up a layer; or the module that holds a parameter, and its name there."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    return (
        (module, name) if name in dict(module.named_parameters(recurse=False)) else (model.get_submodule(path), None)
    )


def _is_vector(name: str) -> bool:
    return any(name.endswith(f".{end}") for end in _LOOSE)


def _num_heads(module: nn.Module) -> int | None:
    return next((vars(module)[name] for name in HEAD_COUNTS if name in vars(module)), None)


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


def _check_shape(path: str, native: tuple[int, ...], shape: tuple[int, ...], fixed: slice) -> None:
    _require(len(native) > 0, f"this model has no layer {reprlib.repr(path)} that can shrink")
    is_smaller = len(shape) == len(native) and shape != native and all(map(int.__le__, shape, native))
    _require(
        is_smaller and shape[fixed] == native[fixed],
        f"expected a weight of {reprlib.repr(path)} smaller than {native}, got {reprlib.repr(shape)}",
    )


def _axes(path: str, module: nn.Module | None) -> tuple[int, slice]:
    """Tell along which axis a weight shrinks with its units, and which axes cannot shrink: a kernel keeps its size."""
    if module is None:
        return next((axes for end, axes in EXPERTS.items() if path.endswith(f".{end}")), (-1, slice(-1)))
    return out_axis(module), slice(2 if getattr(module, "groups", 1) == 1 else 1, None)


def _check_attributes(path: str, native: Mapping[str, int], values: Mapping[str, int], shares: set[Fraction]) -> None:
    """Heads are cut as a whole: what counts them, or their features, keeps the same share as the rows beside it."""
    _require(
        all({**native, **values} == {name: value * share for name, value in native.items()} for share in shares),
        f"expected the attributes of {reprlib.repr(path)} to follow its layers, got {reprlib.repr(dict(values))}",
    )


def _check_heads(path: str, module: nn.Module | None, kept: Sequence[int] | None, shares: set[Fraction]) -> None:
    """Where heads have a bias from outside, the structure says which ones were kept, in order, and nowhere else."""
    num_heads = _num_heads(module) if module is not None and shares and takes_bias_per_head(module) else None
    if num_heads is None:
        _require(kept is None, f"expected no heads for {reprlib.repr(path)}, which needs none")
        return
    left = set() if kept is None else {head for head in kept if head < num_heads}
    _require(
        kept is not None and list(kept) == sorted(left) and {len(kept)} == {num_heads * share for share in shares},
        f"expected the heads of {reprlib.repr(path)} to follow its layers, got {reprlib.repr(kept)}",
    )


def _counts(module: nn.Module) -> tuple[str, ...]:
    """List the attributes that count what the axes of a layer's weight run over."""
    if isinstance(module, _CHANNEL_NORMS):
        return ("num_features",)
    return next(names for kind, names in FEATURE_COUNTS.items() if isinstance(module, kind))


def _resize_(model: nn.Module, path: str, shape: tuple[int, ...]) -> None:
    """Give a layer weights of another size. A layer built anew would lose its hooks, and warn if it is empty."""
    module, name = _owner(model, path)
    if name is not None:
        rescale_epsilon_(module, module.get_parameter(name).shape[-1], shape[-1])
        _renew_(module, name, shape)
        if is_experts(module):
            module.__dict__["intermediate_dim"] = module.get_parameter("down_proj").shape[2]
        return
    for name, size in zip(_counts(module), shape, strict=False):  # a kernel is not counted
        setattr(module, name, size)
    if getattr(module, "groups", 1) > 1:  # each channel makes one
        module.__dict__.update(groups=shape[0], in_channels=shape[0])
    _renew_all_(module, shape)
    bias = getattr(module, "bias", None)
    if 0 in shape:  # some models would draw weights with a variance of one over their number
        module.__dict__["_is_hf_initialized"] = True
        if bias is not None:
            nn.init.zeros_(bias)


def rescale_epsilon_(module: nn.Module, before: int, after: int) -> None:
    """Keep a norm over fewer features what it was over all, the others being zero; its weight shrinks likewise."""
    if after and _EPSILON in vars(module):
        setattr(module, _EPSILON, getattr(module, _EPSILON) * before / after)


def _renew_all_(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a layer's parameters, and the statistics of a norm, the sizes that go with a shape of its weight."""
    sizes = {"weight": shape, "bias": (shape[out_axis(module)],)}
    for name, _ in list(module.named_parameters(recurse=False)):
        _renew_(module, name, sizes[name])
    for name, values in list(module.named_buffers(recurse=False)):
        if values.ndim:  # unlike the count of batches
            setattr(module, name, values[: shape[0]].clone())


def _renew_(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad))
    module.__dict__["_is_hf_initialized"] = False  # how `init_weights` knows what is left to do
