"""Costs against PyTorch's own flop counter and what pruned models hold; the choice against a greedy loop."""

from copy import deepcopy

import pytest
import torch
from models import CHAINS, FAMILIES, batch, tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import (
    Costs,
    body_cost,
    unit_counts,
)
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.sublayers import Sublayer
from hf_vdneuron.targets import parameter_budget, sparsity_budget, speedup_budget


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
