"""Rates of a run."""

import pytest
import torch
from torch import nn

from hf_vdneuron.optimization import phase_scheduler, reset_variational_, split_variational_
from hf_vdneuron.schedules import Decay, PhasePlan, variational_rate_factor


PLAN = PhasePlan(4, 5, 3)


@pytest.fixture
def model() -> nn.ParameterDict:
    return nn.ParameterDict({name: torch.ones(2) for name in ("weight", "bias", "log_var", "group_scale")})


@pytest.fixture
def optimizer(model: nn.ParameterDict) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    split_variational_(optimizer, model.named_parameters(), {"log_var": 10.0, "group_scale": 2.0}, num_steps=5)
    return optimizer


def test_variational_parameters_get_groups_of_their_own(
    model: nn.ParameterDict, optimizer: torch.optim.Optimizer
) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]
    assert groups == [(["bias", "weight"], 1e-3, 0.1), (["log_var"], 2.0, 0.0), (["group_scale"], 0.4, 0.0)]


@pytest.mark.parametrize("num_steps", [0, 3, 5])
def test_another_split_replaces_the_first(model: nn.ParameterDict, num_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for steps in (7, num_steps):
        split_variational_(optimizer, model.named_parameters(), {"log_var": 6.0}, num_steps=steps)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [
        (3, 1e-3),
        (1, 6.0 / max(1, num_steps)),
    ]


def test_parameters_that_the_optimizer_lacks_are_added(model: nn.ParameterDict) -> None:
    optimizer = torch.optim.SGD([model["weight"]], lr=1e-3, momentum=0.9, weight_decay=0.1)
    split_variational_(optimizer, model.named_parameters(), {"log_var": 10.0, "group_scale": 2.0}, num_steps=5)
    groups = [
        (group["params"], group["lr"], group["weight_decay"], group["momentum"]) for group in optimizer.param_groups
    ]
    assert groups == [
        ([model["weight"]], 1e-3, 0.1, 0.9),
        ([model["log_var"]], 2.0, 0.0, 0.9),
        ([model["group_scale"]], 0.4, 0.0, 0.9),
    ]


def test_adam_travels_the_distance_times_the_shape_of_the_rate(
    model: nn.ParameterDict, optimizer: torch.optim.Optimizer
) -> None:
    scheduler = phase_scheduler(optimizer, PLAN, decay=Decay.LINEAR, warmup_steps=lambda _: 0)
    travelled = []
    for step in range(12):
        if step == PLAN.sparsify_start:
            reset_variational_(optimizer)
        before = model["log_var"].detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)  # a gradient that never changes its sign
        optimizer.step()
        scheduler.step()
        travelled.append(float((before - model["log_var"].detach())[0]))
    full_rate = 10.0 / PLAN.sparsify_steps
    shape = [variational_rate_factor(step, PLAN.sparsify_steps, warmup_steps=0) for step in range(5)]
    assert shape == pytest.approx([1, 1, 1, 0.8, 0.4])
    assert travelled == pytest.approx([0] * 4 + [full_rate * factor for factor in shape] + [0] * 3, rel=1e-4)


def test_reset_forgets_only_variational_moments(model: nn.ParameterDict, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    reset_variational_(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in optimizer.state} == {"weight", "bias"}
