# SPDX-License-Identifier: Apache-2.0
"""How a figure looks: its colours, canvas and axes, and the way to a PNG file or into a page."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


__all__ = ["DARK", "LIGHT", "TEXT_SIZE", "Drawing", "canvas", "save_drawings", "to_svg"]

#: Colours by role. Each is used for one role only, so that a page can put its own in their place.
LIGHT: Mapping[str, str] = MappingProxyType({
    "ground": "#ffffff",
    "ink": "#1b2130",
    "muted": "#626b7d",
    "line": "#d9dee7",
    "gone": "#e6e9f0",
    "band": "#f4f6fa",
    "first": "#2d5fc4",
    "second": "#c8651b",
    "third": "#4d8b73",
})

#: The same roles on a dark ground.
DARK: Mapping[str, str] = MappingProxyType({
    "ground": "#191d25",
    "ink": "#e7eaf0",
    "muted": "#9aa4b6",
    "line": "#353c4a",
    "gone": "#2e3441",
    "band": "#20252f",
    "first": "#82aaff",
    "second": "#f0a15f",
    "third": "#83c7ab",
})

#: Width of every figure in inches; on a page it is scaled.
WIDTH = 4.6

#: Sizes of letters in points: of titles, and of all else.
TITLE_SIZE, TEXT_SIZE = 10.5, 8.5

#: Dots per inch of a PNG, and inches of ground around the figure in it.
RESOLUTION, MARGIN = 200, 0.12


@dataclass(frozen=True)
class Drawing:
    """A figure, and what it shows in words.

    Args:
        name: Name of its file, without ending.
        title: What it is about.
        caption: What it shows, in a sentence or two.
        numbers: What it says to those who see it, for those who do not; empty where that is too much.
        figure: The figure in light colours.
    """

    name: str
    title: str
    caption: str
    numbers: str
    figure: Figure

    @property
    def description(self) -> str:
        """All that can be said of it."""
        return f"{self.title}. {self.caption} {self.numbers}".strip()


def canvas(title: str, height: float) -> tuple[Figure, Axes]:
    """Make an empty figure of the house.

    Args:
        title: Its title.
        height: Its height in inches.

    Returns:
        The figure, and its axes without a frame.
    """
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0, h_pad=0.03))
    figure.suptitle(title, x=0, ha="left", fontsize=TITLE_SIZE, fontweight="bold", color=LIGHT["ink"])
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.tick_params(which="both", length=0, labelsize=TEXT_SIZE, labelcolor=LIGHT["muted"])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def to_svg(drawing: Drawing) -> str:
    """Write a figure as an element of a page, which gives it its colours and its font.

    Args:
        drawing: The figure.

    Returns:
        An `svg` element; its colours are CSS variables called like the roles, such as `var(--ink)`, and no identifier
        in it is in another figure of another name.
    """
    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|font-family: [^;\"]+;? ?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    for role, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg


def save_drawings(drawings: Iterable[Drawing], folder: Path) -> None:
    """Write figures as PNG files, in light colours.

    Args:
        drawings: The figures.
        folder: Where to; it is made if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        drawing.figure.savefig(
            folder / f"{drawing.name}.png",
            dpi=RESOLUTION,
            facecolor=LIGHT["ground"],
            bbox_inches=drawing.figure.bbox_inches.padded(MARGIN),
            metadata={"Software": None},
        )
