# SPDX-License-Identifier: Apache-2.0
"""What was asked for, as a budget."""

from functools import partial

from hf_vdneuron.budget import Budget, Costs, cost_ratio_budget, parameter_budget, sparsity_budget, speedup_budget
from hf_vdneuron.latency_table import LatencyTable
from hf_vdneuron.training_args import SpeedupFrom, VDTrainingArguments


__all__ = ["target_budget"]


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
    if args.target_sparsity is not None:
        return sparsity_budget(costs, args.target_sparsity)
    if args.target_params is not None:
        return parameter_budget(costs, args.target_params)
    if args.target_speedup is None:
        raise ValueError("The run has no target: set `target_speedup`, `target_sparsity` or `target_params`.")
    if args.speedup_from is SpeedupFrom.LATENCY and table is not None:
        return cost_ratio_budget(partial(table.predict, costs.sublayers), args.target_speedup)
    return speedup_budget(costs, args.target_speedup)
