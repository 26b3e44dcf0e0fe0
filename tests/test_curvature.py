"""Curvature against automatic differentiation, one example and one position at a time."""

from collections.abc import Iterator
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import rows, tiny_bert
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from zoo import zoo_batch, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, VDConfig
from hf_vdneuron.curvature import Curvature, estimate_curvature
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_


NUM_EXAMPLES = 6


def examples(start: int, end: int) -> dict[str, Tensor]:
    chosen = rows()[start:end]
    return {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}


def patched(**options: Any) -> PreTrainedModel:
    return patch_model_(tiny_bert(), VDConfig(**options)).eval()


def single_examples(model: nn.Module) -> Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Loss of each example, with what went into each layer and what came out."""
    for index in range(NUM_EXAMPLES):
        seen: list[Any] = []

        def note(layer: nn.Module, given: tuple[Tensor], made: Tensor, seen: list[Any] = seen) -> None:
            seen.append((layer, given[0].detach()[0], made))

        layers = variational_layers(model)
        handles = [layer.register_forward_hook(note) for layer in layers.values()]
        loss = model(**examples(index, index + 1)).loss
        for handle in handles:
            handle.remove()
        names = {layer: name for name, layer in layers.items()}
        inputs, outputs = ({names[entry[0]]: entry[column] for entry in seen} for column in (1, 2))
        yield loss, inputs, outputs


@pytest.fixture(scope="module", params=list(Grouping), ids=str)
def model_and_curvature(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Curvature]:
    model = patched(grouping=request.param)
    # Batches of several sizes: every example has to count alike.
    return model, estimate_curvature(model, [examples(0, 1), examples(1, 4), examples(4, NUM_EXAMPLES)])


def test_curvature_by_weights(model_and_curvature: tuple[PreTrainedModel, Curvature]) -> None:
    model, curvature = model_and_curvature
    expected = {name: torch.zeros_like(layer.weight) for name, layer in variational_layers(model).items()}
    for loss, inputs, outputs in single_examples(model):
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for (name, signal), gradient in zip(inputs.items(), gradients, strict=True):
            for x, delta in zip(signal, gradient[0], strict=True):
                expected[name] += torch.outer(delta, x).square() / NUM_EXAMPLES
    assert curvature.weights.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(curvature.weights[name], values.detach(), rtol=1e-4, atol=1e-12)


def test_curvature_by_scales(model_and_curvature: tuple[PreTrainedModel, Curvature]) -> None:
    """While the scale of a reader moves, its bias keeps its mean outputs what they are."""
    model, curvature = model_and_curvature
    layers = variational_layers(model)
    means = mean_inputs(model)
    expected = {name: torch.zeros_like(layer.group_scale) for name, layer in layers.items()}
    for loss, *_ in single_examples(model):
        scales, biases = [layer.group_scale for layer in layers.values()], [layer.bias for layer in layers.values()]
        gradients, by_bias = (torch.autograd.grad(loss, of, retain_graph=True) for of in (scales, biases))
        for (name, layer), gradient, slope in zip(layers.items(), gradients, by_bias, strict=True):
            expected[name] += without_mean(layer, gradient, slope, means[name]).square() / NUM_EXAMPLES
    for name, values in expected.items():
        torch.testing.assert_close(curvature.scales[name], values.detach(), rtol=1e-4, atol=1e-12)


def without_mean(layer: VariationalLayer, by_scale: Tensor, by_bias: Tensor, mean_input: Tensor) -> Tensor:
    """Slope along a scale and a bias that keeps the mean outputs of a reader of units, shape `(num_groups,)`."""
    if not (isinstance(layer, nn.Linear) and layer.group_axis == 1):
        return by_scale
    by_feature = (by_bias @ layer.weight.detach()) * mean_input
    return by_scale - by_feature.unflatten(0, (len(by_scale), -1)).sum(1)


def mean_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Mean of what each layer reads where its outputs reach the loss."""
    seen: dict[str, list[Tensor]] = {name: [] for name in variational_layers(model)}
    for loss, inputs, outputs in single_examples(model):
        for (name, given), gradient in zip(
            inputs.items(), torch.autograd.grad(loss, [*outputs.values()]), strict=True
        ):
            seen[name] += [x for x, delta in zip(given, gradient[0], strict=True) if delta.any()]
    return {name: torch.stack(values).mean(0) for name, values in seen.items()}


def test_what_a_neuron_says_always_its_reader_says_by_itself() -> None:
    """A neuron with a constant output costs nothing, however large its weights are."""
    model = tiny_bert()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[3] = 0
        layer.intermediate.dense.bias[3] = 5
        layer.output.dense.weight[:, 3] *= 100
    curvature = estimate_curvature(patch_model_(model), [examples(0, NUM_EXAMPLES)])
    scales = curvature.scales["bert.encoder.layer.0.output.dense"]
    assert scales[3] < 1e-6 * scales.max()


class WithLoss(nn.Module):
    """Gives a loss, as models of transformers do."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=F.cross_entropy(self.chain(inputs), labels))


@pytest.fixture
def convolutions() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    chain = nn.Sequential(
        *(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 2), nn.ReLU(), nn.Flatten()),
        nn.Linear(16, 3),
    )
    batch = {"inputs": torch.randn(NUM_EXAMPLES, 2, 8, 8), "labels": torch.arange(NUM_EXAMPLES) % 3}
    return WithLoss(patch_model_(chain)).eval(), batch


def test_curvature_of_convolutions_by_scales(convolutions: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, batch = convolutions
    curvature = estimate_curvature(model, [batch])
    layers = variational_layers(model)
    seen = []
    (last,) = (layer for layer in layers.values() if isinstance(layer, nn.Linear))
    with last.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach())):
        model(**batch)
    expected = {name: torch.zeros_like(layer.group_scale) for name, layer in layers.items()}
    for index in range(NUM_EXAMPLES):
        loss = model(**{name: values[index : index + 1] for name, values in batch.items()}).loss
        scales, biases = [layer.group_scale for layer in layers.values()], [layer.bias for layer in layers.values()]
        gradients, by_bias = (torch.autograd.grad(loss, of, retain_graph=True) for of in (scales, biases))
        for (name, layer), gradient, slope in zip(layers.items(), gradients, by_bias, strict=True):
            expected[name] += without_mean(layer, gradient, slope, seen[0].mean(0)).square() / NUM_EXAMPLES
    for name, values in expected.items():
        torch.testing.assert_close(curvature.scales[name], values.detach(), rtol=1e-4, atol=1e-12)


def test_curvature_of_convolutions_by_weights(convolutions: tuple[nn.Module, dict[str, Tensor]]) -> None:
    """A convolution is a linear layer on patches."""
    model, batch = convolutions
    curvature = estimate_curvature(model, [batch])
    name, layer = next(iter(variational_layers(model).items()))
    caught = []
    with layer.register_forward_hook(lambda _, inputs, outputs: caught.append((inputs[0], outputs))):
        loss = model(**batch).loss
    ((inputs, outputs),) = caught
    (delta,) = torch.autograd.grad(NUM_EXAMPLES * loss, outputs)
    patches = F.unfold(inputs, layer.kernel_size)
    expected = torch.einsum("nop,nip->oi", delta.flatten(2).square(), patches.square()) / NUM_EXAMPLES
    torch.testing.assert_close(curvature.weights[name].flatten(1), expected, rtol=1e-4, atol=1e-12)


def test_a_frozen_model_has_a_curvature(model_and_curvature: tuple[PreTrainedModel, Curvature]) -> None:
    model, curvature = model_and_curvature
    frozen = deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        found = estimate_curvature(frozen, [{"return_dict": True, **examples(0, NUM_EXAMPLES)}])
    for name, values in curvature.weights.items():
        torch.testing.assert_close(found.weights[name], values, rtol=1e-4, atol=1e-12)


def test_what_runs_without_gradients_has_no_curvature() -> None:
    model, batch = patched(), examples(0, NUM_EXAMPLES)
    free = estimate_curvature(model, [batch])
    first = model.bert.encoder.layer[0]
    first.forward = torch.no_grad()(first.forward)
    fixed = estimate_curvature(model, [batch])
    for path, values in free.weights.items():
        runs_without = path.startswith("bert.encoder.layer.0.")
        for found, expected in [(fixed.weights[path], values), (fixed.scales[path], free.scales[path])]:
            assert expected.any()
            torch.testing.assert_close(found, torch.zeros_like(expected) if runs_without else expected)


@pytest.mark.parametrize("row", ["mixtral", "qwen3_moe"])
def test_experts_in_half_precision_have_a_curvature(row: str) -> None:
    model = patch_model_(zoo_model(row).bfloat16())
    for values in estimate_curvature(model, [zoo_batch(model)]).scales.values():
        assert values.isfinite().all()
        assert values.any()


def test_activations_in_place_do_not_disturb(convolutions: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, batch = convolutions
    expected = estimate_curvature(model, [batch])
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    found = estimate_curvature(model, [batch])
    for name, values in expected.scales.items():
        torch.testing.assert_close(found.scales[name], values)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "There is no batch"), ([{"input_ids": torch.ones(1, 4).long()}], "with input_ids gives no loss")],
    ids=["no batch", "no labels"],
)
def test_data_without_a_loss_is_refused(batches: list[dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_curvature(patched(), batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_hold_wide_sums(dtype: torch.dtype) -> None:
    """A neuron that always says a lot must not drown what it says now and then."""
    model = tiny_bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.bias += 8
    narrow = model.to(dtype)
    wide = deepcopy(narrow).float()
    batches = [examples(0, NUM_EXAMPLES)] * 40
    found, expected = (estimate_curvature(patch_model_(one), batches).scales for one in (narrow, wide))
    for name, values in expected.items():
        assert torch.corrcoef(torch.stack([found[name], values]))[0, 1] > 0.98


def test_what_nothing_reads_has_no_curvature() -> None:
    """Behind a decoder without cross-attention, nothing in the encoder matters."""
    model = zoo_model("t5")
    sublayers = find_sublayers(model)
    cross = {part.path: torch.zeros(2, part.num_units, dtype=torch.bool) for part in sublayers if "cross" in part.path}
    assert cross
    prune_model_(model, RelevanceMask(cross))
    curvature = estimate_curvature(patch_model_(model), [zoo_batch(model)])
    for path, values in curvature.scales.items():
        assert path.startswith("encoder") == (values.max().item() == 0)
