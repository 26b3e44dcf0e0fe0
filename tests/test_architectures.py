"""The table finds every head and neuron of each family, with or without a head, however many are left."""

from copy import deepcopy

import pytest
import torch
from models import (
    AUTO_CLASSES,
    CHAINS,
    FAMILIES,
    HEAD_SIZE,
    HIDDEN,
    LAYERS,
    NEURONS,
    mask_of,
    mixed_keep,
    places,
    tiny_decoder,
    tiny_model,
)
from torch import nn
from transformers import PreTrainedModel, XLNetConfig, XLNetModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.chains import find_chain_sublayers
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.sublayers import Axis, Role, SideName, Slice, Sublayer, Unit


def require_as_written(sublayer: Sublayer, model: PreTrainedModel) -> None:
    """Compare a sub-layer with where it is known to lie."""
    place = places(model)[sublayer.path]
    made, read = (Role.VALUE, Role.ATTENTION_OUTPUT), (Role.INTERMEDIATE, Role.OUTPUT)
    in_role, out_role = made if sublayer.unit is Unit.HEAD else read
    rows = Slice(place.rows, in_role, Axis.OUT, place.num_rows)
    columns = Slice(place.columns, out_role, Axis.IN, place.num_columns)
    assert sublayer.num_units == place.num_units
    assert [side.name for side in sublayer.sides] == [SideName.IN, SideName.OUT]
    assert [side.slices for side in sublayer.sides] == [(rows,), (columns,)]
    assert tuple(part.module for part in sublayer.companions) == place.companions
    assert sublayer.foldable


@pytest.mark.parametrize("head", AUTO_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_units_are_found_in_order(family: str, head: str) -> None:
    model = tiny_model(family, head)
    sublayers = find_sublayers(model)
    assert [sublayer.path for sublayer in sublayers] == list(places(model))
    assert [sublayer.unit for sublayer in sublayers] == [Unit.HEAD, Unit.NEURON] * LAYERS
    for sublayer in sublayers:
        require_as_written(sublayer, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_hold_all_linear_layers_of_the_encoder(family: str) -> None:
    model = tiny_model(family)
    root = "transformer.layer" if family == "distilbert" else "encoder.layer"
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and root in name}
    assert {part.module for sublayer in find_sublayers(model) for part in sublayer.matrices} == linear


@pytest.mark.parametrize("family", FAMILIES)
def test_attributes_are_what_the_model_holds(family: str) -> None:
    model = tiny_model(family)
    heads = [sublayer for sublayer in find_sublayers(model) if sublayer.unit is Unit.HEAD]
    held = [
        (getattr(model.get_submodule(path), name), factor * sublayer.num_units)
        for sublayer in heads
        for path, name, factor in sublayer.attributes
    ]
    assert len(held) == 2 * LAYERS
    assert all(found == expected for found, expected in held)


def test_cross_attention_is_a_sublayer_of_decoders_only() -> None:
    decoder = tiny_decoder()
    sublayers = find_sublayers(decoder)
    assert [sublayer.path for sublayer in sublayers] == list(places(decoder))
    assert [sublayer.unit for sublayer in sublayers] == [Unit.HEAD, Unit.HEAD, Unit.NEURON] * LAYERS
    for sublayer in sublayers:
        require_as_written(sublayer, decoder)


def test_patched_model_has_the_same_sublayers() -> None:
    model = tiny_model("bert", "sequence_classification")
    assert find_sublayers(patch_model_(deepcopy(model))) == find_sublayers(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_model_counts_what_is_left(family: str) -> None:
    model = tiny_model(family, "sequence_classification")
    keep = mixed_keep(places(model))
    first, second, *_ = keep
    keep[first][:], keep[second][:] = False, False
    left = [int(kept.all(0).sum()) for kept in keep.values()]
    assert [sublayer.num_units for sublayer in find_sublayers(prune_model_(model, mask_of(keep)))] == left
    assert left[:2] == [0, 0]


def test_head_size_does_not_follow_from_the_number_of_heads_left() -> None:
    model = tiny_model("bert")
    keep = mixed_keep(places(model))
    sublayers = find_sublayers(prune_model_(model, mask_of(keep)))
    assert {part.size for sublayer in sublayers[::2] for side in sublayer.sides for part in side.slices} == {HEAD_SIZE}


def test_chain_is_found_by_its_own_rules() -> None:
    chain = CHAINS["nested"].build()
    assert find_sublayers(chain) == find_chain_sublayers(chain)


def test_unsupported_model_type_lists_those_that_are() -> None:
    model = XLNetModel(XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=2, d_inner=8))
    with pytest.raises(ValueError, match=r"`xlnet`.*albert, bart, beit.*, whisper, xlm-roberta"):
        find_sublayers(model)


def test_module_that_is_neither_model_nor_chain_is_refused() -> None:
    with pytest.raises(TypeError, match="`Linear`"):
        find_sublayers(nn.Linear(HIDDEN, NEURONS))


def test_search_changes_nothing() -> None:
    model = tiny_model("bert")
    before = deepcopy(model.state_dict())
    find_sublayers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_another_transformers_builds_otherwise_is_refused() -> None:
    model = tiny_model("bert")
    model.encoder.layer[0].intermediate.lower = model.encoder.layer[0].intermediate.dense
    del model.encoder.layer[0].intermediate.dense
    with pytest.raises(ValueError, match=r"builds models of type `bert` in another way.+has no attribute `dense`"):
        find_sublayers(model)
