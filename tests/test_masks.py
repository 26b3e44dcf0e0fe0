"""Masks end units on the side they name, survive their round trips, and are refused where they do not fit."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    AUTO_CLASSES,
    CHAINS,
    FAMILIES,
    HEADS,
    LAYERS,
    NEURONS,
    Place,
    all_kept,
    batch,
    end_by_hand_,
    mask_of,
    mixed_keep,
    outputs,
    places,
    tiny_model,
    unit_masks,
)
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, VDConfig
from hf_vdneuron.elbo import set_variational_, variational_layers
from hf_vdneuron.masks import RelevanceMask, end_units, mask_model_, read_mask
from hf_vdneuron.patching import patch_model_, unpatch_model_


CHAIN = CHAINS["zero_padded"]


def same_masks(mask: RelevanceMask, keep: dict[str, Tensor]) -> bool:
    return set(mask.keep) == set(keep) and all(torch.equal(mask.keep[path], keep[path]) for path in keep)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("head", AUTO_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_model_is_zeroed_as_by_hand(family: str, head: str) -> None:
    model = tiny_model(family, head)
    keep = mixed_keep(places(model))
    by_hand = end_by_hand_(deepcopy(model), places(model), keep)
    assert not same_weights(model, by_hand)
    assert mask_model_(model, mask_of(keep)) is model
    assert same_weights(model, by_hand)


@pytest.mark.parametrize("name", CHAINS)
def test_chain_is_zeroed_as_by_hand(name: str) -> None:
    chain = CHAINS[name]
    model = chain.model()
    keep = mixed_keep(chain.places, chain.unfoldable)
    by_hand = end_by_hand_(deepcopy(model), chain.places, keep)
    assert not same_weights(model, by_hand)
    assert same_weights(mask_model_(model, mask_of(keep)), by_hand)


@pytest.mark.parametrize("name", ["nested", "without_biases", "zero_padded", "one_dimensional"])
def test_patched_chain_computes_as_zeroed_by_hand(name: str) -> None:
    chain = CHAINS[name]
    keep = mixed_keep(chain.places, chain.unfoldable)
    by_hand = end_by_hand_(chain.model(), chain.places, keep)
    patched = mask_model_(patch_model_(chain.model()), mask_of(keep))
    assert torch.equal(outputs(patched, chain.inputs()), outputs(by_hand, chain.inputs()))


@pytest.mark.parametrize("grouping", Grouping)
def test_patched_model_computes_as_zeroed_by_hand(grouping: Grouping) -> None:
    model = tiny_model("bert")
    keep = mixed_keep(places(model))
    by_hand = end_by_hand_(deepcopy(model), places(model), keep)
    assert not torch.equal(outputs(model, batch()), outputs(by_hand, batch()))
    patched = patch_model_(model, VDConfig(grouping=grouping))
    weights = {name: layer.weight.clone() for name, layer in variational_layers(patched).items()}
    mask_model_(patched, mask_of(keep))
    assert torch.equal(outputs(patched, batch()), outputs(by_hand, batch()))
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in variational_layers(patched).items())
    assert same_weights(by_hand, unpatch_model_(patched))


def test_ended_units_are_silent_under_noise() -> None:
    chain = CHAINS["lenet_300"]
    keep = all_kept(chain.places)
    keep["3"][1] = False
    model = mask_model_(patch_model_(chain.model(), VDConfig(initial_log_var=2.0)), mask_of(keep)).train()
    set_variational_(model, noise=True, collect_kl=False)
    # Nothing reads the second hidden layer any more, so the noise of the first two layers cannot be heard.
    torch.testing.assert_close(model(chain.inputs()), model[-1].bias.expand(3, 3), rtol=0, atol=1e-12)


@given(masks=st.tuples(*[unit_masks(HEADS), unit_masks(NEURONS)] * LAYERS))
@settings(max_examples=10)
def test_mask_of_a_patched_model_reads_back(masks: tuple[Tensor, ...]) -> None:
    model = patch_model_(tiny_model("distilbert"))
    keep = dict(zip(places(model), masks, strict=True))
    assert same_masks(read_mask(mask_model_(model, mask_of(keep))), keep)


@pytest.mark.parametrize("grouping", Grouping)
def test_mask_reads_back_under_every_grouping(grouping: Grouping) -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(grouping=grouping))
    keep = mixed_keep(places(model))
    assert same_masks(read_mask(mask_model_(model, mask_of(keep))), keep)


@pytest.mark.parametrize("grouping", Grouping)
def test_mask_of_a_chain_reads_back(grouping: Grouping) -> None:
    # Its last layer is nobody's in-side.
    chain = CHAINS["without_biases"]
    keep = mixed_keep(chain.places, chain.unfoldable)
    model = patch_model_(chain.model(), VDConfig(grouping=grouping))
    assert same_masks(read_mask(mask_model_(model, mask_of(keep))), keep)


def test_mask_of_heads_only_says_nothing_of_neurons() -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(neurons=False))
    keep = mixed_keep({path: place for path, place in places(model).items() if place.num_units == HEADS})
    assert same_masks(read_mask(mask_model_(model, mask_of(keep))), keep)


def test_patched_model_keeps_everything_at_first() -> None:
    model = patch_model_(tiny_model("bert"))
    assert same_masks(read_mask(model), all_kept(places(model)))


def test_dense_model_carries_no_mask() -> None:
    assert read_mask(tiny_model("bert")).keep == {}


def test_later_mask_replaces_an_earlier_one() -> None:
    model = patch_model_(tiny_model("bert"))
    before = outputs(model, batch())
    mask_model_(model, mask_of(mixed_keep(places(model))))
    assert not torch.equal(outputs(model, batch()), before)
    mask_model_(model, mask_of(all_kept(places(model))))
    assert torch.equal(outputs(model, batch()), before)


def test_both_masks_keep_what_each_keeps() -> None:
    def row(*kept: bool) -> Tensor:
        return torch.tensor([kept])

    both = RelevanceMask({"a": row(True, False), "b": row(True)}) & RelevanceMask({
        "a": row(True, True),
        "c": row(False),
    })
    assert {path: keep.tolist() for path, keep in both.keep.items()} == {
        "a": [[True, False]],
        "b": [[True]],
        "c": [[False]],
    }


def test_sublayers_that_a_mask_does_not_name_stay() -> None:
    model = tiny_model("bert")
    dense = deepcopy(model)
    first, *others = places(model)
    mask_model_(model, RelevanceMask({first: torch.zeros(2, HEADS, dtype=torch.bool)}))
    for path in (path for other in others for path in (places(model)[other].rows, places(model)[other].columns)):
        assert torch.equal(model.get_submodule(path).weight, dense.get_submodule(path).weight)
    assert not same_weights(model, dense)


def test_mask_survives_the_state_dict_of_a_patched_model() -> None:
    model = patch_model_(tiny_model("bert"))
    keep = mixed_keep(places(model))
    mask_model_(model, mask_of(keep))
    other = patch_model_(tiny_model("bert"))
    other.load_state_dict(model.state_dict())
    assert same_masks(read_mask(other), keep)
    assert torch.equal(outputs(other, batch()), outputs(model, batch()))


def test_kept_units_have_all_their_sides() -> None:
    sublayer = find_sublayers(tiny_model("bert"))[0]
    mask = RelevanceMask({sublayer.path: torch.tensor([[True, False, True, False], [True, True, False, False]])})
    assert mask.kept_units(sublayer).tolist() == [0]
    assert RelevanceMask({}).kept_units(sublayer).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        pytest.param({"7": torch.ones(2, 2, dtype=torch.bool)}, "`7`, which the model lacks.*0, 3", id="unknown"),
        pytest.param({"0": torch.ones(2, 5, dtype=torch.bool)}, r"`0` has shape \(2, 5\)", id="units"),
        pytest.param({"0": torch.ones(4, dtype=torch.bool)}, r"`0` has shape \(4,\)", id="sides"),
        pytest.param({"0": torch.ones(2, 4)}, "torch.float32", id="dtype"),
        pytest.param(
            {"0": torch.tensor([[True, True, False, True], [True] * 4])}, "`0` zeroes units on the in-side", id="side"
        ),
    ],
)
def test_mask_that_does_not_fit_changes_nothing(keep: dict[str, Tensor], message: str) -> None:
    model = CHAIN.model()
    with pytest.raises(ValueError, match=message):
        mask_model_(model, RelevanceMask(keep))
    assert same_weights(model, CHAIN.model())


@pytest.mark.parametrize("sides", [pytest.param([0, 1], id="both"), pytest.param([1], id="out_side")])
def test_unfoldable_units_may_end_on_the_out_side(sides: list[int]) -> None:
    keep = torch.ones(2, 4, dtype=torch.bool)
    keep[sides, 1] = False
    RelevanceMask({"0": keep}).require_fits(find_sublayers(CHAIN.model()))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        pytest.param(
            Place("0", "3", 4), [[True, False, True, False], [True, True, False, False]], id="foldable_as_they_ended"
        ),
        pytest.param(CHAIN.places["0"], [[True] * 4, [True, False, False, False]], id="unfoldable_on_the_out_side"),
    ],
)
def test_ended_sides_become_a_mask(where: Place, expected: list[list[bool]]) -> None:
    chain = CHAIN if where is CHAIN.places["0"] else CHAINS["one_dimensional"]
    sublayer = find_sublayers(chain.model())[0]
    ended = torch.tensor([[False, True, False, True], [False, False, True, True]])
    keep = end_units(sublayer, ended)
    assert keep.tolist() == expected
    RelevanceMask({sublayer.path: keep}).require_fits([sublayer])
