"""Costs against PyTorch's own flop counter and what pruned models hold; the choice against a greedy loop."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CHAINS, FAMILIES, batch, tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import (
    Budget,
    Costs,
    body_cost,
    keep_within,
    unit_counts,
)
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.sublayers import Sublayer, Unit
from hf_vdneuron.targets import cost_ratio_budget, parameter_budget, sparsity_budget, speedup_budget


LENGTH = 6

BUDGETS = {
    "speedup": lambda costs: speedup_budget(costs, 1.7),
    "sparsity": lambda costs: sparsity_budget(costs, 0.45),
    "parameters": lambda costs: parameter_budget(costs, int(0.8 * costs.parameters({}))),
}


def random_mask(sublayers: list[Sublayer], *, seed: int = 0) -> RelevanceMask:
    """Ends about half of the units on the out-side."""
    random = torch.Generator().manual_seed(seed)
    keep = {}
    for sublayer in sublayers:
        keep[sublayer.path] = torch.ones(len(sublayer.sides), sublayer.num_units, dtype=torch.bool)
        keep[sublayer.path][-1] = torch.rand(sublayer.num_units, generator=random) < 0.5
        keep[sublayer.path][-1, 0] = True  # a convolution needs a channel
    return RelevanceMask(keep)


def random_relevance(sublayers: list[Sublayer], *, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {part.path: torch.rand(len(part.sides), part.num_units, generator=random) for part in sublayers}


def multiply_accumulates(model: nn.Module) -> float:
    """Half the floating-point operations of one forward of one sequence."""
    inputs = {name: value[:1] for name, value in batch().items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_saved_are_those_that_the_flop_counter_misses(family: str) -> None:
    model = tiny_model(family, "sequence_classification", attention="eager")
    mask = random_mask(find_sublayers(model))
    before, expected = multiply_accumulates(model), body_cost(model, length=LENGTH)
    expected_after = body_cost(model, length=LENGTH, mask=mask)
    pruned = prune_model_(model, mask)
    assert before - multiply_accumulates(pruned) == expected.macs - expected_after.macs
    assert body_cost(pruned, length=LENGTH) == expected_after


@pytest.mark.parametrize("patched", [False, True], ids=["dense", "patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_pruned_model(family: str, patched: bool) -> None:
    model = tiny_model(family, "sequence_classification")
    if patched:
        patch_model_(model)
    costs = Costs(model, length=LENGTH)
    mask = random_mask(costs.sublayers)
    assert costs.parameters(unit_counts(costs.sublayers, mask)) == prune_model_(model, mask).num_parameters()


@pytest.mark.parametrize("name", CHAINS)
def test_parameters_of_a_chain_are_those_of_the_pruned_chain(name: str) -> None:
    model = CHAINS[name].model()
    costs = Costs(model, length=1)
    mask = random_mask(costs.sublayers)
    pruned = prune_model_(deepcopy(model), mask)
    assert costs.parameters(unit_counts(costs.sublayers, mask)) == sum(p.numel() for p in pruned.parameters())


def test_expected_counts_cost_what_lies_between_whole_ones() -> None:
    costs = Costs(tiny_model("bert"), length=LENGTH)
    path = costs.sublayers[0].path
    assert costs.macs({path: 1.5}) == (costs.macs({path: 1}) + costs.macs({path: 2})) / 2


def greedy(sublayers: list[Sublayer], relevance: dict[str, Tensor], budget: Budget) -> dict[str, set[int]]:
    """Remove the worst unit again and again, then offer each removed one its place back, the best first."""
    left = {part.path: set(range(part.num_units)) for part in sublayers}

    def cost() -> float:
        return budget.cost({path: len(units) for path, units in left.items()})

    def price(path: str) -> float:
        return (budget.cost({}) - budget.cost({path: 0})) / relevance[path].shape[1]

    ranked = sorted(
        (relevance[path][:, unit].min().item() / price(path), path, unit) for path in left for unit in left[path]
    )
    removed = []
    for _, path, unit in ranked:
        if cost() <= budget.limit:
            break
        left[path].remove(unit)
        removed.append((path, unit))
    for path, unit in reversed(removed):
        left[path].add(unit)
        if cost() > budget.limit:
            left[path].remove(unit)
    return left


@given(seed=st.integers(0, 2**16), name=st.sampled_from(sorted(BUDGETS)))
def test_what_is_kept_is_what_a_greedy_loop_keeps(seed: int, name: str) -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    budget = BUDGETS[name](costs)
    relevance = random_relevance(costs.sublayers, seed=seed)
    mask = keep_within(costs.sublayers, relevance, budget)
    expected = greedy(costs.sublayers, relevance, budget)
    assert {part.path: set(mask.kept_units(part).tolist()) for part in costs.sublayers} == expected


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_is_met_and_by_less_than_the_cheapest_unit(family: str, name: str) -> None:
    costs = Costs(tiny_model(family, "sequence_classification"), length=LENGTH)
    budget = BUDGETS[name](costs)
    mask = keep_within(costs.sublayers, random_relevance(costs.sublayers), budget)
    counts = unit_counts(costs.sublayers, mask)
    assert budget.cost(counts) <= budget.limit
    for path in (part.path for part in costs.sublayers if counts[part.path] < part.num_units):
        assert budget.cost({**counts, path: counts[path] + 1}) > budget.limit


def test_a_removed_unit_ends_on_its_weaker_side() -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    relevance = random_relevance(costs.sublayers)
    mask = keep_within(costs.sublayers, relevance, speedup_budget(costs, 2.0))
    for path, keep in mask.keep.items():
        removed = ~keep.all(0)
        assert removed.any()
        assert torch.equal(keep[0, removed], relevance[path][0, removed] > relevance[path][1, removed])


def test_what_has_no_posterior_stays() -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    relevance = random_relevance(costs.sublayers)
    fixed = costs.sublayers[0]
    relevance[fixed.path].fill_(torch.inf)
    mask = keep_within(costs.sublayers, relevance, speedup_budget(costs, 2.0))
    assert mask.keep[fixed.path].all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda costs: speedup_budget(costs, 100.0),
            r"`target_speedup` is 100, out of reach: .* it is \d\. Stay",
        ),
        (lambda costs: sparsity_budget(costs, 0.999), r"`target_sparsity` is 0\.999, out of reach: .* it is 0\.\d+\."),
        (lambda costs: parameter_budget(costs, 10), r"`target_params` is 10, out of reach: .* it is \d,\d{3}\. Stay"),
        (
            lambda costs: parameter_budget(costs, 10**9),
            r"`target_params` is 1,000,000,000, which the complete model meets: it has \d,\d{3}\. Set it between",
        ),
    ],
    ids=["speedup", "sparsity", "too-few-parameters", "more-parameters-than-there-are"],
)
def test_a_target_out_of_reach_is_refused(make: Callable[[Costs], Budget], message: str) -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    relevance = random_relevance(costs.sublayers)
    for sublayer in costs.sublayers[:2]:
        relevance[sublayer.path].fill_(torch.inf)
    with pytest.raises(ValueError, match=message):
        keep_within(costs.sublayers, relevance, make(costs))


def test_a_posterior_that_diverged_is_named() -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    relevance = random_relevance(costs.sublayers)
    relevance[costs.sublayers[2].path][0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"relevance of `bert.encoder.layer.1.attention` is not a number: training has"
    ):
        keep_within(costs.sublayers, relevance, speedup_budget(costs, 2.0))


def test_what_costs_nothing_stays() -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    neurons = [part.path for part in costs.sublayers if part.unit is Unit.NEURON]
    heads = {part.path: part.num_units for part in costs.sublayers if part.unit is Unit.HEAD}
    budget = cost_ratio_budget(lambda counts: 1 + sum(counts.get(path, size) for path, size in heads.items()), 2.0)
    mask = keep_within(costs.sublayers, random_relevance(costs.sublayers), budget)
    assert all(mask.keep[path].all() for path in neurons)
    assert budget.cost(unit_counts(costs.sublayers, mask)) <= budget.limit
