# SPDX-License-Identifier: Apache-2.0
"""What to patch and how: the posterior, the prior, and what shares it."""

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from hf_vdneuron.sublayers import Unit


__all__ = ["Grouping", "PriorType", "VDConfig"]

#: Name of the config's file beside a model.
FILE_NAME = "vd_config.json"

#: Written to every saved config; a reader refuses a version it does not know.
VERSION = 1

#: Where a pretrained transformer starts: at -10 the noise costs MiniLM 0.007 nats (method: fact 5).
INITIAL_LOG_VAR = -10.0

_Member = TypeVar("_Member", bound=StrEnum)


class PriorType(StrEnum):
    """Family of the prior."""

    GROUP = "group"
    """One Gaussian scale per group (2)."""
    MIXTURE = "mixture"
    """Two Gaussian scales per group (3): a neuron may hold large weights beside small ones."""
    WEIGHT = "weight"
    """One Gaussian scale per weight (10): plain variational dropout, to compare with. It knows no neurons."""


class Grouping(StrEnum):
    """Which slices of a unit share one prior."""

    ROWS = "rows"
    """The in-side alone is variational; its rows share a prior. (2) to the letter."""
    COUPLED = "coupled"
    """All slices of the unit share one prior."""
    SIDES = "sides"
    """Each side of the unit has a prior of its own, and either side can end it."""


@dataclass(frozen=True)
class VDConfig:
    """How a model is made variational.

    Example:
        >>> config = VDConfig(prior="group", exclude=["*.attention"])
        >>> VDConfig.from_json(config.to_json()) == config
        True
    """

    prior: PriorType = field(
        default=PriorType.MIXTURE,
        metadata={
            "help": "Prior of a group's weights: one Gaussian (`group`), a mixture of two (`mixture`), or a Gaussian "
            "for each weight (`weight`), which is plain variational dropout."
        },
    )
    grouping: Grouping = field(
        default=Grouping.SIDES,
        metadata={"help": "Which slices of a head or neuron share one prior: `rows`, `coupled` or `sides`."},
    )
    group_scale: bool = field(
        default=True, metadata={"help": "Whether each group's means get one learned scale of their own."}
    )
    query_key: bool = field(
        default=False,
        metadata={
            "help": "Whether query and key weights are variational too; where one projection makes them and the "
            "values, they always are."
        },
    )
    heads: bool = field(default=True, metadata={"help": "Whether attention heads can be removed."})
    neurons: bool = field(default=True, metadata={"help": "Whether feed-forward neurons can be removed."})
    include: list[str] | None = field(
        default=None,
        metadata={"help": "Patterns of sub-layers to make variational, such as `*.layer.0.*`; all by default."},
    )
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "Patterns of sub-layers to leave alone, such as `*.attention`."}
    )
    initial_log_var: float = field(
        default=INITIAL_LOG_VAR,
        metadata={"help": "Posterior log-variance that every weight starts with, in nats; small means little noise."},
    )

    def __post_init__(self) -> None:
        """Normalise enums and sequences.

        Raises:
            ValueError: If a field has a value of another type or outside its range.
        """
        object.__setattr__(self, "prior", _member("prior", PriorType, self.prior))
        object.__setattr__(self, "grouping", _member("grouping", Grouping, self.grouping))
        object.__setattr__(self, "include", None if self.include is None else _patterns("include", self.include))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        for name in ("group_scale", "query_key", "heads", "neurons"):
            _require_switch(name, getattr(self, name))
        if not (self.heads or self.neurons):
            raise ValueError("`heads` and `neurons` are both false, which leaves nothing to remove: set one of them.")
        _require_number("initial_log_var", self.initial_log_var)

    @property
    def units(self) -> tuple[Unit, ...]:
        """What may be removed."""
        chosen = {Unit.HEAD: self.heads, Unit.NEURON: self.neurons}
        return tuple(unit for unit, wanted in chosen.items() if wanted)

    def to_json(self) -> str:
        """Serialise with a version.

        Returns:
            A JSON object, keys sorted.
        """
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, sort_keys=True)

    def save(self, folder: str | Path) -> None:
        """Put the config beside the model that it patched.

        Args:
            folder: Folder of the model.
        """
        (Path(folder) / FILE_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "VDConfig":
        """Read what `to_json` wrote.

        Args:
            text: A JSON object.

        Returns:
            The config.

        Raises:
            ValueError: If the text is no such object, or has another version, an unknown key or a value that is wrong.
        """
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"A `VDConfig` must be JSON: {error}.") from error
        version = values.pop("version", None) if isinstance(values, dict) else None
        if type(version) is not int or version != VERSION:  # true equals 1
            raise ValueError(f"A `VDConfig` must be a JSON object with `version` {VERSION}: {text[:80]!r}.")
        unknown = sorted(set(values) - {known.name for known in fields(cls)})
        if unknown:
            raise ValueError(f"A `VDConfig` has no {', '.join(f'`{name}`' for name in unknown)}.")
        return cls(**values)


def _member(name: str, kind: type[_Member], value: object) -> _Member:
    for member in kind:
        if member == value:
            return member
    raise ValueError(f"`{name}` is {value!r}: expected one of {', '.join(f'`{member}`' for member in kind)}.")


def _patterns(name: str, patterns: object) -> list[str]:
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"`{name}` is {patterns!r}: expected a list of patterns, such as ['*.layer.0.*'].")
    return list(patterns)


def _require_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` is {value!r}: expected true or false.")


def _require_number(name: str, value: object) -> None:
    # The comparison refuses NaN, and integers that no float can hold.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number:
        raise ValueError(f"`{name}` is {value!r}: expected a finite number, such as -10.")
