# SPDX-License-Identifier: Apache-2.0
"""Baselines that learn what to keep while they train: a gate on every head and neuron that closes by itself.

Both are callbacks of the trainer that all methods share, so that data, teacher, rates and steps are the same.

References:
    Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization", 2018,
    https://arxiv.org/abs/1712.01312

    Xia, Zhong and Chen, "Structured Pruning Learns Compact and Accurate Models" (CoFi), 2022,
    https://arxiv.org/abs/2204.00408

    Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, https://arxiv.org/abs/2005.07683

    Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.baselines import keep_affordable
from benchmarks.gates import fold_gates_
from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Budget, UnitCounts
from hf_vdneuron.masks import RelevanceMask


__all__ = ["LEARNED_GATES", "HardConcreteGates", "LearnedGates", "MovementGates"]

#: Ends of the stretched interval, and temperature of the concrete distribution (Louizos 2018, section 4.1).
LEAST, MOST = -0.1, 1.1
TEMPERATURE = 2 / 3

#: Keeps the logit of uniform noise finite.
NOISE_EPS = 1e-6

#: Where gates start, as CoFi's `droprate_init`: 1 in 20 draws is below one half, 1 in 100 is zero.
INITIAL_DROP_RATE = 0.05

#: How far Adam can move the logit of a gate, and a multiplier, in a run. A logit starts at 3 and has to fall by 6 for
#: its gate to close for good.
LOGIT_DISTANCE = 20.0
MULTIPLIER_DISTANCE = 20.0

#: Share of the run in which the constraint is tightened, from the complete model on (Xia 2022, section 3.1).
TIGHTENING_SHARE = 0.5


class LearnedGates(TrainerCallback, ABC):
    """Gates that a run learns while it trains the model behind them.

    Args:
        model: The dense model.
        budget: What may be kept in the end.
        num_steps: Steps of the run.

    Attributes:
        values: Path of each sub-layer -> its gates in the coming forward, shape `(num_units,)`.
    """

    def __init__(self, model: nn.Module, budget: Budget, num_steps: int) -> None:
        self.model = model
        self.sublayers = find_sublayers(model)
        self.budget = budget
        self.num_steps = num_steps
        self.device = next(model.parameters()).device
        self.values: dict[str, Tensor] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_run: Any
    ) -> None:
        """Set the gates of the coming step.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            control: Not used.
            **_run: Not used.
        """
        self.set_(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_run: Any
    ) -> None:
        """Learn from the gradients of the step.

        Args:
            args: Arguments of the run.
            state: Where it stands.
            control: Not used.
            **_run: Not used.
        """
        self.learn_(state.global_step)

    @abstractmethod
    def set_(self, step: int) -> None:
        """Set the gates.

        Args:
            step: Number of steps done.
        """

    @abstractmethod
    def learn_(self, step: int) -> None:
        """Learn from the gradients that the loss has left in the gates.

        Args:
            step: Number of steps done before this one.
        """

    @abstractmethod
    def choose_(self) -> RelevanceMask:
        """Leave the trained model, dense again, as the gates would have it.

        Returns:
            What is kept of it.
        """


class HardConcreteGates(LearnedGates):
    r"""Gates with a hard concrete distribution, under a constraint on the expected cost.

    .. math:: \max_\lambda \min_{\phi} \; L + \lambda_1 (s - t) + \lambda_2 (s - t)^2

    with :math:`s` the share of the cost that the expected gates save and :math:`t` the share to be saved (Xia 2022,
    section 3.1).

    Args:
        model: The dense model.
        budget: What may be kept in the end.
        num_steps: Steps of the run.
    """

    def __init__(self, model: nn.Module, budget: Budget, num_steps: int) -> None:
        super().__init__(model, budget, num_steps)
        start = torch.logit(torch.tensor(1 - INITIAL_DROP_RATE)).item()
        self.logits = {
            part.path: torch.full((part.num_units,), start, device=self.device, requires_grad=True)
            for part in self.sublayers
        }
        self.multipliers = torch.zeros(2, device=self.device, requires_grad=True)
        gates = {"params": [*self.logits.values()], "lr": LOGIT_DISTANCE / num_steps}
        multipliers = {"params": [self.multipliers], "lr": MULTIPLIER_DISTANCE / num_steps, "maximize": True}
        self.optimizer = torch.optim.Adam([gates, multipliers])

    def set_(self, step: int) -> None:
        """Draw the gates (Louizos 2018, eq. 10 and 11).

        Args:
            step: Not used.
        """
        for path, logits in self.logits.items():
            noise = torch.logit(torch.rand_like(logits), eps=NOISE_EPS)
            self.values[path] = _stretched(torch.sigmoid((noise + logits) / TEMPERATURE))

    def learn_(self, step: int) -> None:
        """Move gates and multipliers, with the gradient of the loss and that of the constraint.

        Args:
            step: Number of steps done before this one.
        """
        full = self.budget.cost({})
        # Costs are polynomials, and take tensors for the numbers that they count.
        open_ = cast(UnitCounts, {path: _chance_open(logits).sum() for path, logits in self.logits.items()})
        saved = 1 - cast(Tensor, self.budget.cost(open_)) / full
        asked = min(1.0, step / (TIGHTENING_SHARE * self.num_steps)) * (1 - self.budget.limit / full)
        (self.multipliers[0] * (saved - asked) + self.multipliers[1] * (saved - asked).square()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def choose_(self) -> RelevanceMask:
        """Keep the gates that are most likely open, and fold what they are into the weights.

        Returns:
            What is kept of it.
        """
        gates = {path: _stretched(torch.sigmoid(logits)) for path, logits in self.logits.items()}
        fold_gates_(self.model, gates)
        # What a unit costs is in its logit already.
        open_ = {path: _chance_open(logits).cpu() for path, logits in self.logits.items()}
        return keep_affordable(self.model, open_, self.budget, whatever_it_costs=True)


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (MOST - LEAST) + LEAST).clamp(0, 1)


def _chance_open(logits: Tensor) -> Tensor:
    """Chance that a gate is not 0 (Louizos 2018, eq. 12)."""
    return torch.sigmoid(logits - TEMPERATURE * torch.tensor(-LEAST / MOST).log())


class MovementGates(LearnedGates):
    r"""Gates that stand for what moves away from zero, tightened step by step.

    The score of a unit is :math:`-\sum_t \partial L_t / \partial m_u`, with gradients of closed gates taken as if they
    were open (Sanh 2020, eq. 4, for whole units); the cost falls with the cube of the steps left (Zhu 2017).

    Args:
        model: The dense model.
        budget: What may be kept in the end.
        num_steps: Steps of the run.
    """

    def __init__(self, model: nn.Module, budget: Budget, num_steps: int) -> None:
        super().__init__(model, budget, num_steps)
        self.scores = {part.path: torch.zeros(part.num_units) for part in self.sublayers}

    def set_(self, step: int) -> None:
        """Close the gates with the lowest scores.

        Args:
            step: Number of steps done.
        """
        full = self.budget.cost({})
        limit = self.budget.limit + (1 - step / self.num_steps) ** 3 * (full - self.budget.limit)
        mask = self._keep(replace(self.budget, limit=limit)) if limit < full else None
        for part in self.sublayers:
            is_open = torch.ones(part.num_units) if mask is None else mask.keep[part.path].all(0).float()
            self.values[part.path] = is_open.to(self.device).requires_grad_()

    def learn_(self, step: int) -> None:
        """Move the scores.

        Args:
            step: Not used.
        """
        for path, gates in self.values.items():
            if gates.grad is not None:
                self.scores[path] -= gates.grad.cpu()

    def choose_(self) -> RelevanceMask:
        """Keep what moved away from zero most.

        Returns:
            What is kept of it.
        """
        return self._keep(self.budget)

    def _keep(self, budget: Budget) -> RelevanceMask:
        # Set against costs, what is dear would win among negative scores.
        return keep_affordable(self.model, self.scores, budget, whatever_it_costs=True)


#: Name of a baseline -> its gates.
LEARNED_GATES: dict[str, Callable[[nn.Module, Budget, int], LearnedGates]] = {
    "l0": HardConcreteGates,
    "movement": MovementGates,
}
