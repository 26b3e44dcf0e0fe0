"""The 0.99 rule and relevance, against loops over single weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CHAINS, HEADS, LAYERS, NEURONS, Place, all_kept, mask_of, places, tiny_model, unit_masks
from torch import Tensor, nn

from hf_vdneuron.config import Grouping, VDConfig
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.masks import mask_model_
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.relevance import (
    DROPOUT_RATE_THRESHOLD,
    expected_units,
    irrelevant_weight_share,
    log_alpha_histogram,
    relevance_mask,
    unit_relevance,
)
from hf_vdneuron.sublayers import Unit


#: log(s^2 / mu^2) on either side of the rule, which cuts at log 99 = 4.6.
IRRELEVANT, RELEVANT = 4.7, 4.5


@torch.no_grad()
def randomised_posterior_(model: nn.Module) -> nn.Module:
    for layer in variational_layers(model).values():
        layer.log_var.uniform_(-6, 3)
        if layer.group_scale is not None:
            layer.group_scale.uniform_(-1.5, 1.5)
    return model


def weights_of(model: nn.Module, place: Place, side: int, unit: int) -> list[tuple[float, float]] | None:
    """Mean and variance of each weight of one side of a unit, or None if the side is not variational."""
    layer = model.get_submodule((place.rows, place.columns)[side])
    if not isinstance(layer, VariationalLayer):
        return None
    size = (place.num_rows, place.num_columns)[side]
    block = slice(unit * size, (unit + 1) * size)
    part = (block, slice(None)) if side == 0 else (slice(None), block)
    mean, var = layer.mean[part].flatten().tolist(), layer.log_var.exp()[part].flatten().tolist()
    return list(zip(mean, var, strict=True))


def loop_rule(model: nn.Module, where: dict[str, Place], threshold: float) -> dict[str, list[list[bool]]]:
    """Keep each side of each unit that is not variational or has a weight below the threshold."""
    keep: dict[str, list[list[bool]]] = {}
    for path, place in where.items():
        keep[path] = [[], []]
        for side in (0, 1):
            for unit in range(place.num_units):
                weights = weights_of(model, place, side, unit)
                keep[path][side].append(
                    weights is None or any(var / (var + mean**2) <= threshold for mean, var in weights)
                )
    return keep


def loop_relevance(model: nn.Module, place: Place, side: int, unit: int) -> float:
    weights = weights_of(model, place, side, unit)
    return math.inf if weights is None else sum(math.log1p(mean**2 / var) / 2 for mean, var in weights)


@torch.no_grad()
def end_in_the_posterior_(model: nn.Module, where: dict[str, Place], ended: dict[str, Tensor]) -> None:
    """Make every weight of the ended sides irrelevant, and exactly one weight of each other side relevant."""
    for layer in variational_layers(model).values():
        layer.log_var.copy_(layer.mean.square().log() + IRRELEVANT)
    for path, place in where.items():
        for unit in range(place.num_units):
            if not ended[path][0, unit]:
                drop_(model.get_submodule(place.rows), unit * place.num_rows, 0)
            if not ended[path][1, unit]:
                drop_(model.get_submodule(place.columns), 0, unit * place.num_columns)


def drop_(layer: nn.Module, row: int, column: int) -> None:
    if isinstance(layer, VariationalLayer):
        layer.log_var[row, column] += RELEVANT - IRRELEVANT


def test_threshold_is_that_of_the_method() -> None:
    assert DROPOUT_RATE_THRESHOLD == 0.99


@given(masks=st.tuples(*[unit_masks(HEADS), unit_masks(NEURONS)] * LAYERS))
@settings(max_examples=10)
def test_rule_ends_exactly_the_sides_without_a_relevant_weight(masks: tuple[Tensor, ...]) -> None:
    model = tiny_model("bert")
    where = places(model)
    keep = dict(zip(where, masks, strict=True))
    patch_model_(model)
    end_in_the_posterior_(model, where, {path: ~kept for path, kept in keep.items()})
    found = relevance_mask(model).keep
    expected = loop_rule(model, where, 0.99)
    assert set(found) == set(where)
    for path in where:
        # A column of one unit crosses the rows of no other here, so that the fates are what they were drawn to be.
        assert torch.equal(found[path], keep[path])
        assert found[path].tolist() == expected[path]


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("grouping", Grouping)
def test_rule_against_a_loop_over_weights(grouping: Grouping, threshold: float) -> None:
    model = tiny_model("distilbert")
    where = places(model)
    randomised_posterior_(patch_model_(model, VDConfig(grouping=grouping, query_key=True)))
    for layer in variational_layers(model).values():
        layer.log_var.data[: layer.log_var.shape[0] // 2] += 9.0
        layer.log_var.data[:, : layer.log_var.shape[1] // 2] += 9.0
    found = {path: keep.tolist() for path, keep in relevance_mask(model, threshold).keep.items()}
    assert found == loop_rule(model, where, threshold)
    assert {kept for sides in found.values() for side in sides for kept in side} == {True, False}


@pytest.mark.parametrize("name", ["nested", "zero_padded", "one_dimensional", "without_biases"])
def test_rule_ends_unfoldable_units_on_the_out_side(name: str) -> None:
    chain = CHAINS[name]
    model = patch_model_(chain.model())
    for path, place in chain.places.items():
        model.get_submodule(place.rows).log_var.data[1] += 30.0
        assert loop_rule(model, {path: place}, 0.99)[path][0][1] is False
    mask = relevance_mask(model)
    for path, keep in mask.keep.items():
        expected = torch.ones_like(keep)
        expected[int(path in chain.unfoldable), 1] = False
        assert torch.equal(keep, expected)
    mask_model_(model, mask)


def test_rule_leaves_a_convolution_its_most_relevant_channel() -> None:
    chain = CHAINS["nested"]
    model = patch_model_(chain.model())
    layer = model.get_submodule("1.0.0")
    layer.log_var.data += 30.0
    best = unit_relevance(model)["1.0.0"].amin(0).argmax()
    keep = relevance_mask(model).keep["1.0.0"].all(0)
    assert keep.nonzero().flatten().tolist() == [best]
    model.get_submodule("2.1").log_var.data += 30.0  # neurons need none
    assert not relevance_mask(model).keep["2.1"].all(0).any()


def test_query_and_key_never_suffice() -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(query_key=True))
    companions = [model.get_submodule(path) for place in places(model).values() for path in place.companions]
    assert len(companions) == 2 * LAYERS
    for layer in companions:
        layer.log_var.data.fill_(30.0)
    assert all(keep.all() for keep in relevance_mask(model).keep.values())
    assert irrelevant_weight_share(model) > 0


def test_side_without_a_posterior_is_never_irrelevant() -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(grouping="rows"))
    for layer in variational_layers(model).values():
        layer.log_var.data.fill_(30.0)
    mask, relevance = relevance_mask(model), unit_relevance(model)
    assert not any(keep[0].any() for keep in mask.keep.values())
    assert all(keep[1].all() for keep in mask.keep.values())
    assert all(nats[0].isfinite().all() and nats[1].isinf().all() for nats in relevance.values())


def test_sublayers_left_alone_stay_whole() -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(exclude=["*.layer.0.*"]))
    for layer in variational_layers(model).values():
        layer.log_var.data.fill_(30.0)
    keep = relevance_mask(model).keep
    assert [bool(keep[path].all()) for path in places(model)] == [True, True, False, False, False, False]


def test_ties_are_kept() -> None:
    chain = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    chain[0].weight.data.fill_(1.0)
    patch_model_(chain, VDConfig(initial_log_var=0.0))
    chain[0].log_var.data[1] += 1e-5
    # A dropout rate of exactly one half, and one just above.
    assert relevance_mask(chain, threshold=0.5).keep["0"][0].tolist() == [True, False]


def test_weight_of_zero_is_irrelevant_at_any_threshold() -> None:
    chain = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    chain[0].weight.data[0] = 0.0
    patch_model_(chain, VDConfig(initial_log_var=-60.0))
    assert relevance_mask(chain, threshold=0.999).keep["0"][0].tolist() == [False, True]
    assert unit_relevance(chain)["0"][0, 0] == 0


def test_masked_units_stay_irrelevant() -> None:
    model = patch_model_(tiny_model("bert"))
    keep = all_kept(places(model))
    for kept in keep.values():
        kept[0, 1], kept[1, 2] = False, False
    found = relevance_mask(mask_model_(model, mask_of(keep))).keep
    assert all(torch.equal(found[path], keep[path]) for path in keep)


@pytest.mark.parametrize("grouping", Grouping)
def test_unit_relevance_against_a_loop(grouping: Grouping) -> None:
    model = tiny_model("electra")
    where = places(model)
    randomised_posterior_(patch_model_(model, VDConfig(grouping=grouping)))
    found = unit_relevance(model)
    assert set(found) == set(where)
    for path, place in where.items():
        expected = [[loop_relevance(model, place, side, unit) for unit in range(place.num_units)] for side in (0, 1)]
        torch.testing.assert_close(found[path], torch.tensor(expected, dtype=torch.float64))


def test_unit_relevance_of_channels_against_a_loop() -> None:
    chain = CHAINS["nested"]
    model = randomised_posterior_(patch_model_(chain.model()))
    found = unit_relevance(model)
    for path, place in chain.places.items():
        expected = [[loop_relevance(model, place, side, unit) for unit in range(place.num_units)] for side in (0, 1)]
        torch.testing.assert_close(found[path], torch.tensor(expected, dtype=torch.float64))


def test_irrelevant_share_counts_single_weights() -> None:
    model = randomised_posterior_(patch_model_(CHAINS["lenet_300"].model()))
    weights = [
        (mean, log_var)
        for layer in variational_layers(model).values()
        for mean, log_var in zip(layer.mean.flatten().tolist(), layer.log_var.flatten().tolist(), strict=True)
    ]
    for threshold in (0.5, 0.9, 0.99):
        irrelevant = sum(math.exp(log_var) / (math.exp(log_var) + mean**2) > threshold for mean, log_var in weights)
        assert irrelevant_weight_share(model, threshold) == irrelevant / len(weights)
    assert 0 < irrelevant_weight_share(model, 0.5) < 1


@pytest.mark.parametrize("grouping", Grouping)
def test_expected_units_against_a_loop(grouping: Grouping) -> None:
    model = tiny_model("distilbert")
    where = places(model)
    randomised_posterior_(patch_model_(model, VDConfig(grouping=grouping)))
    found = expected_units(model)
    assert set(found) == set(where)
    for path, place in where.items():
        expected = 0.0
        for unit in range(place.num_units):
            sides = (weights_of(model, place, side, unit) for side in (0, 1))
            known = [weights for weights in sides if weights is not None]
            expected += min(sum(mean**2 / (var + mean**2) for mean, var in part) / len(part) for part in known)
        assert found[path] == pytest.approx(expected)
        assert 0 < found[path] < place.num_units


def test_sublayers_left_alone_are_expected_whole() -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(exclude=["*.layer.0.*"]))
    for layer in variational_layers(model).values():
        layer.log_var.data.fill_(30.0)
    where = places(model)
    expected = [place.num_units if ".0." in path else 0 for path, place in where.items()]
    assert [expected_units(model)[path] for path in where] == pytest.approx(expected, abs=1e-6)


def test_dense_model_has_no_irrelevant_weight() -> None:
    assert irrelevant_weight_share(tiny_model("bert")) == 0


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 99.0, math.nan])
def test_threshold_out_of_range_is_named(threshold: float) -> None:
    with pytest.raises(ValueError, match="`threshold`"):
        relevance_mask(patch_model_(CHAINS["lenet_300"].model()), threshold)


def test_dense_model_has_nothing_to_judge_by() -> None:
    with pytest.raises(ValueError, match="`patch_model_`"):
        relevance_mask(tiny_model("bert"))


def test_histogram_counts_single_weights() -> None:
    model = randomised_posterior_(patch_model_(tiny_model("bert"), VDConfig()))
    edges = torch.tensor([-4.0, 0.0, math.log(99), 8.0], dtype=torch.float64)
    expected = {Unit.HEAD: [0, 0, 0], Unit.NEURON: [0, 0, 0]}
    for path, layer in variational_layers(model).items():
        unit = Unit.HEAD if "attention" in path else Unit.NEURON
        for mean, log_var in zip(layer.mean.flatten().tolist(), layer.log_var.flatten().tolist(), strict=True):
            value = log_var - 2 * math.log(abs(mean))
            expected[unit][0 if value <= edges[1] else 1 if value <= edges[2] else 2] += 1
    counts = log_alpha_histogram(model, edges)
    assert {unit: count.tolist() for unit, count in counts.items()} == expected
    assert all(count > 0 for row in expected.values() for count in row)
    share = sum(count[2] for count in expected.values()) / sum(map(sum, expected.values()))
    assert irrelevant_weight_share(model) == share


def test_histogram_counts_masked_weights_last_and_shared_layers_once() -> None:
    chain = patch_model_(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    for layer in variational_layers(chain).values():
        layer.log_var.data.fill_(-9)
        layer.weight.data.fill_(1)
    edges = torch.tensor([-10.0, -5.0, 0.0, 5.0])
    assert log_alpha_histogram(chain, edges)[Unit.NEURON].tolist() == [12 + 20 + 10, 0, 0]
    variational_layers(chain)["0"].keep_out[0] = False
    assert log_alpha_histogram(chain, edges)[Unit.NEURON].tolist() == [12 + 20 + 10 - 3, 0, 3]


def test_a_dense_model_has_no_histogram() -> None:
    assert log_alpha_histogram(tiny_model("bert"), torch.arange(4.0)) == {}
