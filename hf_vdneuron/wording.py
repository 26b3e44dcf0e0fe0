# SPDX-License-Identifier: Apache-2.0
"""How numbers are written for people, wherever a run is told of."""

from collections.abc import Mapping


__all__ = ["named", "percent"]


def percent(share: float | None, digits: int = 2, *, missing: str = "not measured") -> str:
    """Write a share in percent, without the sign.

    Args:
        share: The share, None if there is none.
        digits: Digits behind the point.
        missing: What stands for None.

    Returns:
        The text.

    Example:
        >>> percent(0.7528), percent(None)
        ('75.28', 'not measured')
    """
    return missing if share is None else f"{100 * share:.{digits}f}"


def named(values: Mapping[str, object]) -> str:
    """Write values behind their names.

    Args:
        values: Name -> value.

    Returns:
        The text.

    Example:
        >>> named({"python": "3.11", "torch": "2.13"})
        'python 3.11, torch 2.13'
    """
    return ", ".join(f"{name} {value}" for name, value in values.items())
