# SPDX-License-Identifier: Apache-2.0
"""From what units are worth, and what a model may cost, to what is kept of it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil, fsum, inf, isfinite, log
from statistics import fmean

import torch
from torch import Tensor

from hf_vdneuron.budget import Budget
from hf_vdneuron.masks import RelevanceMask, end_units, most_relevant
from hf_vdneuron.sublayers import Sublayer, Unit


__all__ = ["FREE", "Alignment", "Layout", "irremovable_units", "keep_within", "stages", "unit_prices"]

#: How many times smaller what can be removed gets in one stage, at most, and in how many stages at most: what is left
#: is worth something else once it has made up for what is gone (method: Without training).
STAGE, MAX_STAGES = 1.75, 4

#: By how much rounding may miss a whole number of stages.
ROUNDING = 1e-6

#: Worth of a unit that is gone already: less than any other, and still a number.
_GONE = -1e300


class Layout(StrEnum):
    """How sizes may differ between layers."""

    FREE = "free"
    """Every layer keeps what is worth most."""
    UNIFORM = "uniform"
    """All layers keep as many heads and as many neurons, as one number in a config says."""


@dataclass(frozen=True)
class Alignment:
    """Which numbers of units a structure may have.

    Args:
        layout: How they may differ between layers.
        round_heads_to: What the number of heads of a layer is a multiple of, at least 1.
        round_neurons_to: The same for neurons.
    """

    layout: Layout = Layout.FREE
    round_heads_to: int = 1
    round_neurons_to: int = 1

    def step(self, unit: Unit) -> int:
        """Tell how many units of a layer, or of each of its experts, go at once.

        Args:
            unit: Their kind.

        Returns:
            Their number.
        """
        return self.round_heads_to if unit is Unit.HEAD else self.round_neurons_to

    def alike(self, sublayers: Iterable[Sublayer]) -> list[list[Sublayer]]:
        """Group the sub-layers that keep the same number of units.

        Args:
            sublayers: The sub-layers of a model.

        Returns:
            The groups: single sub-layers, or all with as many units of one kind, in as many experts.
        """
        groups: dict[object, list[Sublayer]] = {}
        for part in sublayers:
            key = part.path if self.layout is Layout.FREE else (part.unit, part.num_units, part.num_experts)
            groups.setdefault(key, []).append(part)
        return list(groups.values())


#: No alignment at all.
FREE = Alignment()

_ALL = RelevanceMask({})

#: A unit: path of its sub-layer, and its index there.
_Member = tuple[str, int]


@dataclass(frozen=True, order=True)
class _Block:
    """Units that go together.

    Args:
        worth: Their mean relevance per cost.
        group: Which group of sub-layers that are alike they belong to.
        members: They.
        price: What one of them costs.
    """

    worth: float
    group: int
    members: tuple[_Member, ...]
    price: float

    @property
    def relevance(self) -> float:
        """What is lost with them."""
        return self.worth * self.price * len(self.members)


def keep_within(
    sublayers: list[Sublayer],
    relevance: Mapping[str, Tensor],
    budget: Budget,
    *,
    alignment: Alignment = FREE,
    present: RelevanceMask = _ALL,
) -> RelevanceMask:
    """Keep what says most for what it costs, and no more than a budget allows.

    Units go in the order of their relevance per cost until the budget is met. Then those that still fit come back,
    the best first, so that what is left of the budget is less than the cheapest removed unit costs. Where an alignment
    ties units together, the weakest of each layer go and come back together, by their mean; and where the last ones to
    go take more along than they have to, others go in their place if less is lost with them.

    Args:
        sublayers: The sub-layers of a model.
        relevance: Path of each sub-layer -> relevance of each side of its units, shape `(num_sides, num_units)`.
            Units with infinite relevance stay.
        budget: What may be kept.
        alignment: Which numbers of units it may be.
        present: What is there; the rest goes first, and does not come back.

    Returns:
        A mask over every sub-layer. Each removed unit ends on its less relevant side.

    Raises:
        ValueError: If the budget cannot be met, or a relevance is not a number.
    """
    weakest = {sublayer.path: relevance[sublayer.path].amin(0) for sublayer in sublayers}
    if lost := [path for path, values in weakest.items() if values.isnan().any()]:
        raise ValueError(
            f"The relevance of `{lost[0]}` is not a number: training has diverged. Resume from an earlier checkpoint "
            "with a lower `learning_rate` or smaller distances."
        )
    prices = unit_prices(sublayers, budget)
    worths = {part.path: _worths(part, weakest[part.path], prices[part.path], present) for part in sublayers}
    blocks = sorted(
        block
        for group, alike in enumerate(alignment.alike(sublayers))
        for block in _blocks(alike, worths, group, alignment.step(alike[0].unit), prices[alike[0].path])
        if isfinite(block.worth)
    )
    sizes = {sublayer.path: sublayer.num_units for sublayer in sublayers}
    budget.require_reachable(_count(blocks, sizes))
    gone = {path: torch.zeros(size, dtype=torch.bool) for path, size in sizes.items()}
    for block in _removed(blocks, sizes, budget):
        for path, unit in block.members:
            gone[path][unit] = True
    kept = {
        sublayer.path: end_units(sublayer, (relevance[sublayer.path] == weakest[sublayer.path]) & gone[sublayer.path])
        for sublayer in sublayers
    }
    return RelevanceMask(kept) & present


def _worths(sublayer: Sublayer, weakest: Tensor, price: float, present: RelevanceMask) -> Tensor:
    """Tell the relevance per cost of each unit of a sub-layer, infinite for those that stay, shape `(num_units,)`."""
    # What costs nothing is not worth removing.
    worths = (
        weakest.cpu().double() / price if price > 0 else torch.full((sublayer.num_units,), inf, dtype=torch.float64)
    )
    gone = torch.ones(sublayer.num_units, dtype=torch.bool).index_fill_(0, present.kept_units(sublayer), False)
    worths = worths.masked_fill(gone & worths.isfinite(), _GONE)
    return worths.index_fill(0, most_relevant(worths, sublayer.minimum), inf)


def _blocks(
    alike: Sequence[Sublayer], worths: Mapping[str, Tensor], group: int, step: int, price: float
) -> Iterator[_Block]:
    """Put the weakest units of each sub-layer together, then the next ones, so that a multiple of the step is left."""
    # Experts of a layer keep equal numbers whatever the alignment: the one that keeps most says how many there are.
    # Ties fall by unit, those of blocks by group and members: every process has to remove the same.
    num_units = alike[0].num_units // alike[0].num_experts
    orders = [
        (part.path, [expert * num_units + unit for unit in order])
        for part in alike
        for expert, order in enumerate(
            worths[part.path].view(part.num_experts, num_units).argsort(dim=1, stable=True).tolist()
        )
    ]
    start = 0
    for end in range(num_units % step or step, num_units + 1, step):
        members = tuple((path, unit) for path, order in orders for unit in order[start:end])
        yield _Block(fmean(worths[path][unit].item() for path, unit in members), group, members, price)
        start = end


def stages(budget: Budget, alignment: Alignment, *, now: float, least: float) -> list[Budget]:
    """Come to a budget step by step, each of which leaves the same share of what can be removed.

    Where next to nothing is to be left, the last step is a longer one. Where an alignment lets many units go at once,
    there is but one: an early step would overshoot, and what it took does not come back.

    Args:
        budget: What may be kept in the end.
        alignment: Which numbers of units may be.
        now: Cost of what is there.
        least: Cost of what cannot be removed, below that.

    Returns:
        Budgets with falling limits; the last one is the given one.
    """
    share = max((budget.limit - least) / (now - least), STAGE**-MAX_STAGES)
    number = max(ceil(-log(share) / log(STAGE) - ROUNDING), 1) if alignment == FREE else 1
    limits = [least + (now - least) * share ** (step / number) for step in range(1, number)]
    return [*(replace(budget, limit=limit) for limit in limits), budget]


def irremovable_units(relevance: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the units that cannot be removed.

    Args:
        relevance: Path of each sub-layer -> relevance of its units, shape `(num_units,)` or `(num_sides, num_units)`;
            infinite for a side that cannot end its unit.

    Returns:
        Path of each sub-layer -> its units that no side can end.
    """
    return {path: int((~torch.atleast_2d(values).amin(0).isfinite()).sum()) for path, values in relevance.items()}


def unit_prices(sublayers: list[Sublayer], budget: Budget) -> dict[str, float]:
    """Tell what a unit costs, on average over those of its sub-layer with all else complete.

    Args:
        sublayers: The sub-layers of a model.
        budget: Says in what it costs.

    Returns:
        Path of each sub-layer -> price of one of its units.
    """
    full = budget.cost({})
    return {part.path: (full - budget.cost({part.path: 0})) / max(1, part.num_units) for part in sublayers}


def _count(removed: Iterable[_Block], sizes: Mapping[str, int]) -> dict[str, int]:
    gone = Counter(path for block in removed for path, _ in block.members)
    return {path: size - gone[path] for path, size in sizes.items()}


def _removed(blocks: Sequence[_Block], sizes: Mapping[str, int], budget: Budget) -> list[_Block]:
    """Choose the blocks that go, of some in the order of their worth."""
    length = _shortest_prefix(blocks, sizes, budget)
    removed = _fill(blocks[:length], sizes, budget)
    if not removed or len(blocks[length - 1].members) == 1:
        return removed
    # A large block may overshoot by more than it saves: the group that it belongs to can stop short of it.
    rest = [block for block in blocks if block < blocks[length - 1] or block.group != blocks[length - 1].group]
    if budget.cost(_count(rest, sizes)) > budget.limit:
        return removed
    others = _removed(rest, sizes, budget)
    # What both remove may be gone already, with a worth that would drown the rest.
    lost = fsum(block.relevance for block in removed if block not in set(others))
    lost_instead = fsum(block.relevance for block in others if block not in set(removed))
    return removed if lost <= lost_instead else others


def _shortest_prefix(order: Sequence[_Block], sizes: Mapping[str, int], budget: Budget) -> int:
    """Find how many blocks at least have to go, in this order, for the rest to fit: the cost only falls."""
    return bisect_left(
        range(len(order)), True, key=lambda length: budget.cost(_count(order[:length], sizes)) <= budget.limit
    )


def _fill(removed: Sequence[_Block], sizes: Mapping[str, int], budget: Budget) -> list[_Block]:
    """Take back the blocks that still fit, the last removed first."""
    counts = _count(removed, sizes)
    gone: list[_Block] = []
    full: set[int] = set()
    for block in reversed(removed):
        more = dict(counts)
        for path, _ in block.members:
            more[path] += 1
        if block.group not in full and budget.cost(more) <= budget.limit:
            counts = more
        else:
            # Blocks of one group cost the same: where one does not fit, no other does.
            full.add(block.group)
            gone.append(block)
    return gone
