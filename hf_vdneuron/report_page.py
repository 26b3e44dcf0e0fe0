# SPDX-License-Identifier: Apache-2.0
"""The page a run is looked at on: one file without scripts that loads nothing from anywhere, light and dark."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_vdneuron.drawing import DARK, LIGHT, Drawing, to_svg
from hf_vdneuron.report import RunReport
from hf_vdneuron.wording import named, percent


__all__ = ["render_page"]

#: The template, beside this module.
TEMPLATE = "report_page.html"

#: Names of the figures in each section of the page; those that are named nowhere tell of training.
RESULT, REMOVED = ("score", "cost", "sizes"), ("heads", "neurons")


def render_page(
    report: RunReport, drawings: Iterable[Drawing], *, architecture: str, repo_id: str, is_cut: bool
) -> str:
    """Write the page of a run.

    Args:
        report: What came out of the run.
        drawings: Its figures.
        architecture: Name of the model's class, such as `BertForSequenceClassification`.
        repo_id: Where the model will live, a repository or a folder.
        is_cut: Whether layers are smaller than its config says.

    Returns:
        HTML in which every string of the report is escaped.
    """
    by_name = {drawing.name: drawing for drawing in drawings}
    sections = {
        "result": [by_name.pop(name) for name in RESULT if name in by_name],
        "removed": [by_name.pop(name) for name in REMOVED if name in by_name],
        "training": list(by_name.values()),
    }
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            report=report,
            sections=sections,
            architecture=architecture,
            repo_id=repo_id,
            is_cut=is_cut,
            light=LIGHT,
            dark=DARK,
            to_svg=_svg_markup,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(_FILTERS)
    return environment


def _svg_markup(drawing: Drawing) -> Markup:
    """A figure holds no string of the report but numbers, and matplotlib escapes its texts."""
    return Markup(to_svg(drawing))


# ---- How the template writes numbers and strings ----


def _points(before: float | None, after: float | None) -> str:
    """Write the way from one score to another."""
    if before is None or after is None:
        return "change not measured"
    return f"{_signed(100 * (after - before), 2)} points"


def _change(before: int, after: int) -> str:
    return f"{_signed(100 * (after / before - 1), 0)} %"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _counted(count: int) -> str:
    return f"{count:,}"


def _short(count: int) -> str:
    """Write a count with three or four digits."""
    return next(
        (f"{count / unit:.1f} {sign}" for unit, sign in ((1e9, "B"), (1e6, "M")) if count >= unit), f"{count:,}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest if not hours else 0, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "less than a second"


def _metrics(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {percent(value)}" for name, value in values.items())


def _quoted(text: str) -> str:
    """Write a string as Python does."""
    return json.dumps(text, ensure_ascii=False)


_FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "points": _points,
    "change": _change,
    "counted": _counted,
    "short": _short,
    "duration": _duration,
    "named": named,
    "metrics": _metrics,
    "quoted": _quoted,
}
