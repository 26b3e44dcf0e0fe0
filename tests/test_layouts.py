"""Rows and columns of heads and neurons, written out one by one, and models whose heads cannot be told apart."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from zoo import HEADS, KEYS, NEURONS, ROWS, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.sublayers import Role, Slice, Sublayer


SIZE = 4  # of a head
LENGTH = 8


def block(model: PreTrainedModel, end: str) -> Sublayer:
    return next(sublayer for sublayer in find_sublayers(model) if sublayer.path.endswith(end))


def rows_of(sublayer: Sublayer, role: Role, unit: int) -> list[int]:
    part: Slice = next(part for part in sublayer.slices if part.role is role)
    return part.features(torch.tensor([unit])).flatten().tolist()


def span(first: int, size: int) -> list[int]:
    return list(range(first, first + size))


#: Rows of queries, keys and values of the second unit.
SECOND_UNIT = {
    "bert": (span(4, 4), span(4, 4), span(4, 4)),
    "llama": (span(8, 8), span(4, 4), span(4, 4)),  # two heads share a key
    "gpt2": (span(4, 4), span(16 + 4, 4), span(32 + 4, 4)),  # all queries, all keys, all values
    "modernbert": (span(4, 4), span(16 + 4, 4), span(32 + 4, 4)),
    "phi3": (span(8, 8), span(16 + 4, 4), span(16 + 8 + 4, 4)),
    "gpt_neox": (span(12, 4), span(16, 4), span(20, 4)),  # head after head
    "deberta": (span(12, 4), span(16, 4), span(20, 4)),
    "bloom": (span(12, 4), span(16, 4), span(20, 4)),
    "falcon": (span(12, 4), span(16, 4), span(20, 4)),
    "falcon_grouped": (span(16, 8), span(24, 4), span(28, 4)),
}


@pytest.mark.parametrize("row", SECOND_UNIT)
def test_rows_of_a_head(row: str) -> None:
    sublayer = block(zoo_model(row), "attention")
    found = tuple(rows_of(sublayer, role, 1) for role in (Role.QUERY, Role.KEY, Role.VALUE))
    assert found == SECOND_UNIT[row]
    wide = len(SECOND_UNIT[row][0])
    assert rows_of(sublayer, Role.ATTENTION_OUTPUT, 1) == span(wide, wide)


def test_one_key_for_all_heads_makes_one_unit() -> None:
    sublayer = block(zoo_model("falcon_multi_query"), "attention")
    assert sublayer.num_units == 1
    assert rows_of(sublayer, Role.QUERY, 0) == span(0, HEADS * SIZE)
    assert rows_of(sublayer, Role.VALUE, 0) == span(HEADS * SIZE + SIZE, SIZE)


@pytest.mark.parametrize(
    ("row", "gate", "neuron"), [("llama", 5, 5), ("phi3", 5, NEURONS + 5), ("modernbert", 5, NEURONS + 5)]
)
def test_rows_of_a_gated_neuron(row: str, gate: int, neuron: int) -> None:
    sublayer = block(zoo_model(row), "feed_forward")
    assert (rows_of(sublayer, Role.GATE, 5), rows_of(sublayer, Role.INTERMEDIATE, 5)) == ([gate], [neuron])
    assert rows_of(sublayer, Role.OUTPUT, 5) == [5]
    assert not sublayer.foldable


@pytest.mark.parametrize(
    ("row", "foldable"), [("llama", False), ("llama_biased", True), ("qwen2", False), ("gpt_neo", True)]
)
def test_constants_need_a_bias_to_go_to(row: str, foldable: bool) -> None:
    assert block(zoo_model(row), "attention").foldable is foldable


def test_shared_layers_cost_one_set_of_weights_and_all_their_passes() -> None:
    model = zoo_model("albert")  # three passes through two modules
    first, *_, last = find_sublayers(model)
    assert (first.repeats, last.repeats) == (2, 1)
    costs = Costs(model, length=LENGTH)
    gone = {"attention": 4 * 16 * SIZE, "feed_forward": 2 * 16}  # weights of one unit
    for end, weights in gone.items():
        sublayer = block(model, end)
        one_less = {sublayer.path: sublayer.num_units - 1}
        pairs = 2 * LENGTH**2 * SIZE if end == "attention" else 0
        assert costs.weights({}) - costs.weights(one_less) == weights
        assert costs.macs({}) - costs.macs(one_less) == 2 * (LENGTH * weights + pairs)


def test_a_unit_of_grouped_queries_costs_its_key_and_all_its_heads() -> None:
    model = zoo_model("llama")
    sublayer, costs = block(model, "attention"), Costs(model, length=LENGTH)
    one_less = {sublayer.path: KEYS - 1}
    weights = 16 * (8 + 4 + 4 + 8)
    assert costs.weights({}) - costs.weights(one_less) == weights
    assert costs.macs({}) - costs.macs(one_less) == LENGTH * weights + 2 * LENGTH**2 * 8


def test_neurons_behind_a_padded_convolution_end_where_they_are_read() -> None:
    sublayer = block(zoo_model("segformer"), "feed_forward")
    assert not sublayer.foldable
    assert rows_of(sublayer, Role.DEPTHWISE, 5) == [5]
    model = zoo_model("segformer")
    none = torch.ones(2, sublayer.num_units, dtype=torch.bool)
    none[1] = False
    with pytest.raises(ValueError, match="cannot run with fewer than 1"):
        prune_model_(model, RelevanceMask({sublayer.path: none}))
    assert find_sublayers(model) == find_sublayers(zoo_model("segformer"))


@pytest.mark.parametrize("side", ["text", "vision"])
@pytest.mark.parametrize("pair", ["clip", "siglip"])
def test_one_tower_of_two(pair: str, side: str) -> None:
    both = zoo_model(pair)
    tower = type(getattr(both, f"{side}_model"))(getattr(both.config, f"{side}_config"))
    found = [f"{side}_model.{sublayer.path}" for sublayer in find_sublayers(tower)]
    assert found == [sublayer.path for sublayer in find_sublayers(both) if sublayer.path.startswith(side)]


@pytest.mark.parametrize("pair", ["clip", "siglip"])
def test_one_tower_of_two_classifies_images(pair: str) -> None:
    """Models of the type of both whose texts were never there."""
    config = AutoConfig.for_model(pair, **ROWS[pair].settings)
    found = find_sublayers(AutoModelForImageClassification.from_config(config))
    both = [sublayer for sublayer in find_sublayers(zoo_model(pair)) if sublayer.path.startswith("vision")]
    assert found == both


def build(row: str, **changes: Any) -> PreTrainedModel:
    return AutoModel.from_config(AutoConfig.for_model(ROWS[row].model_type, **{**ROWS[row].settings, **changes}))


@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        ("deberta", {"talking_head": True}, "its `talking_head` mixes them"),
        ("bloom", {"slow_but_exact": True}, "its `slow_but_exact` mixes them"),
        ("olmo2", {"attention_bias": True}, "`attention_bias=False`"),
    ],
    ids=["talking heads", "slices in parallel", "biases in a norm over all heads"],
)
def test_heads_that_cannot_be_told_apart_are_refused(row: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be removed exactly.*{reason}"):
        find_sublayers(build(row, **changes))


@pytest.mark.parametrize(
    ("row", "auto"), [("bart", "AutoModelForCausalLM"), ("t5", "AutoModelForTextEncoding")], ids=["decoder", "encoder"]
)
def test_half_of_an_encoder_decoder(row: str, auto: str) -> None:
    """Models of the same type that lack the encoder or the decoder."""
    config = AutoConfig.for_model(row, **ROWS[row].settings)
    model = getattr(transformers, auto).from_config(config)
    whole = {sublayer.path for sublayer in find_sublayers(zoo_model(row))}
    found = {sublayer.path for sublayer in find_sublayers(model)}
    assert found
    assert found < whole
