"""Mask search without training: rearrangement against its loop and brute force, tuning against least squares."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from itertools import combinations, count

import numpy as np
import pytest
import torch
from benchmarks.baselines import keep_affordable
from benchmarks.gates import fold_gates_, gate_gradients, gated
from benchmarks.mask_search import rearrange, search_mask, solve_gates, tune_gates
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, batch, outputs, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.targets import speedup_budget


BATCHES = [{**batch(), "labels": torch.tensor([0, 1])}, {**batch(), "labels": torch.tensor([1, 1])}]

#: Where the sums behind the sub-layers of BERT go, in order.
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


# Rearrangement


def cost(removed: list[int], gradients: Tensor) -> float:
    """What the removed units' gates do to the loss together, squared and summed over examples."""
    return sum(sum(row[unit] for unit in removed) ** 2 for row in gradients.tolist())


def loop(removed: list[int], gradients: Tensor) -> set[int]:
    """One pass of swaps, each judged by the cost itself."""
    alone = [cost([unit], gradients) for unit in range(gradients.shape[1])]
    removed = removed.copy()
    for candidate in sorted(set(range(gradients.shape[1])) - set(removed), key=alone.__getitem__):
        removed.append(candidate)
        back = min(removed, key=lambda unit: cost([other for other in removed if other != unit], gradients))
        removed.remove(back)
    return set(removed)


def random_problem(seed: int, num_units: int, num_removed: int, num_examples: int = 4) -> tuple[Tensor, Tensor]:
    """A mask that a search would find, and gradients so few that they can cancel."""
    gradients = torch.randn(num_examples, num_units, generator=torch.Generator().manual_seed(seed))
    least = gradients.square().sum(0).argsort()[:num_removed]
    return torch.ones(num_units, dtype=torch.bool).index_fill_(0, least, False), gradients


def removed_by(keep: Tensor) -> list[int]:
    return (~keep).nonzero().flatten().tolist()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), num_units=st.integers(1, 7), data=st.data())
def test_rearrangement_is_the_loop_and_lies_between_the_best_and_the_start(
    seed: int, num_units: int, data: st.DataObject
) -> None:
    keep, gradients = random_problem(seed, num_units, data.draw(st.integers(0, num_units)))
    found, start = removed_by(rearrange(keep, gradients)), removed_by(keep)
    assert set(found) == loop(start, gradients)
    assert len(found) == len(start)
    best = min(cost([*chosen], gradients) for chosen in combinations(range(num_units), len(start)))
    assert best <= cost(found, gradients) * (1 + 1e-9) <= cost(start, gradients) * (1 + 2e-9)


def test_rearrangement_helps_where_units_stand_in_for_one_another() -> None:
    # Units 0 and 1 do the same, so that both are missed together; 0 and 2 cancel.
    gradients = torch.tensor([[1.0, 1.0, -1.1, 3.0], [-2.0, -2.0, 2.1, 3.0]])
    keep = torch.tensor([False, False, True, True])
    assert rearrange(keep, gradients).tolist() in ([False, True, False, True], [True, False, False, True])


def test_search_keeps_the_numbers_of_the_diagonal_search() -> None:
    model = tiny_model("bert", "sequence_classification")
    gradients = gate_gradients(model, BATCHES)
    budget = speedup_budget(Costs(model, length=6), 2.0)
    diagonal: list[RelevanceMask] = []

    def keep(scores: dict[str, Tensor]) -> RelevanceMask:
        for path, own in scores.items():
            torch.testing.assert_close(own, torch.stack([row**2 for row in gradients[path]]).mean(0))
        diagonal.append(keep_affordable(model, scores, budget))
        return diagonal[0]

    mask = search_mask(model, BATCHES, keep)
    moved = 0
    for part in find_sublayers(model):
        start = removed_by(diagonal[0].keep[part.path].all(0))
        assert [removed_by(side) for side in mask.keep[part.path]] == [sorted(loop(start, gradients[part.path]))] * 2
        moved += removed_by(mask.keep[part.path][0]) != start
    assert moved  # or this says nothing


# Tuning


@contextmanager
def totals_of_bert(model: PreTrainedModel) -> Generator[list[Tensor]]:
    """What is normalised behind each sub-layer in the next forward, in order."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in model.bert.encoder.layer:
            for norm in NORMS:
                hook = layer.get_submodule(norm).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
                hooks.callback(hook.remove)
        yield seen


def total(model: PreTrainedModel, gates: dict[str, Tensor], index: int) -> Tensor:
    """What sub-layer number `index` leaves where it is read, in one vector over all batches."""
    read = []
    for inputs in BATCHES:
        with gated(model, gates), totals_of_bert(model) as seen:
            model(**inputs)
        is_last = index == len(seen) - 1
        read.append(seen[index][:, 0] if is_last else seen[index][inputs["attention_mask"].bool()])
    return torch.cat(read).flatten()


def half_mask(model: nn.Module) -> RelevanceMask:
    """Every other unit, and not one of the second attention."""
    parts = find_sublayers(model)
    keep = {part.path: torch.arange(part.num_units) % 2 == 0 for part in parts}
    keep[parts[2].path][:] = False
    return RelevanceMask({part.path: keep[part.path].expand(len(part.sides), -1) for part in parts})


@torch.no_grad()
def test_gates_are_the_damped_least_squares_of_each_sublayer() -> None:
    model = tiny_model("bert", "sequence_classification")
    mask, parts = half_mask(model), find_sublayers(model)
    tuned = tune_gates(model, mask, BATCHES)
    before = {part.path: mask.keep[part.path][0].double() for part in parts}
    for index, part in enumerate(parts):
        kept = mask.kept_units(part)
        if not len(kept):
            assert not tuned[part.path].any()
            continue
        base = total(model, before, index)
        columns = []
        for unit in kept:  # a gate of 2 adds what the unit adds once more
            twice = before[part.path].clone().index_fill_(0, unit, 2)
            columns.append(total(model, {**before, part.path: twice}, index) - base)
        a, b = torch.stack(columns, dim=1).numpy(), (total(model, {}, index) - base).numpy()
        damped = np.concatenate([a.T @ a, np.eye(len(kept))]), np.concatenate([a.T @ b, np.zeros(len(kept))])
        change, *_ = np.linalg.lstsq(*damped)
        before[part.path][kept] += torch.from_numpy(change)
        torch.testing.assert_close(tuned[part.path], before[part.path], rtol=1e-3, atol=1e-3)
        assert np.abs(change).max() > 0.05  # or nothing was tuned


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_with_tuned_gates_is_the_dense_one_behind_them(family: str) -> None:
    model = tiny_model(family, "sequence_classification")
    mask = half_mask(model)
    gates = tune_gates(model, mask, BATCHES)
    plain = {path: own.ne(0).double() for path, own in gates.items()}
    with gated(model, gates):
        behind_gates = outputs(model, batch())
    with gated(model, plain):
        assert not torch.equal(outputs(model, batch()), behind_gates)
    pruned = prune_model_(fold_gates_(model, gates), mask)
    torch.testing.assert_close(outputs(pruned, batch()), behind_gates, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_dense_model_needs_no_tuning() -> None:
    model = tiny_model("bert", "sequence_classification")
    gates = tune_gates(model, RelevanceMask({}), BATCHES)
    for own in gates.values():
        torch.testing.assert_close(own, torch.ones_like(own))


@pytest.mark.parametrize(
    ("units", "wanted"),
    [
        pytest.param(3, [0.5, 1.0, 2.0], id="several"),
        pytest.param(1, [-9.0], id="one"),
        pytest.param(2, [0.0, 9.9], id="just_inside"),
    ],
)
def test_solution_is_that_of_least_squares(units: int, wanted: list[float]) -> None:
    a = 100 * torch.randn(50, units, dtype=torch.float64)  # large, so that damping does not show
    b = a @ torch.tensor(wanted, dtype=torch.float64)
    gates = solve_gates(a.T @ a, a.T @ (b - a.sum(1)))
    expected, *_ = np.linalg.lstsq(a.numpy(), b.numpy())
    assert gates.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("gate", [10.5, -10.5])
def test_gates_out_of_range_are_no_solution(gate: float) -> None:
    a = 100 * torch.randn(50, 2, dtype=torch.float64)
    b = a @ torch.tensor([1.0, gate], dtype=torch.float64)
    assert solve_gates(a.T @ a, a.T @ (b - a.sum(1))) is None


def test_without_evidence_a_gate_stays_open() -> None:
    assert solve_gates(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)).tolist() == [1, 1]


@pytest.mark.parametrize(("limit", "solved"), [(1, False), (5, True)], ids=["too_short", "long_enough"])
def test_a_solver_that_gives_up_has_no_solution(limit: int, solved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.mask_search.ITERATIONS_PER_UNIT", limit)
    scales = torch.logspace(0, 8, 30, dtype=torch.float64)
    assert (solve_gates(scales.diag(), torch.ones_like(scales)) is not None) == solved


def test_tuning_stops_at_the_first_sublayer_without_a_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert", "sequence_classification")
    mask, calls = half_mask(model), count()

    def solve(gram: Tensor, pull: Tensor) -> Tensor | None:
        return torch.full_like(pull, 1.5) if next(calls) < 2 else None

    monkeypatch.setattr("benchmarks.mask_search.solve_gates", solve)
    gates = tune_gates(model, mask, BATCHES)
    largest = [gates[part.path].max().item() for part in find_sublayers(model)]
    assert largest == [1.5, 1.5, 0, 1, 1, 1]
    assert next(calls) == 3


def test_tuning_needs_a_norm_behind_each_sublayer() -> None:
    model = tiny_model("bert", "sequence_classification")
    model.bert.encoder.layer[-1].output.LayerNorm = nn.Identity()
    with pytest.raises(ValueError, match="expected a transformer with a norm behind each sub-layer"):
        tune_gates(model, half_mask(model), BATCHES)


def test_tuning_leaves_no_trace() -> None:
    model = tiny_model("bert", "sequence_classification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune_gates(model, half_mask(model), BATCHES)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
