# SPDX-License-Identifier: Apache-2.0
"""Finished runs: a file that only grows, and the table that is made from it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from benchmarks.cell import DENSE


__all__ = ["Results", "Row", "Run", "latency_table", "lead_table", "score_table"]

Row = dict[str, Any]
#: Task and seed.
TaskAndSeed = tuple[str, int]

#: What settings were before they could be chosen. Rows of that time lack them.
FORMER_SETTINGS: Row = {"distillation": True}


class Run(NamedTuple):
    """What a run is known by, among those with the same settings.

    Args:
        task: Name of its task.
        seed: Its seed.
        method: Name of its method.
        target_speedup: Speed-up of the body that was asked for; None if the dropout-rate rule decides, and if nothing
            is removed.
    """

    task: str
    seed: int
    method: str
    target_speedup: float | None = None

    @property
    def asked(self) -> str:
        """What was asked for, such as "2x"; nothing if nothing was."""
        return _asked(self.target_speedup)


class Results:
    """Finished runs in a file that processes share.

    Args:
        path: The file, one JSON object per line.
        settings: Function from a task to the settings of its runs to look at; rows of others are left alone.
    """

    def __init__(self, path: Path, settings: Callable[[str], Row]) -> None:
        self.path = path
        self.settings = settings

    def rows(self) -> list[Row]:
        """Read the finished runs with these settings.

        Returns:
            Their rows, in the order in which they were finished.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = map(json.loads, lines)
        return [
            row for row in rows if FORMER_SETTINGS | row["settings"] == FORMER_SETTINGS | self.settings(row["task"])
        ]

    def find(self, run: Run) -> Row | None:
        """Look up one run.

        Args:
            run: The run.

        Returns:
            Its row, or None if it is not finished.
        """
        return next((row for row in self.rows() if Run(*(row[name] for name in Run._fields)) == run), None)

    def add(self, row: Row) -> None:
        """Append one run in a single write, so that processes do not mix their lines.

        Args:
            row: The run; its settings are added.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "settings": self.settings(row["task"])}) + "\n")


def score_table(rows: list[Row]) -> str:
    """Write scores and sizes as a Markdown table.

    Args:
        rows: Finished runs.

    Returns:
        Mean and standard error over seeds, one line per task, target and method. The last column is the score beyond
        the dense checkpoint of the same seed.
    """
    dense = _dense_scores(rows)
    lines = [
        "| task | asked for | method | seeds | body weights left | after the cut | score | against dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, target, method), runs in _grouped(rows, "task", "target_speedup", "method").items():
        full = max(row["body_weights"] for row in rows)
        paired = [100 * row["score"] - dense[task, row["seed"]] for row in runs if (task, row["seed"]) in dense]
        cells = [
            _spread([100 * row["body_weights"] / full for row in runs], " %"),
            _spread([100 * row["score_after_cut"] for row in runs]),
            _spread([100 * row["score"] for row in runs]),
            _spread(paired),
        ]
        lines.append(f"| {task} | {_asked(target)} | {method} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lead_table(rows: list[Row], ours: str) -> str:
    """Sum up over tasks how much of the dense score each method keeps where a target was set, and the lead of ours.

    Args:
        rows: Finished runs.
        ours: Name of our method.

    Returns:
        A Markdown table with a line per target and method, over the tasks and seeds that both it and ours have run on.
        Shares of the dense score are means over tasks of means over seeds; leads are in points, paired by task and
        seed, with their standard error over pairs.
    """
    scores = {Run(*(row[name] for name in Run._fields)): 100 * row["score"] for row in rows}
    dense = _dense_scores(rows)
    targets = sorted({(run.target_speedup, run.method) for run in scores if run.target_speedup is not None})
    lines = [
        f"| asked for | method | tasks | runs | dense score kept | by {ours} | lead of {ours} |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, method in targets:
        cells = [(run.task, run.seed) for run in scores if (run.target_speedup, run.method) == (target, method)]
        pairs = [cell for cell in cells if Run(*cell, ours, target) in scores]
        if not pairs:
            continue
        kept = [_share({cell: scores[Run(*cell, name, target)] for cell in pairs}, dense) for name in (method, ours)]
        lead = _spread([scores[Run(*cell, ours, target)] - scores[Run(*cell, method, target)] for cell in pairs])
        values = [kept[0], "", ""] if method == ours else [*kept, lead]
        counts = [str(len({task for task, _ in pairs})), str(len(pairs))]
        lines.append(f"| {' | '.join([_asked(target), method, *counts, *values])} |")
    return "\n".join(lines)


def _dense_scores(rows: list[Row]) -> dict[TaskAndSeed, float]:
    """Look up what each dense checkpoint scores, in percent."""
    return {(row["task"], row["seed"]): 100 * row["score"] for row in rows if row["method"] == DENSE}


def _share(scores: Mapping[TaskAndSeed, float], dense: Mapping[TaskAndSeed, float]) -> str:
    """Write which share of the dense scores is kept; of one that is not above 0 there is none."""
    shares: dict[str, list[float]] = {}
    for cell, score in scores.items():
        if dense.get(cell, 0.0) > 0:
            shares.setdefault(cell[0], []).append(100 * score / dense[cell])
    return f"{fmean(map(fmean, shares.values())):.1f} %" if shares else "not measured"


def latency_table(rows: list[Row]) -> str:
    """Write speed-ups as a Markdown table.

    Args:
        rows: Finished runs.

    Returns:
        Dense over pruned, predicted for the body and measured for the whole model, one line per task, target,
        method, batch size and length.
    """
    timed = [
        {**row, **timing, "measured": timing["dense"] / timing["pruned"]}
        for row in rows
        if row["method"] != DENSE
        for timing in row["latency"]
    ]
    lines = ["| task | asked for | method | batch | tokens | predicted | measured |", "|---|---|---|---|---|---|---|"]
    groups = _grouped(timed, "task", "target_speedup", "method", "batch_size", "length")
    for (task, target, *key), runs in groups.items():
        speedups = [_spread([row[name] for row in runs], "x") for name in ("predicted", "measured")]
        lines.append(f"| {' | '.join(map(str, (task, _asked(target), *key, *speedups)))} |")
    return "\n".join(lines)


def _asked(target: float | None) -> str:
    """Write what was asked for; nothing if nothing was."""
    return "" if target is None else f"{target:g}x"


def _grouped(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by some of their values, task by task and target by target, in the order of their finish."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (str(row["task"]), row["target_speedup"] or 0.0)):
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _spread(values: list[float], unit: str = "") -> str:
    """Write mean and standard error."""
    if not values:
        return "not measured"
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{error}{unit}"
