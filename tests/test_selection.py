"""What is kept: against a greedy loop, one unit at a time and aligned."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CHAINS, FAMILIES, tiny_model
from torch import Tensor

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Budget, Costs, unit_counts
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.selection import (
    FREE,
    MAX_STAGES,
    STAGE,
    Alignment,
    Layout,
    keep_within,
    stages,
    unit_prices,
)
from hf_vdneuron.sublayers import Sublayer, Unit
from hf_vdneuron.targets import cost_ratio_budget, parameter_budget, sparsity_budget, speedup_budget


LENGTH = 6

BUDGETS = {
    "speedup": lambda costs: speedup_budget(costs, 1.7),
    "sparsity": lambda costs: sparsity_budget(costs, 0.45),
    "parameters": lambda costs: parameter_budget(costs, int(0.8 * costs.parameters({}))),
}


def random_relevance(sublayers: list[Sublayer], *, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {part.path: torch.rand(len(part.sides), part.num_units, generator=random) for part in sublayers}


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


# ---- Aligned ----

ALIGNMENTS = {
    "uniform": Alignment(Layout.UNIFORM),
    "rounded": Alignment(round_heads_to=2, round_neurons_to=5),
    "both": Alignment(Layout.UNIFORM, 2, 5),
}


def numbers_left(costs: Costs, mask: RelevanceMask) -> dict[Unit, list[int]]:
    left: dict[Unit, list[int]] = {unit: [] for unit in Unit}
    for part in costs.sublayers:
        left[part.unit].append(len(mask.kept_units(part)))
    return left


@given(seed=st.integers(0, 2**16), name=st.sampled_from(sorted(BUDGETS)), how=st.sampled_from(sorted(ALIGNMENTS)))
def test_numbers_are_aligned_and_within_the_budget(seed: int, name: str, how: str) -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    budget, alignment = BUDGETS[name](costs), ALIGNMENTS[how]
    relevance = random_relevance(costs.sublayers, seed=seed)
    mask = keep_within(costs.sublayers, relevance, budget, alignment=alignment)
    counts = unit_counts(costs.sublayers, mask)
    assert budget.cost(counts) <= budget.limit
    for unit, numbers in numbers_left(costs, mask).items():
        sizes = {part.num_units for part in costs.sublayers if part.unit is unit}
        assert all(number % alignment.step(unit) == 0 or number in sizes for number in numbers)
        if alignment.layout is Layout.UNIFORM:
            assert len(set(numbers)) == 1
    # What is kept of a sub-layer is the best of it.
    for part in costs.sublayers:
        kept = mask.kept_units(part).tolist()
        worth = relevance[part.path].amin(0)
        gone = [unit for unit in range(part.num_units) if unit not in kept]
        assert not kept or not gone or worth[kept].min() >= worth[gone].max()


@given(seed=st.integers(0, 2**16), how=st.sampled_from(sorted(ALIGNMENTS)))
def test_no_step_more_would_fit(seed: int, how: str) -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    budget, alignment = BUDGETS["speedup"](costs), ALIGNMENTS[how]
    mask = keep_within(costs.sublayers, random_relevance(costs.sublayers, seed=seed), budget, alignment=alignment)
    counts = unit_counts(costs.sublayers, mask)
    for alike in alignment.alike(costs.sublayers):
        more = {part.path: counts[part.path] + alignment.step(part.unit) for part in alike}
        if all(more[part.path] <= part.num_units for part in alike):
            assert budget.cost({**counts, **more}) > budget.limit


def test_layers_that_are_alike_go_by_their_mean() -> None:
    """One layer is worth nothing at all, and yet keeps as much as the others."""
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    relevance = random_relevance(costs.sublayers)
    for part in costs.sublayers[:2]:
        relevance[part.path].zero_()
    free, uniform = (
        numbers_left(costs, keep_within(costs.sublayers, relevance, BUDGETS["speedup"](costs), alignment=alignment))
        for alignment in (Alignment(), Alignment(Layout.UNIFORM))
    )
    assert free[Unit.NEURON][0] < free[Unit.NEURON][1]
    assert uniform[Unit.NEURON][0] == uniform[Unit.NEURON][1] > free[Unit.NEURON][0]


def test_the_default_alignment_aligns_nothing() -> None:
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    relevance = random_relevance(costs.sublayers)
    ties = [keep_within(costs.sublayers, relevance, BUDGETS["speedup"](costs), alignment=Alignment(round_heads_to=1))]
    ties.append(keep_within(costs.sublayers, relevance, BUDGETS["speedup"](costs)))
    assert all(torch.equal(keep, ties[1].keep[path]) for path, keep in ties[0].keep.items())


@pytest.mark.parametrize("how", ["free", *ALIGNMENTS])
def test_what_is_gone_already_goes_first(how: str) -> None:
    """However much it would be worth."""
    alignment = ALIGNMENTS.get(how, Alignment())
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    first = keep_within(
        costs.sublayers, random_relevance(costs.sublayers), speedup_budget(costs, 1.3), alignment=alignment
    )
    relevance = random_relevance(costs.sublayers, seed=1)
    for part in costs.sublayers:
        relevance[part.path][:, ~first.keep[part.path].all(0)] = 1e6
    budget = speedup_budget(costs, 2.0)
    second = keep_within(costs.sublayers, relevance, budget, alignment=alignment, present=first)
    assert all(not (second.keep[path].all(0) & ~keep.all(0)).any() for path, keep in first.keep.items())
    assert budget.cost(unit_counts(costs.sublayers, second)) <= budget.limit


def test_a_convolution_keeps_its_best_channel_whatever_it_costs() -> None:
    model = CHAINS["nested"].model()
    sublayers = find_sublayers(model)
    relevance = {
        part.path: 1e-9 * values for part, values in zip(sublayers, random_relevance(sublayers).values(), strict=True)
    }
    costs = Costs(model, length=1)
    least = {"0.0": 1, "1.0.0": 1, "2.1": 0}
    budget = Budget("weights", 0, costs.weights, costs.weights(least), lambda cost: cost)
    mask = keep_within(sublayers, relevance, budget)
    assert {part.path: len(mask.kept_units(part)) for part in sublayers} == least
    assert mask.kept_units(sublayers[0]).tolist() == [relevance["0.0"].amin(0).argmax()]


@given(
    share=st.floats(1e-6, 0.999),
    least=st.floats(0, 1e3),
    removable=st.floats(1e-3, 1e6),
)
def test_stages_leave_equal_shares_and_end_at_the_target(share: float, least: float, removable: float) -> None:
    limit = least + share * removable
    whole = Budget("target_speedup", 2.0, lambda counts: 0.0, limit, lambda cost: cost)
    found = stages(whole, FREE, now=least + removable, least=least)
    assert found[-1] is whole
    assert 1 <= len(found) <= MAX_STAGES
    left = [1.0] + [(stage.limit - least) / removable for stage in found]
    ratios = [before / after for before, after in pairwise(left)]
    if share > STAGE**-MAX_STAGES:
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)
        assert 1 < ratios[0] < 1.001 * STAGE
        # One stage fewer would not do.
        assert len(found) == 1 or share ** -(1 / (len(found) - 1)) > STAGE
    else:
        assert ratios[:-1] == pytest.approx([STAGE] * (MAX_STAGES - 1), rel=1e-3)
        assert ratios[-1] >= 0.999 * STAGE


def test_the_last_stage_goes_all_the_way() -> None:
    whole = Budget("target_params", 5, lambda counts: 0.0, 5.0, lambda cost: cost)
    limits = [stage.limit for stage in stages(whole, FREE, now=9.0, least=5.0)]
    assert limits == [5 + 4 / STAGE, 5 + 4 / STAGE**2, 5 + 4 / STAGE**3, 5.0]


@pytest.mark.parametrize(
    "alignment", [Alignment(Layout.UNIFORM), Alignment(round_neurons_to=8)], ids=["alike", "rounded"]
)
def test_many_units_that_go_at_once_go_in_one_stage(alignment: Alignment) -> None:
    whole = Budget("target_params", 5, lambda counts: 0.0, 5.0, lambda cost: cost)
    assert stages(whole, alignment, now=90.0, least=1.0) == [whole]


def test_a_large_block_does_not_go_where_small_ones_will_do() -> None:
    """All heads of both layers are worth a little less per cost than neurons, and are half of the model."""
    costs = Costs(tiny_model("bert", "sequence_classification"), length=LENGTH)
    budget = sparsity_budget(costs, 0.2)
    prices = unit_prices(costs.sublayers, budget)
    worths = {Unit.HEAD: 1.0, Unit.NEURON: 1.1}
    relevance = {
        part.path: torch.full((len(part.sides), part.num_units), prices[part.path] * worths[part.unit])
        for part in costs.sublayers
    }
    num_heads = next(part.num_units for part in costs.sublayers if part.unit is Unit.HEAD)
    aligned = Alignment(Layout.UNIFORM, round_heads_to=num_heads)
    mask = keep_within(costs.sublayers, relevance, budget, alignment=aligned)
    counts = unit_counts(costs.sublayers, mask)
    assert all(counts[part.path] == part.num_units for part in costs.sublayers if part.unit is Unit.HEAD)
    assert 0.2 <= 1 - budget.cost(counts) / budget.cost({}) < 0.25
