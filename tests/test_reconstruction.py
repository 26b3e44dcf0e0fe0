"""Least squares after a cut: against NumPy, and exact where what is gone can be made up for."""

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy

import numpy as np
import pytest
import torch
from models import batch, tiny_model
from runs import rows, tiny_bert
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import logits, masks, zoo_batch, zoo_model

from hf_vdneuron import reconstruction
from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.layers import dense_layer
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.reconstruction import correct_, corrections, reconstruct_
from hf_vdneuron.sharding import dense_copy
from hf_vdneuron.sublayers import Sublayer, Unit


def text_batches(num_batches: int = 4) -> list[dict[str, Tensor]]:
    ids = torch.stack([row["input_ids"] for row in rows()]).chunk(num_batches)
    mask = torch.ones_like(ids[0])
    mask[::2, -2:] = 0
    return [{"input_ids": part, "attention_mask": mask} for part in ids]


def ffn_of(model: nn.Module) -> Sublayer:
    return next(sublayer for sublayer in find_sublayers(model) if sublayer.unit is Unit.NEURON)


def without(model: PreTrainedModel, sublayer: Sublayer, unit: int) -> PreTrainedModel:
    keep = torch.ones(2, sublayer.num_units, dtype=torch.bool)
    keep[1, unit] = False
    return prune_model_(model, RelevanceMask({sublayer.path: keep}))


@torch.no_grad()
def twins_(model: PreTrainedModel, first: int, second: int) -> PreTrainedModel:
    """Let two neurons emit the same."""
    made, _ = (side.slices[0] for side in ffn_of(model).sides)
    layer = dense_layer(model, made.module)
    layer.weight[second], layer.bias[second] = layer.weight[first], layer.bias[first]
    return model


def furthest(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    """Largest difference of a logit."""
    return max((model(**part).logits - dense(**part).logits).abs().max().item() for part in text_batches())


@torch.no_grad()
def test_a_twin_makes_up_for_its_twin() -> None:
    dense, pruned = (twins_(tiny_bert(), 3, 7).eval() for _ in range(2))
    without(pruned, ffn_of(pruned), 7)
    before = furthest(pruned, dense)
    after = furthest(reconstruct_(pruned, dense, text_batches(), ridge=1e-9), dense)
    assert after < 1e-4
    assert before > 20 * after


@torch.no_grad()
@pytest.mark.parametrize("ridge", [1e-2, 1.0], ids=str)
def test_the_fit_is_that_of_numpy(ridge: float) -> None:
    """The first layer that changes sees inputs that nothing has changed yet."""
    dense, pruned = tiny_bert().eval(), tiny_bert().eval()
    sublayer = find_sublayers(dense)[0]
    assert sublayer.unit is Unit.HEAD
    without(pruned, sublayer, 1)
    path = sublayer.out_side.slices[0].module
    x, y = [], []
    for part in text_batches():
        with (
            dense_layer(pruned, path).register_forward_hook(lambda _, given, made: x.append(given[0])),
            dense_layer(dense, path).register_forward_hook(lambda _, given, made: y.append(made)),
        ):
            pruned(**part)
            dense(**part)
        attended = part["attention_mask"].bool()
        x[-1], y[-1] = x[-1][attended], y[-1][attended]
    x, y = (torch.cat(values).double().numpy() for values in (x, y))
    weight = dense_layer(pruned, path).weight.double().numpy().copy()
    centred = x - x.mean(0)
    held = np.sqrt(ridge * centred.var(0).mean() * len(x)) * np.eye(x.shape[1])
    expected, *_ = np.linalg.lstsq(np.vstack([centred, held]), np.vstack([y - y.mean(0), held @ weight.T]), rcond=None)
    reconstruct_(pruned, dense, text_batches(), ridge=ridge)
    fitted = dense_layer(pruned, path)
    np.testing.assert_allclose(fitted.weight.numpy(), expected.T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(fitted.bias.numpy(), y.mean(0) - expected.T @ x.mean(0), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_what_comes_before_the_first_cut_stays_as_it_is() -> None:
    dense, pruned = tiny_bert().eval(), tiny_bert().eval()
    last = [sublayer for sublayer in find_sublayers(dense) if sublayer.unit is Unit.NEURON][-1]
    reconstruct_(without(pruned, last, 0), dense, text_batches())
    reader = last.out_side.slices[0].module
    for (name, before), after in zip(dense.named_parameters(), pruned.parameters(), strict=True):
        if before.shape == after.shape:
            assert torch.equal(after, before) is (name != f"{reader}.bias"), name


@torch.no_grad()
def test_inputs_that_never_vary_say_nothing() -> None:
    dense = tiny_bert().eval()
    sublayer = ffn_of(dense)
    made = dense_layer(dense, sublayer.sides[0].slices[0].module)
    made.weight.zero_()
    pruned = without(deepcopy(dense), sublayer, 0)
    reconstruct_(pruned, dense, text_batches())
    assert furthest(pruned, dense) < 1e-5


def test_batches_without_a_position_are_refused() -> None:
    dense = tiny_bert().eval()
    pruned = without(deepcopy(dense), ffn_of(dense), 0)
    with pytest.raises(ValueError, match="No attended position of any batch comes to Linear"):
        reconstruct_(pruned, dense, [])


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_an_emptied_sub_layer_says_what_it_said_on_average(family: str) -> None:
    dense, pruned = tiny_model(family).eval(), tiny_model(family).eval()
    sublayer = ffn_of(dense)
    prune_model_(pruned, RelevanceMask({sublayer.path: torch.zeros(2, sublayer.num_units, dtype=torch.bool)}))
    said = []
    path = sublayer.out_side.slices[0].module
    with dense_layer(dense, path).register_forward_hook(lambda _, given, made: said.append(made)):
        dense(**batch())
    reconstruct_(pruned, dense, [batch()])
    mean = said[0][batch()["attention_mask"].bool()].mean(0)
    torch.testing.assert_close(dense_layer(pruned, path).bias, mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_no_batch_comes_to_stays_as_it_is() -> None:
    dense = zoo_model("clip")
    text = [sublayer for sublayer in find_sublayers(dense) if sublayer.path.startswith("text")]
    pruned = without(deepcopy(dense), text[0], 0)
    before = deepcopy(pruned.state_dict())

    def text_alone(model: PreTrainedModel, given: dict[str, Tensor]) -> object:
        return model.text_model(input_ids=given["input_ids"])

    reconstruct_(pruned, dense, [zoo_batch(dense)], forward=text_alone)
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("text_model") for name in changed)


@torch.no_grad()
def test_a_layer_of_a_chain_that_is_cut_itself_stays_as_it_is() -> None:
    model = patch_model_(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2)))
    dense = dense_copy(model)
    keep = {part.path: torch.ones(2, part.num_units, dtype=torch.bool) for part in find_sublayers(model)}
    for mask in keep.values():
        mask[1, :3] = False
    mask_model_(model, RelevanceMask(keep))
    data = [{"input": torch.randn(300, 8)}]
    found = corrections(model, dense, data)
    assert [*found] == ["4"]
    error = (model(**data[0]) - dense(**data[0])).square().sum()
    assert (correct_(model, found)(**data[0]) - dense(**data[0])).square().sum() < error


# ---- Under a mask ----


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True], ids=["scales of 1", "scales of the posterior"])
@pytest.mark.parametrize("row", ["bert", "gpt2", "albert", "deberta_v2", "vit", "qwen2_moe"])
def test_a_masked_model_is_corrected_to_what_a_pruned_one_becomes(row: str, scaled: bool) -> None:
    model = patch_model_(zoo_model(row)).eval()
    if scaled:
        for layer in variational_layers(model).values():
            if layer.group_scale is not None:
                layer.group_scale.uniform_(0.5, 1.5)
    dense = dense_copy(model).eval()
    data = [zoo_batch(model)]
    mask_model_(model, masks(dense)["ragged"])
    pruned = reconstruct_(prune_model_(dense_copy(model), read_mask(model)), dense, data)
    before = logits(model)
    found = corrections(model, dense, data)
    assert torch.equal(logits(model), before)
    correct_(model, found)
    assert bool(found) == (row != "qwen2_moe")  # whose layers have no bias
    assert bool(found) != torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), logits(pruned), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_scale_of_zero_stays_ended() -> None:
    model = patch_model_(tiny_bert()).eval()
    dense = dense_copy(model)
    path = ffn_of(model).out_side.slices[0].module
    layer = variational_layers(model)[path]
    layer.group_scale[2] = 0
    change = torch.ones_like(layer.weight)
    correct_(model, {path: {"weight": change, "bias": torch.ones_like(layer.bias)}})
    expected = dense_layer(dense, path).weight + change
    expected[:, 2] = 0
    torch.testing.assert_close(layer.mean, expected)


def test_a_layer_reads_no_more_than_it_needs_and_not_the_first_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As batches may come sorted."""
    monkeypatch.setattr(reconstruction, "LEAST_POSITIONS", 1)
    dense = tiny_bert().eval()
    sublayer = find_sublayers(dense)[0]
    data = text_batches(num_batches=12)
    path = sublayer.out_side.slices[0].module

    def fitted(batches: list[dict[str, Tensor]]) -> Tensor:
        pruned = reconstruct_(without(deepcopy(dense), sublayer, 1), dense, batches)
        return dense_layer(pruned, path).weight

    num_inputs = fitted(data).shape[1]
    num_read = -(-reconstruction.POSITIONS_PER_INPUT * num_inputs // int(data[0]["attention_mask"].sum()))
    assert 0 < num_read < len(data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(fitted(data), fitted([data[number] for number in order[:num_read]]))
    assert not torch.allclose(fitted(data), fitted(data[:num_read]))


def in_place_chain() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(inplace=True), nn.Linear(24, 4))
    return nn.Sequential(*layers)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "albert", "falcon", "chain"])
def test_one_forward_of_the_dense_model_serves_every_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon and the chain overwrite what their layers have made."""
    dense = (in_place_chain() if family == "chain" else zoo_model(family)).eval()
    data = [{"input": torch.randn(64, 8)} for _ in range(3)] if family == "chain" else [zoo_batch(dense)]
    mask = {part.path: torch.ones(2, part.num_units, dtype=torch.bool) for part in find_sublayers(dense)}
    for keep in mask.values():
        keep[:, 0] = False
    alone, shared = (prune_model_(deepcopy(dense), RelevanceMask(mask)) for _ in range(2))
    forwards = Counter[int]()

    def count(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        forwards[id(model)] += 1
        model(**batch)

    reconstruct_(shared, dense, data, forward=count)
    assert forwards[id(dense)] == len(data)
    monkeypatch.setattr(reconstruction, "KEPT_BYTES", 0)
    reconstruct_(alone, dense, data)
    for (name, value), fitted in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert torch.equal(fitted, value), name
