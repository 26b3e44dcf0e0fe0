"""What holds for every row of the table: pruned = masked, costs, gradients, a posterior in closed form, more training.

Each row is a tiny model of its own; whoever adds a row to the table adds one to `zoo`, and gets all of this.
"""

import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import trained_posterior_
from torch import Tensor
from transformers import PreTrainedModel
from zoo import (
    INSTALLED,
    ROWS,
    SINCE,
    TOLERANCE,
    any_mask,
    assert_alike,
    attentions,
    auto_class,
    logits,
    masks,
    zoo_batch,
    zoo_model,
)

from hf_vdneuron.architectures import ARCHITECTURES, find_sublayers
from hf_vdneuron.budget import Costs, speedup, unit_counts
from hf_vdneuron.config import Grouping, VDConfig
from hf_vdneuron.elbo import kl_divergence, set_variational_, variational_layers
from hf_vdneuron.experts import ExpertMatrix
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.modeling_vdneuron import PrunedModel
from hf_vdneuron.one_shot import sparsify
from hf_vdneuron.patching import patch_model_, unpatch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import relevance_mask
from hf_vdneuron.sublayers import Role, Unit


LENGTH = 8
QUERIES_AND_KEYS = (Role.QUERY, Role.KEY)

rows = pytest.mark.parametrize("row", ROWS)


def test_zoo_covers_the_table() -> None:
    towers = {f"{pair}_{side}_model" for pair in ("clip", "siglip") for side in ("text", "vision")}
    built_otherwise = {"dinov2"} if SINCE["dinov2"] > INSTALLED else set()
    assert {row.model_type for row in ROWS.values()} | towers | built_otherwise == set(ARCHITECTURES)


@rows
def test_units_are_found_in_every_layer(row: str) -> None:
    model = zoo_model(row)
    sublayers = find_sublayers(model)
    expected = {Unit.HEAD: ROWS[row].heads, Unit.NEURON: ROWS[row].neurons}
    assert [sublayer.num_units for sublayer in sublayers] == [expected[sublayer.unit] for sublayer in sublayers]
    assert {sublayer.unit for sublayer in sublayers} == {unit for unit, count in expected.items() if count}
    for sublayer in sublayers:
        for path, name, factor in sublayer.attributes:
            assert getattr(model.get_submodule(path), name) == factor * sublayer.num_units


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Compute flexible attention as it is written: to compile it takes a minute and says nothing of heads."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@rows
@pytest.mark.usefixtures("eagerly")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # by torch itself
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # by transformers
def test_pruned_equals_masked(row: str) -> None:
    for attention in attentions(row):
        dense = zoo_model(row, attention)
        before = logits(dense)
        chosen = masks(dense)
        if attention != "eager":  # which differ in what they do with heads, and not in what is left of them
            chosen = {name: chosen[name] for name in ("ragged", "first_empty")}
        for name, mask in chosen.items():
            masked = mask_model_(deepcopy(dense), mask)
            expected = logits(masked)
            assert (expected - before).abs().max() > 0.01, (name, attention)
            pruned = prune_model_(masked, mask)
            assert_alike(logits(pruned), expected, f"{name} {attention}")


@rows
@given(seed=st.integers(0, 2**31))
@settings(max_examples=4)
def test_pruned_equals_masked_for_any_mask(row: str, seed: int) -> None:
    dense = zoo_model(row)
    mask = any_mask(dense, seed)
    expected = logits(mask_model_(deepcopy(dense), mask))
    assert_alike(logits(prune_model_(dense, mask)), expected)


@rows
def test_costs_are_those_of_what_is_left(row: str) -> None:
    dense = zoo_model(row)
    costs = Costs(dense, length=LENGTH)
    for mask in masks(dense).values():
        pruned = prune_model_(deepcopy(dense), mask)
        counts = unit_counts(costs.sublayers, mask)
        assert [sublayer.num_units for sublayer in find_sublayers(pruned)] == list(counts.values())
        assert costs.parameters(counts) == pruned.num_parameters() < dense.num_parameters()
        assert costs.macs(counts) == Costs(pruned, length=LENGTH).macs({}) < costs.macs({})


@rows
def test_pruning_twice_equals_pruning_at_once(row: str) -> None:
    model = zoo_model(row)
    first, then = (masks(model)[name].keep for name in ("first_empty", "last_empty"))
    both = {path: torch.where(keep.all(0), then[path], keep) for path, keep in first.items()}
    at_once = prune_model_(deepcopy(model), RelevanceMask(both))
    left = {part.path: RelevanceMask(first).units_left(part) for part in find_sublayers(model)}
    rest = RelevanceMask({path: keep[:, left[path]] for path, keep in both.items()})
    twice = prune_model_(prune_model_(model, RelevanceMask(first)), rest)
    assert twice.config.vdneuron == at_once.config.vdneuron
    torch.testing.assert_close(logits(twice), logits(at_once), rtol=0, atol=TOLERANCE)


def _weight_name(path: str, layer: VariationalLayer) -> str:
    return f"{path.rpartition('.')[0]}.{layer.name}" if isinstance(layer, ExpertMatrix) else f"{path}.weight"


@rows
def test_divergence_reaches_exactly_what_is_variational(row: str) -> None:
    model = patch_model_(zoo_model(row)).train()
    set_variational_(model, noise=True, collect_kl=True)
    loss = model(**zoo_batch(model)).loss
    divergence = kl_divergence(model)
    assert loss.isfinite()
    assert divergence.isfinite()
    divergence.backward(retain_graph=True)
    layers = variational_layers(model)
    own = {f"{path}.{name}" for path in layers for name in ("log_var", "group_scale")}
    own |= {_weight_name(path, layer) for path, layer in layers.items()}
    assert {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()} == own
    model.zero_grad()
    loss.backward()
    assert {name for name in own if not model.get_parameter(name).grad.any()} == set()


@rows
def test_patched_model_is_cut_to_its_own_mask(row: str) -> None:
    model = patch_model_(zoo_model(row))
    before = logits(model)
    torch.testing.assert_close(before, logits(zoo_model(row)), rtol=0, atol=TOLERANCE)
    mask = relevance_mask(trained_posterior_(model))
    mask_model_(model, mask)
    assert all(torch.equal(keep, mask.keep[path]) for path, keep in read_mask(model).keep.items())
    expected = logits(model)
    assert (expected - before).abs().max() > 0.01
    units = unit_counts(find_sublayers(model), mask)
    torch.testing.assert_close(logits(prune_model_(model)), expected, rtol=0, atol=TOLERANCE)
    assert [sublayer.num_units for sublayer in find_sublayers(model)] == list(units.values())
    assert type(model).__name__ == type(zoo_model(row)).__name__
    assert not variational_layers(model)


@rows
def test_unpatched_model_is_the_one_before(row: str) -> None:
    model = unpatch_model_(patch_model_(zoo_model(row)))
    assert [type(module) for module in model.modules()] == [type(module) for module in zoo_model(row).modules()]
    assert torch.equal(logits(model), logits(zoo_model(row)))


@rows
def test_sparsified_in_one_shot(row: str) -> None:
    dense = zoo_model(row)
    small = sparsify(dense, [zoo_batch(dense)], target_speedup=1.5, max_length=LENGTH)
    nothing = RelevanceMask({})
    assert Costs(dense, length=LENGTH).macs({}) / Costs(small, length=LENGTH).macs({}) >= 1.5
    assert speedup(small, nothing, length=LENGTH) == 1
    assert logits(small).isfinite().all()


def one_step(model: PreTrainedModel) -> Tensor:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(**zoo_batch(model)).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


@rows
def test_training_goes_on_without_any_unit(row: str) -> None:
    model = zoo_model(row)
    prune_model_(model, masks(model)["all_empty"])
    assert isinstance(model, PrunedModel)
    assert isinstance(model, auto_class(row)._model_mapping[type(model.config)])
    before = logits(model)
    assert one_step(model).isfinite()
    after = logits(model)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    assert torch.equal(logits(deepcopy(model)), after)


# ConvNeXt has none, and Swin tells only of the last layer of a stage.
@pytest.mark.parametrize("row", sorted(row for row in ROWS if ROWS[row].heads and row != "swin"))
def test_attentions_are_told_of_every_layer(row: str) -> None:
    model = zoo_model(row)
    mask = masks(model)["first_empty"]
    left = []
    for sublayer in find_sublayers(model):
        if sublayer.unit is Unit.HEAD:
            heads_per_unit = sublayer.out_side.slices[0].size // sublayer.sides[0].slices[0].size
            left += [heads_per_unit * len(mask.kept_units(sublayer))] * sublayer.repeats
    found = prune_model_(model, mask)(**zoo_batch(model), output_attentions=True)
    names = ("encoder_attentions", "attentions", "decoder_attentions", "cross_attentions")
    towers = [found.get(name) or {} for name in ("text_model_output", "vision_model_output")]
    weights = [layer for output in (found, *towers) for name in names for layer in output.get(name) or ()]
    assert sorted(layer.shape[1] for layer in weights) == sorted(left)
    assert 0 in left


@pytest.mark.parametrize("row", ["bloom", "gpt2", "phi3", "t5"])
@pytest.mark.parametrize(
    "duplicate", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_stand_ins_can_be_duplicated(row: str, duplicate: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    for mask in masks(zoo_model(row)).values():
        model = prune_model_(zoo_model(row), mask)
        twin = duplicate(model)
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(logits(twin), logits(model))


@rows
def test_queries_and_keys_can_be_variational_too(row: str) -> None:
    model = patch_model_(zoo_model(row), VDConfig(grouping=Grouping.COUPLED, query_key=True)).train()
    set_variational_(model, noise=True, collect_kl=True)
    assert model(**zoo_batch(model)).loss.isfinite()
    assert kl_divergence(model).isfinite()
    made = {
        part.module for sublayer in find_sublayers(model) for part in sublayer.slices if part.role in QUERIES_AND_KEYS
    }
    assert made <= variational_layers(model).keys()
    mask = relevance_mask(trained_posterior_(model))
    expected = logits(mask_model_(model, mask))
    torch.testing.assert_close(logits(prune_model_(model)), expected, rtol=0, atol=TOLERANCE)
