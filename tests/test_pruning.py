"""Pruned = masked, whatever is removed; and what is left is smaller, plain and goes on training."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ATTENTIONS,
    AUTO_CLASSES,
    CHAINS,
    DEVICES,
    FAMILIES,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    LAYERS,
    NEURONS,
    Chain,
    all_kept,
    batch,
    end_by_hand_,
    mask_of,
    mixed_keep,
    outputs,
    places,
    tiny_decoder,
    tiny_model,
    trained_posterior_,
    unit_masks,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, VDConfig
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.modeling_vdneuron import PrunedModel
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import relevance_mask


#: Largest difference in float64, where only a real error can be larger, and in float32.
EXACT, SINGLE = 1e-10, 1e-5

MASKS = st.tuples(*[unit_masks(HEADS), unit_masks(NEURONS)] * LAYERS)


def nothing_left(model: PreTrainedModel, sides: list[int]) -> dict[str, Tensor]:
    keep = all_kept(places(model))
    for kept in keep.values():
        kept[sides] = False
    return keep


def require_pruned_equals_masked(model: PreTrainedModel, keep: dict[str, Tensor], *, atol: float = EXACT) -> None:
    inputs = batch()
    masked = outputs(end_by_hand_(deepcopy(model), places(model), keep), inputs)
    pruned = prune_model_(model, mask_of(keep))
    torch.testing.assert_close(outputs(pruned, inputs), masked, rtol=0, atol=atol)
    assert [sublayer.num_units for sublayer in find_sublayers(pruned)] == [
        int(kept.all(0).sum()) for kept in keep.values()
    ]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("head", AUTO_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
@given(masks=MASKS)
@settings(max_examples=4)
def test_pruned_equals_masked(family: str, head: str, attention: str, masks: tuple[Tensor, ...]) -> None:
    model = tiny_model(family, head, attention=attention)
    require_pruned_equals_masked(model, dict(zip(places(model), masks, strict=True)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_masked_in_single_precision(family: str, attention: str) -> None:
    model = tiny_model(family, "sequence_classification", attention=attention, dtype=torch.float32)
    require_pruned_equals_masked(model, mixed_keep(places(model)), atol=SINGLE)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "sides", [pytest.param([0], id="in"), pytest.param([1], id="out"), pytest.param([0, 1], id="both")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_left_equals_masked(family: str, sides: list[int], attention: str) -> None:
    model = tiny_model(family, attention=attention)
    require_pruned_equals_masked(model, nothing_left(model, sides))
    matrices = [module for path, module in model.named_modules() if "layer" in path and isinstance(module, nn.Linear)]
    assert sum(matrix.weight.numel() for matrix in matrices) == 0


@pytest.mark.parametrize("attention", ATTENTIONS)
@given(
    masks=st.tuples(*[unit_masks(HEADS), unit_masks(HEADS), unit_masks(NEURONS)] * LAYERS),
    states=st.sampled_from([1, 5]),
)
@settings(max_examples=6)
def test_pruned_decoder_with_cross_attention_equals_masked(
    attention: str, masks: tuple[Tensor, ...], states: int
) -> None:
    model = tiny_decoder(attention)
    inputs = {
        **batch(),
        "encoder_hidden_states": torch.randn(2, states, HIDDEN, dtype=torch.float64),
        "encoder_attention_mask": torch.ones(2, states, dtype=torch.long).index_fill_(1, torch.arange(1, states), 0),
    }
    keep = dict(zip(places(model), masks, strict=True))
    masked = outputs(end_by_hand_(deepcopy(model), places(model), keep), inputs)
    pruned = prune_model_(model, mask_of(keep))
    torch.testing.assert_close(outputs(pruned, inputs), masked, rtol=0, atol=EXACT)


def chain_masks(chain: Chain) -> st.SearchStrategy[tuple[Tensor, ...]]:
    return st.tuples(*[
        unit_masks(place.num_units, foldable=path not in chain.unfoldable, may_be_empty=not chain.has_maps)
        for path, place in chain.places.items()
    ])


@pytest.mark.parametrize("name", CHAINS)
@given(data=st.data())
@settings(max_examples=10)
def test_pruned_chain_equals_masked(name: str, data: st.DataObject) -> None:
    chain = CHAINS[name]
    model, inputs = chain.model(), chain.inputs()
    keep = dict(zip(chain.places, data.draw(chain_masks(chain)), strict=True))
    masked = outputs(end_by_hand_(deepcopy(model), chain.places, keep), inputs)
    assert prune_model_(model, mask_of(keep)) is model
    torch.testing.assert_close(outputs(model, inputs), masked, rtol=0, atol=EXACT)
    for (path, place), kept in zip(chain.places.items(), keep.values(), strict=True):
        left = int(kept.all(0).sum())
        assert len(model.get_submodule(path).weight) == left
        assert model.get_submodule(place.columns).weight.shape[1] == left * place.num_columns


@pytest.mark.parametrize("name", CHAINS)
def test_masked_chain_differs_from_dense(name: str) -> None:
    chain = CHAINS[name]
    keep = mixed_keep(chain.places, chain.unfoldable)
    masked = outputs(end_by_hand_(chain.model(), chain.places, keep), chain.inputs())
    assert (outputs(chain.model(), chain.inputs()) - masked).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_in_side_and_out_side_masks_all_differ(family: str) -> None:
    model = tiny_model(family)
    masked = [
        outputs(end_by_hand_(deepcopy(model), places(model), nothing_left(model, sides)), batch())
        for sides in ([], [0], [1])
    ]
    assert torch.equal(masked[0], outputs(model, batch()))
    assert all((one - other).abs().max() > 0.1 for one, other in zip(masked, masked[1:] + masked[:1], strict=True))


@pytest.mark.parametrize("name", ["lenet_300", "one_activation_for_all", "without_biases"])
def test_chain_without_any_neuron_is_found_and_pruned_again(name: str) -> None:
    chain = CHAINS[name]
    model = chain.model()
    keep = all_kept(chain.places)
    for kept in keep.values():
        kept[1] = False
    prune_model_(model, mask_of(keep))
    before = outputs(model, chain.inputs())
    assert [sublayer.num_units for sublayer in find_sublayers(model)] == [0] * len(keep)
    assert torch.equal(outputs(prune_model_(model, RelevanceMask({})), chain.inputs()), before)


def test_convolution_keeps_a_channel_or_says_so() -> None:
    """PyTorch cannot run a convolution of no channels, so nothing may be half-cut."""
    chain = CHAINS["nested"]
    model = chain.model()
    keep = all_kept(chain.places)
    keep["1.0.0"][1] = False
    with pytest.raises(ValueError, match=r"`1\.0\.0`"):
        prune_model_(model, mask_of(keep))
    assert [sublayer.num_units for sublayer in find_sublayers(model)] == [4, 3, 5]


@pytest.mark.parametrize("head", AUTO_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_identity(family: str, head: str) -> None:
    model = tiny_model(family, head)
    dense = deepcopy(model)
    assert prune_model_(model, mask_of(all_kept(places(model)))) is model
    assert torch.equal(outputs(model, batch()), outputs(dense, batch()))
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    assert all(torch.equal(dense.get_parameter(name), value) for name, value in model.named_parameters())


@pytest.mark.parametrize("name", CHAINS)
def test_keeping_every_channel_is_the_identity(name: str) -> None:
    chain = CHAINS[name]
    model = prune_model_(chain.model(), mask_of(all_kept(chain.places)))
    assert torch.equal(outputs(model, chain.inputs()), outputs(chain.model(), chain.inputs()))


def split(keep: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Halve a mask: what the first cut ends, and the rest as a mask of what the first cut leaves."""
    first = {path: kept.clone() for path, kept in keep.items()}
    for kept in first.values():
        kept[:, kept.shape[1] // 2 :] = True
    rest = {path: kept[:, first[path].all(0)] for path, kept in keep.items()}
    return first, rest


@pytest.mark.parametrize("repatched", [False, True], ids=["dense", "patched_between"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_twice_equals_pruning_at_once(family: str, repatched: bool) -> None:
    model = tiny_model(family, "sequence_classification")
    keep = mixed_keep(places(model))
    path = list(keep)[2]
    keep[path][:] = False
    first, rest = split(keep)
    at_once = prune_model_(deepcopy(model), mask_of(keep))
    prune_model_(model, mask_of(first))
    if repatched:
        patch_model_(model)
    prune_model_(model, mask_of(rest))
    torch.testing.assert_close(outputs(model, batch()), outputs(at_once, batch()), rtol=0, atol=EXACT)
    shapes = {name: value.shape for name, value in at_once.named_parameters()}
    assert {name: value.shape for name, value in model.named_parameters()} == shapes
    assert model.config.vdneuron == at_once.config.vdneuron


@pytest.mark.parametrize("name", ["lenet_300", "nested", "one_dimensional"])
def test_pruning_a_chain_twice_equals_pruning_at_once(name: str) -> None:
    chain = CHAINS[name]
    keep = mixed_keep(chain.places)
    # In a chain the first cut folds constants into the biases that units zeroed on the in-side would emit.
    for kept in keep.values():
        kept[1] &= kept[0]
        kept[0] = True
    first, rest = split(keep)
    at_once = prune_model_(chain.model(), mask_of(keep))
    twice = prune_model_(prune_model_(chain.model(), mask_of(first)), mask_of(rest))
    torch.testing.assert_close(outputs(twice, chain.inputs()), outputs(at_once, chain.inputs()), rtol=0, atol=EXACT)


@pytest.mark.parametrize("grouping", Grouping)
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_model_is_cut_to_its_own_mask(family: str, grouping: Grouping) -> None:
    model = trained_posterior_(patch_model_(tiny_model(family), VDConfig(grouping=grouping)))
    mask = relevance_mask(model)
    mask_model_(model, mask)
    masked = outputs(model, batch())
    prune_model_(model)
    torch.testing.assert_close(outputs(model, batch()), masked, rtol=0, atol=EXACT)
    left = [sublayer.num_units for sublayer in find_sublayers(model)]
    assert left == [int(keep.all(0).sum()) for keep in mask.keep.values()]
    assert left != [HEADS, NEURONS] * LAYERS


@pytest.mark.parametrize("grouping", Grouping)
@pytest.mark.parametrize("name", ["nested", "zero_padded", "without_biases", "one_dimensional"])
def test_patched_chain_is_cut_to_its_own_mask(name: str, grouping: Grouping) -> None:
    chain = CHAINS[name]
    model = patch_model_(chain.model(), VDConfig(grouping=grouping))
    for place in chain.places.values():
        model.get_submodule(place.rows).log_var.data[1] += 30.0
    mask_model_(model, relevance_mask(model))
    masked = outputs(model, chain.inputs())
    prune_model_(model)
    torch.testing.assert_close(outputs(model, chain.inputs()), masked, rtol=0, atol=EXACT)
    assert [sublayer.num_units for sublayer in find_sublayers(model)] == [
        place.num_units - 1 for place in chain.places.values()
    ]


def test_mask_handed_over_goes_before_the_one_carried() -> None:
    model = patch_model_(tiny_model("bert"))
    mask_model_(model, mask_of(nothing_left(model, [0])))
    require_pruned_equals_masked(prune_model_(model, mask_of(all_kept(places(model)))), mixed_keep(places(model)))


def test_unpatched_model_is_not_pruned_by_default() -> None:
    model = tiny_model("bert")
    assert torch.equal(outputs(prune_model_(deepcopy(model)), batch()), outputs(model, batch()))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_variational_is_left(family: str) -> None:
    dense = tiny_model(family, "masked_lm")
    model = trained_posterior_(patch_model_(deepcopy(dense)))
    keep = mixed_keep(places(dense))
    keep[next(iter(keep))][:] = False
    prune_model_(model, mask_of(keep))
    assert not variational_layers(model)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert dict(model.named_buffers()).keys() == dict(dense.named_buffers()).keys()
    for (path, module), other in zip(model.named_modules(), dense.modules(), strict=True):
        assert isinstance(module, type(other)), path
        assert type(module).__module__.startswith(("torch.nn.", "transformers.")), path
        if not list(module.children()):
            assert type(module) is type(other), path
    assert isinstance(model, PrunedModel)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_pruned_chain_is_made_of_plain_layers() -> None:
    chain = CHAINS["nested"]
    model = prune_model_(patch_model_(chain.model()), mask_of(mixed_keep(chain.places)))
    assert [type(module) for module in model.modules()] == [type(module) for module in chain.build().modules()]
    assert model.state_dict().keys() == chain.build().state_dict().keys()


def test_layers_know_their_new_sizes() -> None:
    bert = tiny_model("bert")
    pruned = prune_model_(bert, mask_of(mixed_keep(places(bert))))
    chain = CHAINS["nested"]
    for model in (pruned, prune_model_(chain.model(), mask_of(mixed_keep(chain.places)))):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)
            if isinstance(module, nn.Conv2d):
                assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.weight.shape == module.running_mean.shape == (module.num_features,)
    attention = pruned.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (1, HEAD_SIZE)


def num_bytes(model: nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


def file_bytes(model: PreTrainedModel, folder: Path) -> int:
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_memory_and_file_shrink_as_the_sizes_say(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family, "sequence_classification", dtype=torch.float32)
    keep = mixed_keep(places(dense))
    keep[list(keep)[3]][:] = False
    pruned = prune_model_(deepcopy(dense), mask_of(keep))
    removed = {HEADS: 0, NEURONS: 0}
    for kept in keep.values():
        removed[kept.shape[1]] += int((~kept.all(0)).sum())
    head = 3 * (HEAD_SIZE * HIDDEN + HEAD_SIZE) + HIDDEN * HEAD_SIZE
    neuron = HIDDEN + 1 + HIDDEN
    parameters = removed[HEADS] * head + removed[NEURONS] * neuron
    assert parameters > 0
    assert dense.num_parameters() - pruned.num_parameters() == parameters
    assert num_bytes(dense) - num_bytes(pruned) == 4 * parameters
    # Beside the tensors a file holds their names and shapes, which hardly change.
    saved = file_bytes(dense, tmp_path / "dense") - file_bytes(pruned, tmp_path / "pruned")
    assert saved == pytest.approx(4 * parameters, abs=200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_and_frozen_parameters_stay(dtype: torch.dtype) -> None:
    model = tiny_model("bert", dtype=dtype)
    frozen = {name for index, (name, _) in enumerate(model.named_parameters()) if index % 2}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    keep = mixed_keep(places(model))
    keep[next(iter(keep))][:] = False
    prune_model_(patch_model_(model), mask_of(keep))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert outputs(model, batch()).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_device_stays(device: str) -> None:
    model = tiny_model("bert", dtype=torch.float32)
    keep = mixed_keep(places(model))
    on_cpu = outputs(prune_model_(deepcopy(model), mask_of(keep)), batch())
    prune_model_(patch_model_(model.to(device)), mask_of({path: kept.to(device) for path, kept in keep.items()}))
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {device}
    there = {name: tensor.to(device) for name, tensor in batch().items()}
    torch.testing.assert_close(outputs(model, there).cpu(), on_cpu, rtol=0, atol=SINGLE)


@pytest.mark.parametrize("training", [True, False])
def test_mode_stays(training: bool) -> None:
    chain = CHAINS["nested"]
    model = prune_model_(chain.model().train(training), mask_of(mixed_keep(chain.places)))
    assert {module.training for module in model.modules()} == {training}


def test_constants_are_those_of_evaluation_even_in_training_mode() -> None:
    chain = CHAINS["nested"]
    keep = mixed_keep(chain.places)
    masked = outputs(end_by_hand_(chain.model(), chain.places, keep), chain.inputs())
    model = prune_model_(chain.model().train(), mask_of(keep))
    torch.testing.assert_close(outputs(model, chain.inputs()), masked, rtol=0, atol=EXACT)


def test_hooks_keep_firing() -> None:
    model = tiny_model("bert")
    fired: list[str] = []
    layers = {place.rows for place in places(model).values()} | {place.columns for place in places(model).values()}
    for path in layers:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: fired.append(path))
    prune_model_(model, mask_of(mixed_keep(places(model))))
    outputs(model, batch())
    assert sorted(fired) == sorted(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_told_of_layers_without_heads_too(family: str) -> None:
    model = tiny_model(family, attention="eager")
    dense = model(**batch(), output_attentions=True).attentions
    keep = all_kept(places(model))
    first, _, _, _, last, _ = keep
    keep[first][1], keep[last][1, [0, 2]] = False, False
    prune_model_(model, mask_of(keep))
    attentions = model(**batch(), output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(2, left, 6, 6) for left in (0, HEADS, 2)]
    assert attentions[0].dtype == dense[0].dtype
    assert len(model(**batch(), output_hidden_states=True).hidden_states) == LAYERS + 1


def test_first_attention_is_that_of_the_heads_kept() -> None:
    model = tiny_model("bert", attention="eager")
    dense = model(**batch(), output_attentions=True).attentions[0]
    keep = all_kept(places(model))
    keep[next(iter(keep))][0, [0, 2]] = False
    prune_model_(model, mask_of(keep))
    torch.testing.assert_close(model(**batch(), output_attentions=True).attentions[0], dense[:, [1, 3]])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_after_pruning(family: str, attention: str) -> None:
    model = tiny_model(family, "sequence_classification", attention=attention)
    keep = mixed_keep(places(model))
    for path in list(keep)[:2]:
        keep[path][:] = False
    prune_model_(model, mask_of(keep)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = {**batch(), "labels": torch.tensor([0, 1])}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    # The constants of the empty sub-layers are biases now, and learn. Keys have no bias that matters.
    for path in list(keep)[:2]:
        assert model.get_submodule(places(tiny_model(family, "sequence_classification"))[path].columns).bias.grad.any()
    ungraded = {name for name, value in model.named_parameters() if value.numel() and value.grad is None}
    assert not ungraded


def test_empty_chain_trains_on() -> None:
    chain = CHAINS["lenet_300"]
    keep = all_kept(chain.places)
    keep["1"][0] = False
    model = prune_model_(chain.model(), mask_of(keep)).train()
    model(chain.inputs()).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model[-1].weight.grad.any()
    assert outputs(model, chain.inputs()).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_of_a_pruned_model_is_independent(family: str) -> None:
    model = tiny_model(family)
    prune_model_(model, mask_of(nothing_left(model, [0])))
    before = outputs(model, batch())
    other = deepcopy(model)
    assert torch.equal(outputs(other, batch()), before)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(outputs(model, batch()), before)


def test_mask_that_does_not_fit_changes_nothing() -> None:
    model = patch_model_(tiny_model("bert"))
    before = outputs(model, batch())
    with pytest.raises(ValueError, match="`encoder"):
        prune_model_(model, RelevanceMask({"encoder": torch.ones(2, HEADS, dtype=torch.bool)}))
    assert variational_layers(model)
    assert all(keep.all() for keep in read_mask(model).keep.values())
    assert torch.equal(outputs(model, batch()), before)
