# SPDX-License-Identifier: Apache-2.0
"""The options that say what a run shall arrive at, or what it may cost, and in which numbers of heads and neurons."""

from dataclasses import dataclass, field
from enum import StrEnum

from hf_vdneuron.selection import Alignment, Layout


__all__ = ["GoalArguments", "SpeedupFrom"]

#: The options that say what to arrive at, and those that say what it may cost. At most one of all is set.
_TARGETS = ("target_speedup", "target_sparsity", "target_params")
_TOLERANCES = ("max_metric_drop", "max_loss_increase")


class SpeedupFrom(StrEnum):
    """What a speed-up is a ratio of."""

    MACS = "macs"
    """Multiply-accumulates of heads and neurons: the same everywhere."""
    LATENCY = "latency"
    """Seconds of a forward of the whole model, measured on the device of the run."""


@dataclass
class GoalArguments:
    """What a run is asked for. At most one of the targets and tolerances is set."""

    target_speedup: float | None = field(
        default=None,
        metadata={"help": "How many times faster the heads and neurons shall be, above 1. Counted by `speedup_from`."},
    )
    speedup_from: SpeedupFrom = field(
        default=SpeedupFrom.MACS,
        metadata={
            "help": "What a speed-up is a ratio of: multiply-accumulates of heads and neurons (macs), or seconds of a "
            "forward of the whole model, measured on the device of the run (latency)."
        },
    )
    latency_batch_size: int = field(
        default=1, metadata={"help": "Sequences in a forward whose latency is measured for `speedup_from`."}
    )
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Share of the weights of heads and neurons to remove, between 0 and 1."}
    )
    target_params: int | None = field(
        default=None, metadata={"help": "How many parameters the whole model may have in the end."}
    )
    max_metric_drop: float | None = field(
        default=None,
        metadata={
            "help": "How much worse than the dense model's `metric_for_best_model` may be on the evaluation set, in "
            "its own units (0.01 is a point of accuracy): sizes are cut, recovered and judged one after the other, "
            "and the smallest within it is kept."
        },
    )
    max_loss_increase: float | None = field(
        default=None, metadata={"help": "The same for the loss of an evaluation, in nats."}
    )

    num_sizes: int = field(
        default=5,
        metadata={
            "help": "How many sizes a tolerance tries, each in an equal part of the recovery with a warm-up and decay "
            "of its own."
        },
    )
    layout: Layout = field(
        default=Layout.FREE,
        metadata={
            "help": "Whether each layer keeps as much as is worth it (free), or all of them as many heads and as many "
            "neurons (uniform), as a config with one number for all can say. Needs a target or a tolerance."
        },
    )
    round_heads_to: int = field(
        default=1, metadata={"help": "What the number of heads that a layer keeps shall be a multiple of."}
    )
    round_neurons_to: int = field(
        default=1, metadata={"help": "The same for its neurons; 8, 16 or 64 suit the kernels of most devices."}
    )

    @property
    def target(self) -> str | None:
        """Name of the target that is set, None if there is none.

        Raises:
            ValueError: If there are several.
        """
        given = [name for name in (*_TARGETS, *_TOLERANCES) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in given)} are set: expected at most one target.")
        return given[0] if given and given[0] in _TARGETS else None

    @property
    def tolerance_name(self) -> str | None:
        """Name of the tolerance that is set, None if there is none."""
        return next((name for name in _TOLERANCES if getattr(self, name) is not None), None)

    @property
    def asked(self) -> str | None:
        """Name of the target or tolerance that is set, None if the dropout-rate rule decides."""
        return self.target or self.tolerance_name

    @property
    def alignment(self) -> Alignment:
        """Which numbers of heads and neurons a cut may leave."""
        return Alignment(self.layout, self.round_heads_to, self.round_neurons_to)
