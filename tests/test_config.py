"""What can be configured, and how it travels as JSON."""

import json
import re
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.sublayers import Unit


CHANGES: dict[str, Any] = {
    "prior": PriorType.GROUP,
    "grouping": Grouping.COUPLED,
    "group_scale": False,
    "query_key": True,
    "heads": False,
    "neurons": False,
    "include": ["*.layer.0.*", "*.layer.2.*"],
    "exclude": ["*.attention"],
    "initial_log_var": -8.5,
}


def test_changes_cover_every_field() -> None:
    assert set(CHANGES) == {known.name for known in fields(VDConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_json_keeps_each_field(name: str) -> None:
    config = VDConfig(**{name: CHANGES[name]})
    assert getattr(config, name) != getattr(VDConfig(), name)
    assert VDConfig.from_json(config.to_json()) == config


def test_json_says_its_version_and_holds_plain_values() -> None:
    values = json.loads(VDConfig().to_json())
    assert values["version"] == 1
    assert values["prior"] == "mixture"
    assert values["include"] is None


def test_enums_and_patterns_are_normalised() -> None:
    config = VDConfig(prior="group", grouping="rows", include=("a", "b"), exclude=("c",))  # type: ignore[arg-type]
    assert config.prior is PriorType.GROUP
    assert config.grouping is Grouping.ROWS
    assert (config.include, config.exclude) == (["a", "b"], ["c"])


def test_config_is_frozen_and_explains_every_field() -> None:
    with pytest.raises(FrozenInstanceError):
        VDConfig().heads = False  # type: ignore[misc]
    assert all(known.metadata["help"] for known in fields(VDConfig))


@pytest.mark.parametrize(
    ("heads", "neurons", "units"),
    [
        pytest.param(True, True, (Unit.HEAD, Unit.NEURON), id="both"),
        pytest.param(True, False, (Unit.HEAD,), id="heads_only"),
        pytest.param(False, True, (Unit.NEURON,), id="neurons_only"),
    ],
)
def test_units_follow_the_two_switches(heads: bool, neurons: bool, units: tuple[Unit, ...]) -> None:
    assert VDConfig(heads=heads, neurons=neurons).units == units


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"prior": "laplace"}, "laplace", id="unknown_prior"),
        pytest.param({"grouping": "columns"}, "columns", id="unknown_grouping"),
        pytest.param({"heads": False, "neurons": False}, "`heads` and `neurons`", id="nothing_left"),
        pytest.param({"include": "*.attention"}, "`include`", id="one_string_as_include"),
        pytest.param({"exclude": [3]}, "`exclude`", id="number_as_pattern"),
        pytest.param({"initial_log_var": float("nan")}, "`initial_log_var`", id="nan"),
        pytest.param({"initial_log_var": float("-inf")}, "`initial_log_var`", id="infinite"),
        pytest.param({"initial_log_var": 10**400}, "`initial_log_var`", id="beyond_floats"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VDConfig(**changes)


ANYTHING = [None, True, 3, 0.5, "x", "", ["x"], [3], [[]], {"x": 1}]
TAKEN: dict[str, list[object]] = {
    "prior": [],
    "grouping": [],
    "include": [None, ["x"]],
    "exclude": [["x"]],
    "initial_log_var": [3, 0.5],
    **{switch: [True] for switch in ("group_scale", "query_key", "heads", "neurons")},
}
REFUSED = [
    pytest.param(name, value, id=f"{name}={value!r}")
    for name in CHANGES
    for value in ANYTHING
    if not any(type(value) is type(taken) and value == taken for taken in TAKEN[name])
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_of_another_type_is_refused_constructed_or_read(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` is {re.escape(repr(value))}: expected"):
        VDConfig(**{name: value})
    with pytest.raises(ValueError, match=rf"^`{name}` is {re.escape(repr(value))}: expected"):
        VDConfig.from_json(changed_json(**{name: value}))


def test_errors_say_what_is_expected() -> None:
    with pytest.raises(ValueError, match=r"`prior` is 'laplace': expected one of `group`, `mixture`, `weight`\."):
        VDConfig(prior="laplace")  # type: ignore[arg-type]


def changed_json(**changes: object) -> str:
    return json.dumps({**json.loads(VDConfig().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "must be JSON", id="damaged"),
        pytest.param("[1]", "`version` 1", id="no_object"),
        pytest.param("{}", "`version` 1", id="no_version"),
        pytest.param(changed_json(version=2), "`version` 1", id="newer_version"),
        pytest.param(changed_json(version=True), "`version` 1", id="true_as_version"),
        pytest.param(changed_json(version=[]), "`version` 1", id="list_as_version"),
        pytest.param(changed_json(include=3), "`include`", id="number_as_include"),
        pytest.param(changed_json(heads="no"), "`heads`", id="word_as_switch"),
        pytest.param(changed_json(sigma=1, rho=2), "has no `rho`, `sigma`", id="unknown_keys"),
    ],
)
def test_bad_json_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VDConfig.from_json(text)
