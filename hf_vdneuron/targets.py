# SPDX-License-Identifier: Apache-2.0
"""What was asked for, as a budget."""

from collections.abc import Callable
from functools import partial
from typing import Any

from hf_vdneuron.budget import Budget, Costs, UnitCounts, cost_ratio
from hf_vdneuron.goal_args import SpeedupFrom
from hf_vdneuron.latency_table import LatencyTable
from hf_vdneuron.training_args import VDTrainingArguments


__all__ = [
    "BUDGETS",
    "DEFAULT_LENGTH",
    "cost_ratio_budget",
    "parameter_budget",
    "sparsity_budget",
    "speedup_budget",
    "target_budget",
]

#: Tokens of a sequence for which a speed-up is counted, where the data does not tell.
DEFAULT_LENGTH = 128


def target_budget(args: VDTrainingArguments, costs: Costs, table: LatencyTable | None) -> Budget:
    """Turn the target of a run into a budget.

    Args:
        args: Arguments of the run.
        costs: Costs of its model.
        table: Latencies of its model; needed if the speed-up is asked for in seconds.

    Returns:
        The budget.

    Raises:
        ValueError: If there is no target.
    """
    if args.target is None:
        raise ValueError(f"The run has no target: set one of {', '.join(f'`{name}`' for name in BUDGETS)}.")
    if args.target_speedup is not None and args.speedup_from is SpeedupFrom.LATENCY and table is not None:
        return cost_ratio_budget(partial(table.predict, costs.sublayers), args.target_speedup)
    return BUDGETS[args.target](costs, getattr(args, args.target))


def speedup_budget(costs: Costs, target: float) -> Budget:
    """Ask for a speed-up by multiply-accumulates.

    Args:
        costs: Costs of the model.
        target: Dense over pruned multiply-accumulates of the body, above 1.

    Returns:
        The budget.
    """
    return cost_ratio_budget(costs.macs, target)


def cost_ratio_budget(cost: Callable[[UnitCounts], float], target: float) -> Budget:
    """Ask for a speed-up by any cost.

    Args:
        cost: Function from units left to their cost.
        target: Dense over pruned cost, above 1.

    Returns:
        The budget.
    """
    full = cost({})
    return Budget("target_speedup", target, cost, full / target, partial(cost_ratio, full))


def sparsity_budget(costs: Costs, target: float) -> Budget:
    """Ask for a share of the weights of heads and neurons to be removed.

    Args:
        costs: Costs of the model.
        target: The share, between 0 and 1.

    Returns:
        The budget.
    """
    full = costs.weights({})
    return Budget("target_sparsity", target, costs.weights, (1 - target) * full, lambda left: 1 - left / full)


def parameter_budget(costs: Costs, target: int) -> Budget:
    """Ask for a number of parameters.

    Args:
        costs: Costs of the model.
        target: Highest number of parameters of the whole model.

    Returns:
        The budget.
    """
    return Budget("target_params", target, costs.parameters, target, lambda left: left, digits=",.0f")


#: Name of a target -> its budget, as a function `(costs, value)`.
BUDGETS: dict[str, Callable[[Costs, Any], Budget]] = {
    "target_speedup": speedup_budget,
    "target_sparsity": sparsity_budget,
    "target_params": parameter_budget,
}
