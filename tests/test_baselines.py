"""The baselines' gates on units, against masks and finite differences, and the scores that are made from them."""

import pytest
import torch
from benchmarks.baselines import SCORERS
from benchmarks.gates import gate_gradients, gated
from models import FAMILIES, batch, outputs, tiny_model
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.masks import RelevanceMask, mask_model_


STEP = 1e-6
BATCHES = [{**batch(), "labels": torch.tensor([0, 1])}, {**batch(), "labels": torch.tensor([1, 1])}]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_ends_a_unit(family: str) -> None:
    model = tiny_model(family)
    sublayers = find_sublayers(model)
    open_ = {part.path: torch.rand(part.num_units) > 1 / 3 for part in sublayers}
    with gated(model, {path: gates.double() for path, gates in open_.items()}):
        closed = outputs(model, batch())
    keep = {part.path: torch.stack([torch.ones_like(open_[part.path]), open_[part.path]]) for part in sublayers}
    torch.testing.assert_close(closed, outputs(mask_model_(model, RelevanceMask(keep)), batch()))


def test_gates_go_with_their_context() -> None:
    model = tiny_model("bert")
    before = outputs(model, batch())
    with gated(model, {part.path: torch.zeros(part.num_units) for part in find_sublayers(model)}):
        assert not torch.equal(outputs(model, batch()), before)
    assert torch.equal(outputs(model, batch()), before)


def test_gates_of_a_convolution_lie_on_its_channels() -> None:
    chain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    images, gates = torch.randn(2, 1, 6, 6), torch.tensor([0.0, 1.0, 0.5])
    with gated(chain, {find_sublayers(chain)[0].path: gates}):
        scaled = chain(images)
    expected = chain[2:](chain[:2](images) * gates.view(1, -1, 1, 1))
    torch.testing.assert_close(scaled, expected)


@torch.no_grad()
def losses(model: nn.Module, gates: dict[str, Tensor]) -> Tensor:
    """Loss of each example, one forward each."""
    one_by_one = []
    for inputs in BATCHES:
        for row in range(len(inputs["labels"])):
            with gated(model, gates):
                one_by_one.append(model(**{name: values[row : row + 1] for name, values in inputs.items()}).loss)
    return torch.stack(one_by_one)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_example(family: str) -> None:
    model = tiny_model(family, "sequence_classification")
    gradients = gate_gradients(model, BATCHES)
    for part in find_sublayers(model):
        for unit in (0, part.num_units - 1):
            gates = torch.ones(part.num_units, dtype=torch.float64)
            gates[unit] += STEP
            up = losses(model, {part.path: gates})
            gates[unit] -= 2 * STEP
            slope = (up - losses(model, {part.path: gates})) / (2 * STEP)
            torch.testing.assert_close(gradients[part.path][:, unit].double(), slope, rtol=1e-4, atol=1e-7)


def test_gradients_leave_no_trace() -> None:
    model = tiny_model("bert", "sequence_classification").train()
    gate_gradients(model, BATCHES)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "score"),
    [("taylor", lambda slopes: slopes.abs().mean(0)), ("fisher", lambda slopes: slopes.square().mean(0))],
    ids=["taylor", "fisher"],
)
def test_scores_average_over_examples(name: str, score: object) -> None:
    model = tiny_model("bert", "sequence_classification")
    gradients = gate_gradients(model, BATCHES)
    scores = SCORERS[name](model, BATCHES, torch.Generator())
    assert scores.keys() == gradients.keys()
    for path, slopes in gradients.items():
        torch.testing.assert_close(scores[path], score(slopes))
