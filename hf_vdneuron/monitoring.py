# SPDX-License-Identifier: Apache-2.0
"""What a sparsifying run says of itself beyond the loss: means over its steps, and what is left of the model."""

from torch import Tensor, nn

from hf_vdneuron.budget import speedup, units_left
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.sublayers import Unit


__all__ = ["RunningMeans", "structure_logs"]


class RunningMeans:
    """Means of named scalars since they were last taken. They stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Count a value in.

        Args:
            name: Name of the mean.
            value: Scalar tensor; its graph is not kept.
        """
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Read the means, and start again.

        Returns:
            Name -> mean of the values since the last call.
        """
        means = {name: total.item() / self._counts[name] for name, total in self._sums.items()}
        self.clear()
        return means

    def clear(self) -> None:
        """Start again."""
        self._sums.clear()
        self._counts.clear()


def structure_logs(model: nn.Module, mask: RelevanceMask, *, length: int) -> dict[str, float]:
    """Tell how small a patched model has become.

    Args:
        model: A patched model.
        mask: What is kept of it.
        length: Tokens of a sequence for the expected speed-up.

    Returns:
        Heads and neurons left, expected speed-up.
    """
    left = units_left(model, mask)
    return {
        "heads": sum(left[Unit.HEAD]),
        "neurons": sum(left[Unit.NEURON]),
        "expected_speedup": speedup(model, mask, length=length),
    }
