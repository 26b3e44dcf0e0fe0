"""Structures that list heads, or parameters outside of layers; hostile ones; what is borrowed from transformers."""

import copy
import inspect
import json
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.generation import GenerationMixin
from zoo import masks, zoo_model

from hf_vdneuron.modeling_vdneuron import PrunedStructure
from hf_vdneuron.modeling_vdneuron_structure import forward_arguments, takes_bias_per_head
from hf_vdneuron.pruning import prune_model_


T5 = "encoder.block.1.layer.0.SelfAttention"
DEBERTA = "encoder.layer.1.attention.self"
OLMO2 = "layers.1.self_attn"
SWIN = "encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table"


def pruned(row: str) -> PreTrainedModel:
    model = zoo_model(row)
    return prune_model_(model, masks(model)["ragged"])


def skeleton(model: PreTrainedModel) -> nn.Module:
    config = copy.deepcopy(model.config)
    del config.vdneuron
    with torch.device("meta"):
        return AutoModel.from_config(config)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("row", "version"), [("t5", 2), ("mpnet", 2), ("bloom", 2), ("llama", 1), ("olmo2", 1)])
def test_only_what_lists_heads_needs_the_second_version(row: str, version: int) -> None:
    data = pruned(row).config.vdneuron
    assert data["version"] == version
    assert ("heads" in data) == (version == 2)
    assert PrunedStructure.from_json(json.loads(json.dumps(data))).to_json() == data


def test_structure_says_which_heads_are_left() -> None:
    model = pruned("t5")
    structure = PrunedStructure.from_config(model.config)
    mask = masks(zoo_model("t5"))["ragged"].keep["encoder.block.1.attention"]
    assert structure.heads[T5] == tuple(mask.all(0).nonzero().flatten().tolist())
    assert structure.attributes[T5]["n_heads"] == len(structure.heads[T5]) < 4


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ("deberta", f"{DEBERTA}.v_bias"),
        ("deberta", f"{DEBERTA}.q_bias"),
        ("olmo2_ungrouped", f"{OLMO2}.q_norm.weight"),
        ("swin", SWIN),
    ],
)
def test_structure_lists_parameters_outside_of_layers(row: str, path: str) -> None:
    model = pruned(row)
    structure = PrunedStructure.from_config(model.config)
    assert structure.shapes[path] == tuple(model.base_model.get_parameter(path).shape)
    native = skeleton(model)
    structure.apply_(native)
    assert shapes(native) == shapes(model.base_model)


def test_a_norm_over_fewer_features_divides_by_as_much_as_before() -> None:
    dense, model = zoo_model("olmo2_ungrouped"), pruned("olmo2_ungrouped")
    before, after = (one.base_model.get_submodule(f"{OLMO2}.k_norm") for one in (dense, model))
    assert len(after.weight) < len(before.weight)
    assert after.variance_epsilon * len(after.weight) == pytest.approx(before.variance_epsilon * len(before.weight))
    restored = skeleton(model)
    PrunedStructure.from_config(model.config).apply_(restored)
    assert restored.get_submodule(f"{OLMO2}.k_norm").variance_epsilon == after.variance_epsilon


@pytest.mark.parametrize(
    "heads", [[], [0], [0, 1, 2, 3], [1, 0, 2], [0, 0, 1], [0, 1, 4], [-1, 0, 1], [True, 1, 2], "012", None], ids=str
)
def test_heads_follow_the_layers(heads: object) -> None:
    model = pruned("t5")
    hostile = copy.deepcopy(model.config.vdneuron)
    assert len(hostile["heads"][T5]) == 3  # of four
    hostile["heads"][T5] = heads
    refuse(hostile, model)


@pytest.mark.parametrize(
    "path", ["", "encoder", "encoder.block.1", "decoder.block.0.layer.2.DenseReluDense", "no.such.module"]
)
def test_only_attention_has_heads(path: str) -> None:
    model = pruned("t5")
    hostile = copy.deepcopy(model.config.vdneuron)
    hostile["heads"][path] = [0, 1]
    refuse(hostile, model)


def test_attention_that_needs_heads_cannot_do_without() -> None:
    model = pruned("t5")
    hostile = copy.deepcopy(model.config.vdneuron)
    del hostile["heads"][T5]
    refuse(hostile, model)
    del hostile["heads"]
    refuse(hostile | {"version": 1}, model)


@pytest.mark.parametrize(
    ("row", "path", "shape"),
    [
        ("deberta", f"{DEBERTA}.q_bias", [17]),
        ("deberta", f"{DEBERTA}.q_bias", [4, 4]),
        ("deberta", f"{DEBERTA}.q_bias", [5]),
        ("deberta", "embeddings.LayerNorm.weight", [8]),
        ("olmo2_ungrouped", f"{OLMO2}.q_norm.weight", [2]),
        ("olmo2", "norm.weight", [8]),
        ("swin", SWIN, [8, 3]),
        ("swin", SWIN, [9, 1]),
        ("vit", "embeddings.position_embeddings", [1, 5, 8]),
        ("segformer", "stages.0.blocks.0.mlp.dwconv.dwconv", [4, 0, 3, 3]),
        ("segformer", "stages.0.blocks.0.mlp.dwconv.dwconv", [4, 1, 3, 1]),
        ("olmo2", "layers.0.post_attention_layernorm.weight", [8]),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", [8, 3]),
    ],
)
def test_no_other_parameter_can_shrink(row: str, path: str, shape: list[int]) -> None:
    model = pruned(row)
    hostile = copy.deepcopy(model.config.vdneuron)
    hostile["shapes"][path] = shape
    refuse(hostile, model)


def refuse(hostile: dict[str, Any], model: PreTrainedModel) -> None:
    native = skeleton(model)
    before = shapes(native)
    with pytest.raises(ValueError, match=r"`config\.vdneuron` is damaged"):
        PrunedStructure.from_json(hostile).apply_(native)
    assert shapes(native) == before


def test_arguments_are_those_of_the_native_forward_pass() -> None:
    attention = pruned("t5").base_model.get_submodule(T5)
    assert type(attention) is not type(attention).native_class
    assert "position_bias" in forward_arguments(type(attention))
    assert takes_bias_per_head(attention)
    assert not takes_bias_per_head(pruned("llama").base_model.layers[0].self_attn)


def test_what_is_borrowed_from_transformers_is_still_there() -> None:
    """All names of transformers' own that remote code relies on: if one moves, this is where it shows first."""
    assert hasattr(transformers.AutoModel, "_model_mapping")
    assert hasattr(GenerationMixin, "_get_static_cache_init_shape")
    assert hasattr(transformers.LlamaConfig(), "_attn_implementation")
    assert hasattr(PreTrainedModel, "is_remote_code")
    assert "_is_hf_initialized" in inspect.getsource(PreTrainedModel)
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    assert {"is_updated", "self_attention_cache", "cross_attention_cache"} <= vars(cache).keys()
    assert list(inspect.signature(cache.get_mask_sizes).parameters)[:2] == ["query_length", "layer_idx"]
