# SPDX-License-Identifier: Apache-2.0
"""What heads and neurons cost in seconds on the device at hand: measured once, then looked up for any structure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor
from transformers import PreTrainedModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import UnitCounts
from hf_vdneuron.latency import device_name, measure_latency
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.structure import dense_twin
from hf_vdneuron.sublayers import Sublayer, Unit


__all__ = ["LatencyTable", "measure_latency_table"]

#: Shares of the units at which a forward is timed. Time bends most where little is left.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)


@dataclass(frozen=True)
class LatencyTable:
    r"""Seconds of one forward, by the number of units that every sub-layer of a kind keeps.

    Sub-layers run one after the other, so the time of any structure is a sum. With :math:`t_u(k)` the time of the
    model whose sub-layers of kind :math:`u` keep :math:`k` units and whose others keep none, :math:`t(0)` the time
    without any unit, and :math:`L_u` sub-layers of kind :math:`u`,

    .. math:: T = t(0) + c \sum_{l} \frac{t_{u(l)}(k_l) - t(0)}{L_{u(l)}}

    where :math:`c` makes it exact for the complete model. This is the table of ZipLM (Kurtic et al. 2023).

    Args:
        batch_size: Sequences in a forward.
        length: Tokens of each.
        device: What it ran on, by `device_name`.
        dtype: Type of its weights.
        dense: Seconds of the complete model.
        empty: Seconds of the model without any unit.
        units: Kind of unit -> the numbers of units that were timed, ascending, the complete sub-layer last.
        seconds: Kind of unit -> seconds at each, not falling.
    """

    batch_size: int
    length: int
    device: str
    dtype: str
    dense: float
    empty: float
    units: Mapping[Unit, list[int]]
    seconds: Mapping[Unit, list[float]]

    def is_of(self, model: PreTrainedModel, *, batch_size: int, length: int) -> bool:
        """Tell whether this was measured as a model would be now.

        Args:
            model: A model of the same architecture.
            batch_size: Sequences in a forward.
            length: Tokens of each.

        Returns:
            Whether device, data type and inputs are the same.
        """
        now = (batch_size, length, device_name(model.device), str(model.dtype))
        return (self.batch_size, self.length, self.device, self.dtype) == now

    def predict(self, sublayers: list[Sublayer], counts: UnitCounts) -> float:
        """Look up a structure.

        Args:
            sublayers: The sub-layers of the model.
            counts: Units left.

        Returns:
            Seconds of one forward.
        """
        own = {unit: sum(part.unit is unit for part in sublayers) for unit in self.units}
        added = sum(
            self._added(part.unit, counts.get(part.path, part.num_units)) / own[part.unit] for part in sublayers
        )
        complete = sum(self.seconds[unit][-1] - self.empty for unit in self.units)
        return self.empty + (self.dense - self.empty) * added / complete

    def _added(self, unit: Unit, count: float) -> float:
        """Seconds that this many units in every sub-layer of the kind add to the empty model."""
        seconds = np.interp(count, [0, *self.units[unit]], [self.empty, *self.seconds[unit]])
        return float(seconds) - self.empty

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LatencyTable":
        """Read what `to_json` gives.

        Args:
            value: A table as JSON types.

        Returns:
            The table.
        """
        by_unit = {name: {Unit(unit): row for unit, row in value[name].items()} for name in ("units", "seconds")}
        return cls(**{**value, **by_unit})


def measure_latency_table(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> LatencyTable:
    """Time smaller and smaller copies of a model, each in turns with the complete one.

    Args:
        model: A dense or patched model; only its sizes, data type and device matter.
        inputs: Keyword arguments of a forward; the first one has shape `(batch_size, length)`.

    Returns:
        The table; where the clock says that more units are faster, it takes their mean.

    Raises:
        ValueError: If heads and neurons take no time that can be measured.
    """
    complete = dense_twin(model)
    sizes = {unit: [part.num_units for part in find_sublayers(complete) if part.unit is unit] for unit in Unit}
    units = {unit: _numbers(max(counts)) for unit, counts in sizes.items() if counts}
    dense: list[float] = []

    def timed(kept: dict[Unit, int]) -> float:
        """Seconds relative to the complete model of the same turns, as the clock drifts."""
        smaller = prune_model_(dense_twin(model), _keep_first(complete, kept))
        seconds = measure_latency({"complete": complete, "smaller": smaller}, inputs)
        dense.append(seconds["complete"])
        return seconds["smaller"] / seconds["complete"]

    none = dict.fromkeys(units, 0)
    empty = timed(none)
    relative = {
        unit: isotonic_regression([empty, *(timed({**none, unit: count}) for count in counts)]).x
        for unit, counts in units.items()
    }
    empty = min(float(values[0]) for values in relative.values())
    if empty >= 1 or all(values[-1] <= empty for values in relative.values()):
        raise ValueError(
            "Heads and neurons take no time that can be measured here: expected a forward that is slower with them. "
            "Raise `latency_batch_size`, or ask for a speed-up in multiply-accumulates."
        )
    scale = float(np.median(dense))
    batch_size, length = next(iter(inputs.values())).shape[:2]
    return LatencyTable(
        batch_size=batch_size,
        length=length,
        device=device_name(model.device),
        dtype=str(model.dtype),
        dense=scale,
        empty=scale * empty,
        units=units,
        seconds={unit: (scale * values[1:]).tolist() for unit, values in relative.items()},
    )


def _numbers(num_units: int) -> list[int]:
    return sorted({max(1, round(share * num_units)) for share in SHARES})


def _keep_first(model: PreTrainedModel, kept: Mapping[Unit, int]) -> RelevanceMask:
    """Keep the first units of every sub-layer; which they are does not change the time."""
    return RelevanceMask({
        part.path: (torch.arange(part.num_units // part.num_experts) < _num_kept(part, kept) / part.num_experts)
        .repeat(part.num_experts)
        .expand(len(part.sides), -1)
        .clone()
        for part in find_sublayers(model)
    })


def _num_kept(sublayer: Sublayer, kept: Mapping[Unit, int]) -> int:
    return max(kept[sublayer.unit], sublayer.minimum)
