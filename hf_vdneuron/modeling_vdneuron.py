# SPDX-License-Identifier: Apache-2.0
"""Models whose layers have sizes of their own: what is left of each, and classes that build, load and save them.

This file and the two that it imports need nothing but torch and transformers, because they also travel as remote code
beside the weights of every pruned model. They serve all architectures: they describe a pruned model by the shapes that
differ from those of its native class, build the native model and shrink it before any weight is loaded.
"""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from .modeling_vdneuron_experts import ConfigView, experts_config, is_experts
from .modeling_vdneuron_structure import PrunedStructure, forward_arguments, is_matrix, native_class, out_axis


__all__ = [
    "CODE_FILES",
    "PrunedModel",
    "PrunedStructure",
    "adopt_",
    "auto_class_members",
    "native_class",
    "pruned_class",
]

#: What travels with a pruned model: this file, and those that it imports, by relative names as remote code has to.
CODE_FILES = (
    Path(__file__),
    *(Path(__file__).with_name(f"modeling_vdneuron_{part}.py") for part in ("structure", "experts")),
)

#: Weights and their index, as transformers names them.
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")

#: Base of `PrunedModel` for type checkers, which do not see the native class come in beside it.
_AnyModel: Any = object

# What attention modules call the same thing, in one model or another.
_MASKS = frozenset({"attention_mask", "mask"})
_ENCODER_STATES = ("encoder_hidden_states", "key_value_states")
_CACHES = ("past_key_values", "layer_past")
_LAYER_INDICES = ("layer_idx", "layer_id")


class _StandIn(nn.Module):
    """Takes the place of a module that lost units, wherever its native forward pass cannot do without them.

    A stand-in stays an instance of its native class, so transformers goes on recording its outputs.
    """

    native_class: type[nn.Module]
    arguments: tuple[str, ...]

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def _position_bias(self, given: dict[str, Any]) -> Tensor | None:
        """Return T5's bias for every native head: the first layer computes it, and hands it to all others."""
        bias = given.get("position_bias")
        if bias is not None or not hasattr(self, "compute_bias"):
            return bias
        native: Any = self
        hidden: Tensor = given["hidden_states"]
        states, cache = given.get("key_value_states"), given.get("past_key_values")
        length = hidden.shape[1]
        if not native.has_relative_attention_bias:
            return hidden.new_zeros(1, 1, length, (hidden if states is None else states).shape[1])
        if cache is None:
            return native.compute_bias(length, length, device=hidden.device)
        past = cache.get_seq_length(native.layer_idx)
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place
        num_keys, _ = cache.get_mask_sizes(length, native.layer_idx)
        return native.compute_bias(length, num_keys, device=hidden.device, past_seen_tokens=past)

    def __reduce__(self) -> tuple[Any, ...]:
        mixin = type(self).__mro__[1]
        return _blank, (mixin, self.native_class), self.__getstate__()


class _HeadlessAttention(_StandIn):
    """Attention without heads: what it adds is a constant."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Return no features, or `hidden` ones if the output projection is in here; and the weights of no head."""
        given = self._by_name(args, kwargs)
        hidden = given["hidden_states"]
        states = next((given[name] for name in _ENCODER_STATES if given.get(name) is not None), None)
        bias = self._position_bias(given)
        batch, num_queries, _ = hidden.shape
        num_keys = self._fill_cache(given, hidden if states is None else states, is_cross=states is not None)
        output = hidden.new_zeros(batch, num_queries, 0)
        for child in self.children():
            if is_matrix(child) and child.get_parameter("weight").shape[1 - out_axis(child)] == 0:
                output = child(output)
        if given.get("residual") is not None:  # bloom adds it in here
            output = output + given["residual"]
        if "LayerNorm" in self._modules:  # as albert does, before it normalises
            output = self.get_submodule("LayerNorm")(hidden + output)
        config = getattr(self, "config", None)
        is_eager = config is None or config._attn_implementation == "eager"
        weights = hidden.new_zeros(batch, 0, num_queries, num_keys) if is_eager else None
        return (output, bias, weights) if hasattr(self, "compute_bias") else (output, weights)

    def _fill_cache(self, given: dict[str, Any], states: Tensor, *, is_cross: bool) -> int:
        """Let a cache count the positions of what would make keys, and return how many there are."""
        batch, length, _ = states.shape
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        if cache is None or (is_cross and not isinstance(cache, EncoderDecoderCache)):
            return length
        index = next(getattr(self, name) for name in _LAYER_INDICES if hasattr(self, name))
        if is_cross and cache.is_updated.get(index):
            return length
        if isinstance(cache, EncoderDecoderCache):
            if is_cross:
                cache.is_updated[index] = True
            cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        # One head, not none: transformers reads the length of the sequence off layer 0, unless it is empty.
        head = states.new_zeros(batch, 1, length, 1)
        return cache.update(head, head, index)[0].shape[2]


class _FewerHeads(_StandIn):
    """Attention that is handed a bias for each head of the native model."""

    kept_heads: list[int]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Attend under the biases of the heads that were kept, and pass on those of all."""
        given = self._by_name(args, kwargs)
        bias = self._position_bias(given)
        if bias is not None:
            given["position_bias"] = bias
        batch = len(given["hidden_states"])
        for name in ("position_bias", "alibi", "attention_mask"):
            if isinstance(given.get(name), Tensor):
                given[name] = _of_heads(given[name], self.kept_heads, batch)
        outputs: tuple[Tensor | None, ...] = super().forward(**given)  # the native one
        return (outputs[0], bias, *outputs[2:]) if hasattr(self, "compute_bias") else outputs


class _OwnHeadCount(_StandIn):
    """Attention that reads the number of its heads off the config, which is that of all layers."""

    num_key_value_heads: int
    num_key_value_groups: int

    @property
    def config(self) -> ConfigView:
        """The config of the model, apart from the number of heads."""
        num_heads = self.num_key_value_heads * self.num_key_value_groups
        return ConfigView(vars(self)["config"], num_attention_heads=num_heads)

    @config.setter
    def config(self, config: PreTrainedConfig) -> None:
        vars(self)["config"] = config


class _UnevenExperts(_StandIn):
    """Experts with a number of neurons that not every implementation takes."""

    down_proj: Tensor

    @property
    def config(self) -> PreTrainedConfig | ConfigView:
        """The config of the model, apart from the implementation."""
        return experts_config(vars(self)["config"], self.down_proj)

    @config.setter
    def config(self, config: PreTrainedConfig) -> None:
        vars(self)["config"] = config


class _ReadsNothing(_StandIn):
    """Layer of GPT-2 without an input feature, which it could not reshape."""

    weight: Tensor
    bias: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the bias at every position, and keep the empty weight in the graph."""
        return F.linear(inputs, self.weight.t(), self.bias)


def _of_heads(bias: Tensor, kept: list[int], batch: int) -> Tensor:
    """Choose the biases of some heads, shape `(batch or 1, heads or 1, ...)` or `(batch * heads, 1, keys)`."""
    if bias.ndim == 3:
        return bias.unflatten(0, (batch, -1))[:, kept].flatten(0, 1)
    return bias[:, kept] if bias.ndim == 4 and bias.shape[1] > 1 else bias


def _stand_in(module: nn.Module) -> type | None:
    """Choose what a module needs to run as it is now, if anything."""
    if isinstance(module, Conv1D):
        return _ReadsNothing if len(module.weight) == 0 else None
    if is_experts(module):
        return _UnevenExperts
    if not _is_attention(module):
        return None
    matrices = [child.get_parameter("weight") for child in module.children() if is_matrix(child)]
    if matrices and all(matrix.numel() == 0 for matrix in matrices):
        return _HeadlessAttention
    if "kept_heads" in vars(module):
        return _FewerHeads
    keys, heads_per_key = (vars(module).get(name) for name in ("num_key_value_heads", "num_key_value_groups"))
    if keys is None or heads_per_key is None or keys * heads_per_key == vars(module)["config"].num_attention_heads:
        return None
    return _OwnHeadCount


def _is_attention(module: nn.Module) -> bool:
    """Tell whether a module computes attention itself; the layers around it take a mask too, and hand it on."""
    return _takes_mask(module) and not any(_takes_mask(part) for part in module.modules() if part is not module)


def _takes_mask(module: nn.Module) -> bool:
    return not _MASKS.isdisjoint(forward_arguments(type(module)))


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
        members = {auto: f"{CODE_FILES[0].stem}.{name}" for auto, name in auto_class_members(self.config).items()}
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **members}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
            super().save_pretrained(staging, is_main_process, *args, **kwargs)
            if is_main_process:
                for code in CODE_FILES:
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
    added = {"native_class": native, "arguments": forward_arguments(native)}
    return type(native.__name__, (mixin, native), {**names, **added})


def _blank(mixin: type, native: type) -> object:
    """Make an instance for copy and pickle to fill: they cannot find its class by name."""
    return object.__new__(_extension(mixin, native))


def pruned_class(native: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of pruned models of a native class.

    Args:
        native: A model class of transformers, such as `BertForSequenceClassification`.

    Returns:
        A subclass of the same name, the same object in every call. It reads the structure from `config.vdneuron`.
    """
    pruned: type[PreTrainedModel] = _extension(PrunedModel, native_class(native))
    return pruned


def adopt_(model: PreTrainedModel) -> None:
    """Make a model with smaller layers, and its base model, instances of their pruned classes, in place.

    Attention modules without heads get a forward pass that needs none, and keep their empty layers. So do those whose
    native forward pass counts on the heads of the whole model.

    Args:
        model: A model, with or without a head, whose config holds its structure.
    """
    for module in model.base_model.modules():
        mixin = _stand_in(module)
        if mixin is not None:
            module.__class__ = _extension(mixin, native_class(type(module)))
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
