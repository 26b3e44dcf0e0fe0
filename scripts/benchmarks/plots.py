# SPDX-License-Identifier: Apache-2.0
"""Pictures of finished runs."""

from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.cell import DENSE
from benchmarks.results import Row
from hf_vdneuron.drawing import LIGHT, TEXT_SIZE, Drawing, canvas, save_drawings
from hf_vdneuron.schedules import removal_path


__all__ = ["draw_courses", "draw_scores"]


class Panel(NamedTuple):
    """What a picture shows.

    Args:
        title: What it is about.
        caption: What it shows, in a sentence.
    """

    title: str
    caption: str


#: One per target.
COLOURS = ("first", "second", "third")
HEIGHT = 2.4

#: Points in which the path is drawn.
PATH_POINTS = 100

#: Curve -> title of its picture and what that shows.
PANELS = {
    "kl_weight": Panel("KL weight", "How hard the KL term pulls."),
    "nll": Panel("Loss", "Negative log-likelihood of the labels with noise, in nats per example."),
    "expected_removal": Panel(
        "On the way to the target", "Share of what has to go that is about to; dashed: the path."
    ),
    "expected_speedup": Panel("Speed-up by the dropout-rate rule", "What the rule alone would give, before the cut."),
}


SCORES = Panel(
    "Score against speed",
    "Mean and standard error over seeds, in percent; dashed: the dense model. Speed-ups are "
    "measured on the largest batch.",
)
SCORES_HEIGHT = 3.0

#: Whose courses are drawn.
STEERED = "vd"

#: Ours stand out.
OUR_COLOURS = {"vd": "first", "vd_group": "second", "vd_closed": "third"}

#: All others are told apart by their points.
MARKERS = {
    "vd_weight": ".",
    "vd_oneshot": "2",
    "vd_rows": "<",
    "vd_coupled": ">",
    "vd_query_key": "p",
    "vd_no_scale": "h",
    "magnitude": "s",
    "taylor": "^",
    "fisher": "v",
    "fisher_oneshot": "1",
    "l0": "D",
    "movement": "P",
    "torch_pruning": "*",
    "layers": "_",
    "random": "x",
}


def draw_courses(rows: list[Row], folder: Path) -> None:
    """Draw how posteriors with the default prior were steered, a file per task and curve that all runs have.

    A line is a seed.

    Args:
        rows: Finished runs.
        folder: Where the files go.

    Raises:
        ValueError: If a task has more targets than there are colours.
    """
    steered = [row for row in rows if row["method"] == STEERED and row["target_speedup"] is not None]
    steered = [row for row in steered if row.get("courses")]
    for task in sorted({row["task"] for row in steered}):
        runs = [row for row in steered if row["task"] == task]
        targets = sorted({row["target_speedup"] for row in runs})
        if len(targets) > len(COLOURS):
            raise ValueError(f"{task} has runs at {targets}: expected at most {len(COLOURS)} targets in a picture")
        known = [name for name in PANELS if all(name in row["courses"] for row in runs)]
        save_drawings([_draw(name, task, runs) for name in known], folder)


def draw_scores(rows: list[Row], folder: Path) -> None:
    """Draw score against measured speed-up, a file per task and a line per method, where speed-ups were asked for.

    Args:
        rows: Finished runs.
        folder: Where the files go.
    """
    asked = [row for row in rows if row["target_speedup"] is not None]
    drawings = []
    for task in sorted({row["task"] for row in asked}):
        figure, axes = canvas(f"{SCORES.title}, {task}", SCORES_HEIGHT)
        dense = [100 * row["score"] for row in rows if (row["task"], row["method"]) == (task, DENSE)]
        if dense:
            axes.axhline(fmean(dense), lw=0.8, ls="--", color=LIGHT["ink"], label=DENSE)
        methods = dict.fromkeys(row["method"] for row in asked if row["task"] == task)
        # Ours last, so that they lie on top.
        for method in sorted(methods, key=lambda name: (name in OUR_COLOURS, name)):
            _draw_method(axes, method, [row for row in asked if (row["task"], row["method"]) == (task, method)])
        axes.grid(axis="y", color=LIGHT["line"], lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("measured speed-up of the whole model", fontsize=TEXT_SIZE, color=LIGHT["muted"])
        axes.legend(
            frameon=False, fontsize=TEXT_SIZE, labelcolor=LIGHT["muted"], loc="center left", bbox_to_anchor=(1, 0.5)
        )
        drawings.append(Drawing(f"{task}-scores", SCORES.title, SCORES.caption, "", figure))
    save_drawings(drawings, folder)


def _draw_method(axes: Axes, method: str, runs: list[Row]) -> None:
    points = []
    for target in sorted({run["target_speedup"] for run in runs}):
        of_target = [run for run in runs if run["target_speedup"] == target]
        scores = [100 * run["score"] for run in of_target]
        error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        points.append((fmean(map(_measured_speedup, of_target)), fmean(scores), error))
    speedups, scores, errors = zip(*points, strict=True)
    colour = LIGHT[OUR_COLOURS.get(method, "muted")]
    axes.errorbar(
        speedups,
        scores,
        errors,
        color=colour,
        lw=1.6 if method in OUR_COLOURS else 0.9,
        elinewidth=0.8,
        marker=MARKERS.get(method, "o"),
        ms=4,
        label=method,
    )


def _measured_speedup(run: Row) -> float:
    timing = max(run["latency"], key=lambda timing: timing["batch_size"] * timing["length"])
    return float(timing["dense"] / timing["pruned"])


def _draw(name: str, task: str, runs: list[Row]) -> Drawing:
    """Draw one curve of all runs of a task, a colour per target."""
    title, caption = PANELS[name]
    figure, axes = canvas(f"{title}, {task}", HEIGHT)
    steps = runs[0]["settings"]["sparsify_steps"]
    for target, colour in zip(sorted({run["target_speedup"] for run in runs}), COLOURS, strict=False):
        of_target = [run["courses"][name] for run in runs if run["target_speedup"] == target]
        for index, course in enumerate(of_target):
            label = f"{target:g}x" if index == 0 else None
            # The last entry is logged when the phase is over.
            points = [point for point in zip(course["steps"], course["values"], strict=True) if point[0] < steps]
            axes.plot(*zip(*points, strict=True), lw=1.2, color=LIGHT[colour], label=label)
        if name == "expected_speedup":
            axes.axhline(target, lw=0.8, ls="--", color=LIGHT[colour])
    if name == "expected_removal":
        shares = [point / PATH_POINTS for point in range(PATH_POINTS + 1)]
        axes.plot([steps * share for share in shares], [*map(removal_path, shares)], "--", lw=0.8, color=LIGHT["ink"])
    _scale(axes, name, steps)
    axes.legend(frameon=False, fontsize=TEXT_SIZE, labelcolor=LIGHT["muted"], handlelength=1.2)
    return Drawing(f"{task}-{name}", title, caption, "", figure)


def _scale(axes: Axes, name: str, steps: int) -> None:
    """Fit the axes to a curve."""
    axes.grid(axis="y", color=LIGHT["line"], lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(0, steps)
    axes.set_xlabel("step", fontsize=TEXT_SIZE, color=LIGHT["muted"])
    if name == "expected_removal":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
