"""Rates of a run."""

import pytest
import torch
from torch import nn

from hf_vdneuron.optimization import phase_scheduler, reset_variational_, split_variational_
from hf_vdneuron.schedules import Decay, PhasePlan


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


def test_adam_travels_the_distance(model: nn.ParameterDict, optimizer: torch.optim.Optimizer) -> None:
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
    assert travelled[:4] == [0] * 4
    assert travelled[9:] == [0] * 3
    assert sum(travelled) == pytest.approx(10.0, rel=1e-4)


def test_reset_forgets_only_variational_moments(model: nn.ParameterDict, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    reset_variational_(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in optimizer.state} == {"weight", "bias"}
