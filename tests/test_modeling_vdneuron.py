"""Structure of pruned models, their classes, and attention without heads."""

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import (
    AUTO_CLASSES,
    CONFIGS,
    HEADS,
    HIDDEN,
    NEURONS,
    RAGGED,
    WHOLE_SUBLAYERS,
    KeptUnits,
    batch,
    cut_,
    dense_model,
    end_by_hand_,
    keep_units,
    outputs,
    places,
    randomised_,
    select_,
)
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.pytorch_utils import Conv1D

from hf_vdneuron import modeling_vdneuron
from hf_vdneuron.modeling_vdneuron import PrunedModel, PrunedStructure, auto_class_members, pruned_class
from hf_vdneuron.structure import as_pruned_model_


TOLERANCE = 1e-5  # fp32, as promised for pruned against masked models
QUERY = "encoder.layer.0.attention.self.query"
ATTENTION = "encoder.layer.0.attention.self"
BAD_COUNTS: list[Any] = [True, None, "8", -1, 10**12, 10**30, 1.0, math.nan, math.inf, [], {}]

kept_units = pytest.mark.parametrize(
    "kept", [RAGGED, WHOLE_SUBLAYERS], ids=["ragged_and_empty_layers", "whole_sublayers"]
)
families = pytest.mark.parametrize("family", CONFIGS)
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def pruned_model(family: str = "bert", head: str = "sequence_classification") -> PrunedModel:
    return as_pruned_model_(cut_(dense_model(family, head)))


def native_skeleton(family: str = "bert") -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModel.from_config(copy.deepcopy(CONFIGS[family]))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


VALID = PrunedStructure.from_config(pruned_model().config).to_json()
SKELETON = native_skeleton()  # hostile structures never change it
NATIVE_SHAPES = shapes(SKELETON)


@families
@kept_units
@implementations
def test_pruned_equals_masked(family: str, kept: KeptUnits, implementation: str) -> None:
    dense = dense_model(family, "sequence_classification")
    dense.set_attn_implementation(implementation)
    masked = end_by_hand_(copy.deepcopy(dense), places(dense), keep_units(dense, kept, side=1))
    expected = outputs(masked, batch())
    assert not torch.allclose(expected, outputs(dense, batch()), atol=0.01)  # the mask matters
    pruned = as_pruned_model_(cut_(dense, kept))
    torch.testing.assert_close(outputs(pruned, batch()), expected, atol=TOLERANCE, rtol=0)


@families
def test_attentions_are_recorded_for_every_layer(family: str) -> None:
    pruned = pruned_model(family, "base")
    pruned.set_attn_implementation("eager")
    attentions = pruned(**batch(), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, n, 6, 6) for n in (2, 0, 1)]
    pruned.set_attn_implementation("sdpa")
    dense = dense_model(family)
    assert len(pruned(**batch(), output_attentions=True).attentions) == len(
        dense(**batch(), output_attentions=True).attentions
    )


def test_model_can_learn() -> None:
    pruned = pruned_model("distilbert").train()
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.1)
    before = copy.deepcopy(pruned.state_dict())
    pruned(**batch(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    after = pruned.state_dict()
    learned = "distilbert.transformer.layer.1.attention.out_lin.bias"  # all that is left of its attention
    assert not torch.equal(after[learned], before[learned])
    assert all(tensor.isfinite().all() for tensor in after.values())


@families
def test_structure_survives_json(family: str) -> None:
    structure = PrunedStructure.from_config(pruned_model(family).config)
    assert PrunedStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


def test_structure_says_what_is_left() -> None:
    structure = PrunedStructure.from_json(VALID)
    assert structure.shapes[QUERY] == (8, HIDDEN)
    assert structure.shapes["encoder.layer.1.attention.output.dense"] == (HIDDEN, 0)
    assert structure.shapes["encoder.layer.2.intermediate.dense"] == (1, HIDDEN)
    assert structure.attributes[ATTENTION] == {"num_attention_heads": 2, "all_head_size": 8}
    assert not any(path.startswith(("pooler", "embeddings", "classifier")) for path in structure.shapes)


def test_structure_applies_to_every_layer_type() -> None:
    linear, transposed = nn.Linear(8, 6), Conv1D(6, 8)
    conv1, conv2 = nn.Conv1d(8, 6, 3), nn.Conv2d(8, 6, (3, 2), bias=False)
    model = nn.ModuleDict({"linear": linear, "transposed": transposed, "conv1": conv1, "conv2": conv2})
    smaller = {"linear": (2, 3), "transposed": (3, 2), "conv1": (2, 3, 3), "conv2": (2, 3, 3, 2)}
    conv1.weight.requires_grad_(False)
    PrunedStructure(smaller, {}).apply_(model)
    assert {name: tuple(layer.weight.shape) for name, layer in model.items()} == smaller
    assert not conv1.weight.requires_grad
    assert linear(torch.zeros(1, 3)).shape == transposed(torch.zeros(1, 3)).shape == (1, 2)
    assert conv1(torch.zeros(1, 3, 5)).shape == (1, 2, 3)
    assert conv2(torch.zeros(1, 3, 5, 5)).shape == (1, 2, 3, 4)
    assert [conv2.in_channels, transposed.nf, linear.out_features] == [3, 2, 2]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (3, 4)),
        (nn.Linear(4, 3), (3, 5)),
        (nn.Linear(4, 3), (12,)),
        (nn.Conv1d(4, 4, 3), (4, 3, 2)),
        (nn.Conv1d(4, 4, 3, groups=2), (2, 2, 3)),
        (nn.Embedding(4, 3), (3, 3)),
        (nn.LayerNorm(4), (3,)),
    ],
    ids=["nothing_smaller", "larger", "other_rank", "other_kernel", "grouped", "embedding", "norm"],
)
def test_layers_only_shrink(layer: nn.Module, shape: tuple[int, ...]) -> None:
    before = shapes(layer)
    with pytest.raises(ValueError, match=r"config\.vdneuron.*damaged.*'layer'"):
        PrunedStructure({"layer": shape}, {}).apply_(nn.ModuleDict({"layer": layer}))
    assert shapes(layer) == before


def test_nothing_changes_unless_all_fits() -> None:
    structure = PrunedStructure({QUERY: (8, HIDDEN), "encoder.layer.9": (1, 1)}, {})
    model = native_skeleton()
    with pytest.raises(ValueError, match=r"encoder\.layer\.9"):
        structure.apply_(model)
    assert shapes(model) == NATIVE_SHAPES


def hostile_counts(data: dict[str, Any]) -> Iterator[tuple[Any, Any, int]]:
    """All counts in a structure: the container, its key, and the count of the native model."""
    yield data, "version", 1
    native = dict(SKELETON.named_modules())
    for path, shape in data["shapes"].items():
        yield from ((shape, axis, native[path].weight.shape[axis]) for axis in range(len(shape)))
    for path, values in data["attributes"].items():
        yield from ((values, name, getattr(native[path], name)) for name in values)


@given(st.data())
def test_hostile_structures_are_refused_before_anything_happens(data: st.DataObject) -> None:
    hostile = copy.deepcopy(VALID)
    names = st.text(max_size=8)
    change = data.draw(
        st.sampled_from(["count", "enlarge", "rank", "path", "attribute", "container", "key", "missing"])
    )
    container, key, native = data.draw(st.sampled_from(list(hostile_counts(hostile))))
    shape = data.draw(st.sampled_from(list(hostile["shapes"].values())))
    if change == "count":
        container[key] = data.draw(st.sampled_from(BAD_COUNTS))
    elif change == "enlarge":
        container[key] = native + data.draw(st.integers(1, 10**15))
    elif change == "rank":
        shape[:] = data.draw(st.lists(st.integers(0, 3), max_size=9).filter(lambda sizes: len(sizes) != 2))
    elif change == "path":
        hostile[data.draw(st.sampled_from(["shapes", "attributes"]))][data.draw(names)] = data.draw(
            st.sampled_from([[1, 1], {"dim": 1}, {"num_attention_heads": 0}])
        )
    elif change == "attribute":
        name = data.draw(names | st.sampled_from(["__class__", "training", "layer_idx", "forward", "query"]))
        hostile["attributes"][ATTENTION][name] = 0
    elif change == "container":
        where = data.draw(st.sampled_from([hostile, hostile["shapes"], hostile["attributes"]]))
        where[data.draw(st.sampled_from(list(where)))] = data.draw(st.sampled_from(BAD_COUNTS[:-2]))
    elif change == "key":
        hostile[data.draw(names)] = 1
    else:
        del hostile[data.draw(st.sampled_from(list(hostile)))]
    with pytest.raises(ValueError, match=r"`config\.vdneuron` is damaged"):
        PrunedStructure.from_json(hostile).apply_(SKELETON)
    assert shapes(SKELETON) == NATIVE_SHAPES


@pytest.mark.parametrize(
    ("path", "name"),
    [(ATTENTION, "attention_head_size"), (ATTENTION, "layer_idx"), (QUERY, "in_features"), ("", "training")],
)
def test_no_other_attribute_can_be_set(path: str, name: str) -> None:
    hostile = VALID | {"attributes": {path: {name: 0}}}
    with pytest.raises(ValueError, match=rf"`config\.vdneuron` is damaged.*'{name}'"):
        PrunedStructure.from_json(hostile).apply_(SKELETON)


@pytest.mark.parametrize(
    "attributes",
    [
        {"num_attention_heads": 0, "all_head_size": 3},
        {"num_attention_heads": 2, "all_head_size": 7},
        {"num_attention_heads": 1, "all_head_size": 8},
        {"num_attention_heads": 4, "all_head_size": 16},
        {"num_attention_heads": 2},
        {},
        None,
    ],
    ids=str,
)
def test_attributes_follow_the_rows(attributes: dict[str, int] | None) -> None:
    hostile = copy.deepcopy(VALID)  # two heads of size 4 are left of four
    hostile["attributes"][ATTENTION] = attributes
    if attributes is None:
        del hostile["attributes"][ATTENTION]
    with pytest.raises(ValueError, match=r"`config\.vdneuron` is damaged.*to follow its layers"):
        PrunedStructure.from_json(hostile).apply_(SKELETON)


@families
def test_attributes_follow_each_of_the_rows(family: str) -> None:
    """Where queries, keys and values disagree, or none was cut, no attributes are right."""
    valid = PrunedStructure.from_config(pruned_model(family).config)
    path = next(iter(valid.attributes))
    layer = next(layer for layer, shape in valid.shapes.items() if layer.startswith(path) and shape[0] < HIDDEN)
    fewer = PrunedStructure({**valid.shapes, layer: (4, HIDDEN)}, valid.attributes)
    uncut = PrunedStructure({key: shape for key, shape in valid.shapes.items() if path not in key}, valid.attributes)
    for hostile in (fewer, uncut):
        with pytest.raises(ValueError, match="to follow its layers"):
            hostile.apply_(native_skeleton(family))


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@given(any_json | st.fixed_dictionaries({"version": st.just(1), "shapes": any_json, "attributes": any_json}))
def test_garbage_is_a_value_error(garbage: object) -> None:
    with pytest.raises(ValueError, match=r"`config\.vdneuron` is damaged"):
        PrunedStructure.from_json(garbage).apply_(SKELETON)


def test_huge_garbage_makes_a_short_message() -> None:
    path = "x" * 10**6
    hostile = VALID | {"shapes": {f"{path}{index}": [10**12] * 100 for index in range(20)}}
    with pytest.raises(ValueError, match="damaged") as error:
        PrunedStructure.from_json(hostile).apply_(SKELETON)
    assert len(str(error.value)) < 300


def test_hostile_config_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    config.vdneuron = VALID | {"shapes": {QUERY: [-1, HIDDEN]}}
    monkeypatch.setattr(BertModel, "__init__", lambda *_: pytest.fail("the native model was built"))
    with pytest.raises(ValueError, match="damaged"):
        pruned_class(BertModel)(config)


def test_uncut_model_stays_native() -> None:
    dense = dense_model("bert")
    assert as_pruned_model_(dense) is dense
    assert type(dense) is BertModel
    assert not hasattr(dense.config, "vdneuron")


def test_model_can_be_cut_again() -> None:
    pruned = pruned_model()
    cls, structure = type(pruned), pruned.config.vdneuron
    assert as_pruned_model_(pruned).config.vdneuron == structure
    cut_(pruned, (([1], [0]), ([], []), ([], [])))
    assert as_pruned_model_(pruned).config.vdneuron != structure
    assert type(pruned) is cls is pruned_class(cls) is pruned_class(BertForSequenceClassification)
    assert PrunedStructure.from_config(pruned.config).shapes[QUERY] == (4, HIDDEN)
    assert pruned.bert.encoder.layer[2].attention.self.num_attention_heads == 0
    assert outputs(pruned, batch()).isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.bert.encoder.layer[0].intermediate, "dense", nn.Linear(HIDDEN, 2 * NEURONS)),
        lambda model: model.bert.encoder.layer[0].intermediate.dense.register_buffer("log_var", torch.zeros(1)),
        lambda model: setattr(model.bert.encoder.layer[0].output, "LayerNorm", nn.LayerNorm(2)),
        lambda model: model.bert.encoder.layer.append(model.bert.encoder.layer[0]),
        lambda model: setattr(model.bert.encoder.layer[0].attention.self, "num_attention_heads", HEADS + 1),
    ],
    ids=["larger_layer", "extra_tensor", "smaller_norm", "extra_layer", "larger_attribute"],
)
def test_other_changes_cannot_be_saved(change: Callable[[nn.Module], object]) -> None:
    model = cut_(dense_model("bert", "sequence_classification"))
    change(model)
    with pytest.raises(ValueError, match=r"`config\.vdneuron` is damaged|cannot be saved"):
        as_pruned_model_(model)
    assert type(model) is BertForSequenceClassification
    assert not hasattr(model.config, "vdneuron")


@families
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_model_can_be_duplicated(family: str, duplicate: Callable[[PrunedModel], PrunedModel]) -> None:
    pruned = pruned_model(family)
    twin = duplicate(pruned)
    assert type(twin) is type(pruned)
    assert type(twin.base_model) is type(pruned.base_model)
    assert torch.equal(outputs(twin, batch()), outputs(pruned, batch()))


@families
@pytest.mark.parametrize("head", AUTO_CLASSES)
def test_new_model_is_initialized(family: str, head: str) -> None:
    pruned = pruned_model(family, head)
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    try:
        new = type(pruned)(pruned.config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert shapes(new) == shapes(pruned)
    assert all(tensor.isfinite().all() for tensor in new.state_dict().values())
    assert outputs(new.eval(), batch()).isfinite().all()


def test_model_keeps_native_manners() -> None:
    pruned = pruned_model()
    assert isinstance(pruned, PrunedModel)
    assert isinstance(pruned.bert, PrunedModel)
    assert isinstance(pruned, BertForSequenceClassification)
    assert type(pruned).__name__ == "BertForSequenceClassification"
    assert type(pruned).config_class is type(pruned.config)
    type(pruned).register_for_auto_class("AutoModelForSequenceClassification")  # as loading by remote code does
    assert not pruned.is_custom_code()
    pruned.set_attn_implementation("eager")
    assert pruned.bert.encoder.layer[1].attention.self.config._attn_implementation == "eager"


def test_module_offers_every_model_class() -> None:
    assert modeling_vdneuron.BertModel is pruned_class(BertModel)
    members = auto_class_members(CONFIGS["bert"])
    assert members["AutoModel"] == "BertModel"
    assert members["AutoModelForMaskedLM"] == "BertForMaskedLM"
    assert all(issubclass(getattr(modeling_vdneuron, name), PrunedModel) for name in members.values())


@pytest.mark.parametrize("name", ["BertConfig", "NoSuchModel", "utils", "__path__"])
def test_module_offers_nothing_else(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(modeling_vdneuron, name)


def decoder(**settings: Any) -> BertLMHeadModel:
    config = copy.deepcopy(CONFIGS["bert"])
    config.update({"is_decoder": True, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0} | settings)
    return randomised_(BertLMHeadModel(config))


@implementations
@pytest.mark.parametrize(
    "cache",
    [{}, {"cache_implementation": "static"}, {"cache_implementation": "static", "prefill_chunk_size": 2}],
    ids=["dynamic", "static", "static_in_chunks"],
)
def test_generation_with_cache_equals_generation_without(implementation: str, cache: dict[str, Any]) -> None:
    model = as_pruned_model_(cut_(decoder(), (([], []), ([1], [0]), ([], [2]))))
    model.set_attn_implementation(implementation)
    prompt = batch()
    prompt["attention_mask"] = prompt["attention_mask"].flip(1)  # padded on the left, to miss by a wrong length
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**prompt, use_cache=False, **options)
    cached = model.generate(**prompt, disable_compile=True, **cache, **options)
    assert torch.equal(cached.sequences, expected.sequences)
    torch.testing.assert_close(cached.logits, expected.logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_cross_attention_without_heads_keeps_its_place_in_the_cache() -> None:
    model = decoder(add_cross_attention=True)
    attention = model.bert.encoder.layer[0].crossattention
    dense = copy.deepcopy(model)
    dense.bert.encoder.layer[0].crossattention.output.dense.weight.zero_()
    for maker in (attention.self.query, attention.self.key, attention.self.value):
        select_(maker, 0, [])
    select_(attention.output.dense, 1, [])
    attention.self.num_attention_heads = attention.self.all_head_size = 0
    as_pruned_model_(model)
    ids, states = batch()["input_ids"], torch.randn(2, 3, HIDDEN)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    start = model(ids[:, :4], encoder_hidden_states=states, past_key_values=cache, use_cache=True).logits
    end = model(ids[:, 4:], encoder_hidden_states=states, past_key_values=cache, use_cache=True).logits
    expected = dense(ids, encoder_hidden_states=states, use_cache=False).logits
    torch.testing.assert_close(torch.cat([start, end], 1), expected, atol=TOLERANCE, rtol=0)
    assert cache.self_attention_cache.get_seq_length() == ids.shape[1]
    assert cache.cross_attention_cache.layers[0].keys.shape == (2, 1, 3, 1)  # whisper takes it apart layer by layer
    model.set_attn_implementation("eager")
    output = model(ids, encoder_hidden_states=states, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, n, 6, 3) for n in (0, HEADS, HEADS)]
