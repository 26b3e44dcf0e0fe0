# SPDX-License-Identifier: Apache-2.0
"""How much worse than the dense model a smaller one may be."""

import math
from dataclasses import dataclass


__all__ = ["Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """How much worse than the dense model a smaller one may be.

    Args:
        metric: What it is judged by, a metric of the evaluation without its prefix.
        allowed: How far the metric may fall, or rise where small values are better; not negative.
        greater_is_better: Which of the two.
    """

    metric: str
    allowed: float
    greater_is_better: bool

    def limit(self, dense: float) -> float:
        """Tell the worst value that is allowed.

        Args:
            dense: The dense model's value.

        Returns:
            The value.
        """
        return dense - self.allowed if self.greater_is_better else dense + self.allowed

    def allows(self, value: float, dense: float) -> bool:
        """Compare a smaller model with the dense one.

        Args:
            value: Its metric; one that is not a number is never allowed.
            dense: The dense model's.

        Returns:
            Whether it is good enough. A drop from 0.90 to 0.89 is one of 0.01, whatever floating point says.

        Example:
            >>> Tolerance("accuracy", 0.01, greater_is_better=True).allows(0.89, dense=0.90)
            True
        """
        limit = self.limit(dense)
        is_better = value > limit if self.greater_is_better else value < limit
        return is_better or math.isclose(value, limit, rel_tol=1e-9)
