"""The baselines' gates on units, against masks and finite differences, and the scores that are made from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from benchmarks.baselines import SCORERS, keep_affordable
from benchmarks.gates import fold_gates_, gate_gradients, gated
from benchmarks.learned_gates import LEARNED_GATES, HardConcreteGates, LearnedGates, MovementGates
from models import FAMILIES, batch, outputs, tiny_model
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs, cost_ratio
from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.sublayers import Unit
from hf_vdneuron.targets import speedup_budget


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


def test_taylor_averages_over_examples_and_makes_heads_and_neurons_comparable() -> None:
    model = tiny_model("bert", "sequence_classification")
    gradients = gate_gradients(model, BATCHES)
    scores = SCORERS["taylor"](model, BATCHES, torch.Generator())
    assert scores.keys() == gradients.keys()
    for unit in Unit:
        parts = [part for part in find_sublayers(model) if part.unit is unit]
        found, slopes = (
            torch.cat([values[part.path] for part in parts])
            for values in (scores, {path: gradient.abs().mean(0) for path, gradient in gradients.items()})
        )
        matrices = {matrix.module for part in parts for matrix in part.matrices}
        num_weights = sum(model.get_parameter(f"{path}.weight").numel() for path in matrices)
        torch.testing.assert_close(found, slopes * num_weights / slopes.sum())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_folded_into_the_readers(family: str) -> None:
    model = tiny_model(family)
    gates = {part.path: torch.randn(part.num_units, dtype=torch.float64) for part in find_sublayers(model)}
    with gated(model, gates):
        behind_gates = outputs(model, batch())
    torch.testing.assert_close(outputs(fold_gates_(model, gates), batch()), behind_gates)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_dropped_from_the_top(family: str) -> None:
    model = tiny_model(family)
    scores = SCORERS["layers"](model, [], torch.Generator())
    costs = Costs(model, length=512)
    mask = keep_affordable(model, scores, speedup_budget(costs, 3.0), whatever_it_costs=True)  # of 3 layers
    shares = [len(mask.kept_units(part)) / part.num_units for part in costs.sublayers]
    assert shares == [1, 1, 0, 0, 0, 0]


# Gates that learn


@dataclass
class At:
    """What a callback looks at."""

    global_step: int


def learn_(gates: LearnedGates, pull: Mapping[str, Tensor]) -> None:
    """Run gates as a trainer would, under a loss that is linear in them."""
    for step in range(gates.num_steps):
        gates.on_step_begin(None, At(step), None)
        sum((gates.values[path] * slope).sum() for path, slope in pull.items()).backward()
        gates.on_pre_optimizer_step(None, At(step), None)


@pytest.mark.parametrize("name", LEARNED_GATES)
@pytest.mark.parametrize("target", [1.5, 3.0], ids="{}x".format)
def test_gates_keep_what_the_loss_needs_and_meet_the_target(name: str, target: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))
    (sublayer,) = find_sublayers(model)
    costs = Costs(model, length=1)
    gates = LEARNED_GATES[name](model, speedup_budget(costs, target), 200)
    # The loss falls as gates of even units open, the more the higher their number.
    pull = torch.where(torch.arange(40) % 2 == 0, -torch.linspace(0.5, 1, 40), 0.0)
    learn_(gates, {sublayer.path: pull})
    kept = gates.choose_().kept_units(sublayer)
    assert cost_ratio(costs.macs({}), costs.macs({sublayer.path: len(kept)})) >= target
    even = set(range(0, 40, 2))
    assert set(kept.tolist()) <= even if len(kept) <= len(even) else even <= set(kept.tolist())


def test_hard_concrete_gates_obey_the_constraint_in_expectation() -> None:
    torch.manual_seed(0)
    model = tiny_model("bert", dtype=torch.float32)
    costs = Costs(model, length=6)
    gates = HardConcreteGates(model, speedup_budget(costs, 2.0), 300)
    learn_(gates, {path: torch.zeros_like(logits) for path, logits in gates.logits.items()})
    expected = {
        path: torch.sigmoid(logits - 2 / 3 * math.log(0.1 / 1.1)).sum() for path, logits in gates.logits.items()
    }
    assert costs.macs({}) / costs.macs(expected).item() == pytest.approx(2, rel=0.05)


def test_chance_and_samples_of_hard_concrete_gates_agree() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    (sublayer,) = find_sublayers(model)
    gates = HardConcreteGates(model, speedup_budget(Costs(model, length=1), 2.0), 10)
    logits = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    gates.logits[sublayer.path] = logits
    draws = 20_000
    opened = torch.zeros(4)
    for _ in range(draws):
        gates.set_(0)
        opened += gates.values[sublayer.path] > 0
    chance = torch.sigmoid(logits - 2 / 3 * math.log(0.1 / 1.1))
    assert ((opened / draws - chance).abs() < 5 * (chance * (1 - chance) / draws).sqrt()).all()


@torch.no_grad()
def test_hard_concrete_gates_are_folded_into_the_readers() -> None:
    model = tiny_model("bert")
    gates = HardConcreteGates(model, speedup_budget(Costs(model, length=6), 1.2), 10)
    for logits in gates.logits.values():
        logits.uniform_(-2, 2)
    values = {path: (1.2 * torch.sigmoid(logits).double() - 0.1).clamp(0, 1) for path, logits in gates.logits.items()}
    with gated(model, values):
        behind_gates = outputs(model, batch())
    gates.choose_()
    torch.testing.assert_close(outputs(model, batch()), behind_gates, rtol=1e-6, atol=1e-6)


def test_movement_goes_by_the_score_whatever_its_sign() -> None:
    model = tiny_model("bert")
    gates = MovementGates(model, speedup_budget(Costs(model, length=512), 1.1), 10)
    for part in gates.sublayers:
        gates.scores[part.path] -= 10 if part.unit is Unit.HEAD else 1
    mask = gates.choose_()
    assert all(len(mask.kept_units(part)) == part.num_units for part in gates.sublayers if part.unit is Unit.NEURON)


def test_closed_gates_of_movement_can_open_again() -> None:
    model = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    (sublayer,) = find_sublayers(model)
    gates = MovementGates(model, speedup_budget(Costs(model, length=1), 2.0), 10)
    gates.scores[sublayer.path] = torch.arange(10.0)
    gates.set_(9)
    assert gates.values[sublayer.path][0] == 0
    (-100 * gates.values[sublayer.path][0]).backward()
    gates.learn_(9)
    gates.set_(9)
    assert gates.values[sublayer.path][0] == 1
