# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run: what was removed, what that saves and costs, and how training went."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from hf_vdneuron.drawing import LIGHT, TEXT_SIZE, Drawing, canvas
from hf_vdneuron.report import DropoutRateReport, RunReport, SizesReport
from hf_vdneuron.schedules import PhasePlan


__all__ = ["draw_run"]

#: Height in inches of a figure of curves, of one row of a figure with rows, and of what such a figure has beside rows.
CURVES_HEIGHT, ROW_HEIGHT, FRAME_HEIGHT = 2.5, 0.26, 0.62

#: Side of a head's square, of 1 for its cell; thickness of a row's bar.
SQUARE, BAR = 0.78, 0.56

#: As many heads in a row as make cells that are as wide as they are high. Fewer leave room, more are narrower.
SQUARE_COLUMNS = 12

#: Dropout rates that are marked along their axis.
MARKED_RATES = (0.001, 0.1, 0.9, 0.99, 0.9999, 0.999999)

#: A phase shorter than this share of the run gets no label, which would not fit.
SHORTEST_LABELLED_PHASE = 0.13

#: Values that differ by more than this factor are drawn on a logarithmic axis.
LOGARITHMIC_FROM = 10

#: Share of the largest value below which a logarithmic axis ends: a KL weight under the brake comes down to nothing.
LEAST_DRAWN = 1e-3


def draw_run(report: RunReport) -> list[Drawing]:
    """Draw everything that a run has data for.

    Args:
        report: What came out.

    Returns:
        The figures in the order in which they tell the story: `heads`, `neurons`, `cost`, `score`, `sizes`, then the
        curves `loss`, `units`, `kl`, `kl_weight`, `speedup`, `removal`, `eval_score`, and `dropout_rates`.
    """
    drawings = [_draw_heads(report), _draw_neurons(report), _draw_cost(report), _draw_score(report)]
    drawings.append(_draw_sizes(report.training.sizes))
    drawings += [_draw_panel(panel, report) for panel in PANELS]
    drawings.append(_draw_dropout_rates(report.training.dropout_rates))
    return [drawing for drawing in drawings if drawing is not None]


# ---- What was removed ----


def _draw_heads(report: RunReport) -> Drawing:
    """One square per head, a row per layer, filled if the head is kept."""
    sizes = report.dense.heads_per_layer
    figure, axes = canvas("Heads kept", FRAME_HEIGHT + ROW_HEIGHT * len(sizes))
    for layer, (size, kept) in enumerate(zip(sizes, report.kept_heads, strict=True)):
        for head in range(size):
            corner = (head - SQUARE / 2, layer - SQUARE / 2)
            colour = LIGHT["first" if head in kept else "gone"]
            axes.add_patch(FancyBboxPatch(corner, SQUARE, SQUARE, "round,pad=0,rounding_size=0.16", lw=0, fc=colour))
    width = max([1, *sizes])
    texts = [f"{len(kept)} of {size}" for size, kept in zip(sizes, report.kept_heads, strict=True)]
    _label_rows(axes, [f"layer {layer}" for layer in range(len(sizes))], texts, right=width - 0.2)
    axes.set_xlim(-0.6, 1.28 * max(width, SQUARE_COLUMNS))
    axes.set_xticks(range(width) if width <= SQUARE_COLUMNS else range(0, width, 4))
    counts = ", ".join(map(str, map(len, report.kept_heads)))
    caption = "Attention heads by layer. Those in colour are kept."
    numbers = f"{sum(map(len, report.kept_heads))} of {sum(sizes)} remain: {counts}."
    return Drawing("heads", "Heads kept", caption, numbers, figure)


def _draw_neurons(report: RunReport) -> Drawing:
    """One bar per layer, filled as far as neurons are kept."""
    sizes, left = report.dense.neurons_per_layer, report.pruned.neurons_per_layer
    figure, axes = canvas("Neurons kept", FRAME_HEIGHT + ROW_HEIGHT * len(sizes))
    shares = [after / max(1, size) for after, size in zip(left, sizes, strict=True)]
    texts = [f"{after:,} of {size:,}" for after, size in zip(left, sizes, strict=True)]
    _draw_bars(axes, [f"layer {layer}" for layer in range(len(sizes))], shares, texts)
    numbers = f"{sum(left):,} of {sum(sizes):,} remain: {', '.join(f'{count:,}' for count in left)}."
    return Drawing("neurons", "Neurons kept", "Feed-forward neurons by layer, before and after.", numbers, figure)


def _draw_bars(axes: Axes, names: Sequence[str], shares: Sequence[float], texts: Sequence[str]) -> None:
    """Bars that reach from 0 to 1, filled as far as the shares go."""
    rows = range(len(names))
    axes.barh(rows, [1.0] * len(names), BAR, color=LIGHT["gone"])
    axes.barh(rows, shares, BAR, color=LIGHT["first"])
    _label_rows(axes, names, texts, right=max([1.0, *shares]) + 0.03)
    axes.set_xlim(0, 1.42 * max([1.0, *shares]))
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _label_rows(axes: Axes, names: Sequence[str], texts: Sequence[str], *, right: float) -> None:
    """Name the rows on their left, and say on their right what they hold."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    for row, text in enumerate(texts):
        axes.text(right, row, text, va="center", fontsize=TEXT_SIZE, color=LIGHT["ink"])


# ---- What that saves and costs ----


def _draw_cost(report: RunReport) -> Drawing:
    """What the pruned model takes of what the dense one took."""
    dense, pruned, speed = report.dense, report.pruned, report.speedup
    rows = {
        "parameters": (dense.parameters, pruned.parameters, _millions),
        "size": (dense.bytes, pruned.bytes, lambda value: f"{1e-6 * value:.1f} MB"),
        "time of a forward": (speed.dense_seconds, speed.pruned_seconds, lambda value: f"{1e3 * value:.1f} ms"),
    }
    names = [*rows, "operations of the body"]
    shares = [after / before for before, after, _ in rows.values()] + [1 / speed.predicted]
    texts = [write(after) for _, after, write in rows.values()] + [f"{speed.predicted:.2f}x fewer"]
    figure, axes = canvas("Cost against the dense model", FRAME_HEIGHT + ROW_HEIGHT * len(names))
    _draw_bars(axes, names, shares, texts)
    told = [f"{name} {write(before)} before, {write(after)} after" for name, (before, after, write) in rows.items()]
    caption = (
        f"Full bars are the dense model. Times are of the whole model in fp32, batch {speed.batch_size}, "
        f"{speed.length} tokens; operations are multiply-accumulates of heads and neurons."
    )
    numbers = f"{'; '.join(told)}; operations of the body {speed.predicted:.2f} times fewer."
    return Drawing("cost", "Cost against the dense model", caption, numbers, figure)


def _millions(count: float) -> str:
    return f"{1e-6 * count:.1f} M" if count >= 1e6 else f"{count:,.0f}"


def _draw_score(report: RunReport) -> Drawing | None:
    """Score of the dense model, right after the cut, and after recovery."""
    milestones = {
        "dense": report.dense.score,
        "right after the cut": report.score_after_cut,
        "after recovery": report.pruned.score,
    }
    known = {name: 100 * score for name, score in milestones.items() if score is not None}
    if not known:
        return None
    figure, axes = canvas("Score", FRAME_HEIGHT + 4 * ROW_HEIGHT)
    values = list(known.values())
    axes.plot(range(len(values)), values, "o-", lw=1.5, ms=6, color=LIGHT["first"], clip_on=False)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:.2f}",
            (place, value),
            (0, -16 if value == min(values) < max(values) else 8),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT_SIZE + 1,
            color=LIGHT["ink"],
        )
    room = max(1.0, max(values) - min(values))
    axes.set_ylim(min(values) - 0.4 * room, max(values) + 0.4 * room)
    axes.set_xlim(-0.35, len(values) - 0.65)
    axes.set_xticks(range(len(values)), list(known))
    axes.yaxis.set_visible(False)
    told = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
    return Drawing("score", "Score", "Mean of the task's metrics, in percent.", f"{told}.", figure)


def _draw_sizes(sizes: SizesReport | None) -> Drawing | None:
    """Metric against speed-up of the sizes that were tried, with the one that was chosen."""
    if sizes is None:
        return None
    title = "Sizes to choose from"
    figure, axes = canvas(title, CURVES_HEIGHT)
    axes.axhline(sizes.dense, lw=1, color=LIGHT["muted"], label="dense")
    axes.axhline(sizes.limit, lw=1, ls="--", color=LIGHT["muted"], label="limit")
    axes.plot(sizes.speedups, sizes.values, "o-", lw=1.5, ms=3.5, color=LIGHT["first"], label="tried")
    told = [f"dense {sizes.dense:.4g}", f"at worst {sizes.limit:.4g} allowed"]
    if sizes.chosen is None:
        told.append("no size is good enough")
        made = "None is within the limit, so nothing was removed."
    else:
        place = sizes.speedups[sizes.chosen]
        axes.plot(
            place, sizes.values[sizes.chosen], "o", ms=9, mfc="none", mew=1.6, color=LIGHT["second"], label="chosen"
        )
        made = "The smallest within the limit was chosen."
        told.append(f"the size that was chosen is {place:.2f} times as fast, at {sizes.values[sizes.chosen]:.4g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlabel("speed-up of heads and neurons", fontsize=TEXT_SIZE, color=LIGHT["muted"])
    axes.grid(axis="y", color=LIGHT["line"], lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=TEXT_SIZE, labelcolor=LIGHT["muted"], handlelength=1.2)
    caption = (
        f"{sizes.metric.capitalize()} of the sizes that were tried, each cut from the last good one and recovered, on "
        f"the rows that choices are made on. {made}"
    )
    return Drawing("sizes", title, caption, f"{'; '.join(told)}.".capitalize(), figure)


# ---- How training went ----


@dataclass(frozen=True)
class Panel:
    """A figure of curves.

    Args:
        name: Name of its file.
        title: What it is about.
        caption: What it shows.
        labels: Name of each curve -> its label.
        transform: Function `(name of a curve, value, report) -> what is drawn`.
        in_percent: Whether that is a share.
        only_positive: Whether zeros are left out, as where there is no KL term.
    """

    name: str
    title: str
    caption: str
    labels: dict[str, str]
    transform: Callable[[str, float, RunReport], float] = lambda name, value, report: value
    in_percent: bool = False
    only_positive: bool = False


def _share_kept(name: str, value: float, report: RunReport) -> float:
    """Turn a count of units into a share of the dense model's, and the share of irrelevant weights into the rest."""
    sizes = {"heads": report.dense.heads_per_layer, "neurons": report.dense.neurons_per_layer}
    return value / max(1, sum(sizes[name])) if name in sizes else 1 - value


PANELS = (
    Panel(
        "loss",
        "Loss",
        "Negative log-likelihood of the labels, and the teacher's loss, in nats per example.",
        {"nll": "labels", "distillation": "teacher"},
    ),
    Panel(
        "units",
        "What is left",
        "Heads and neurons that would be kept, and of a posterior that is trained the weights whose dropout rate is "
        "below the threshold.",
        {"heads": "heads", "neurons": "neurons", "irrelevant_weights": "relevant weights"},
        _share_kept,
        in_percent=True,
    ),
    Panel("kl", "KL divergence", "From posterior to prior, in nats per example.", {"kl": "KL"}),
    Panel("kl_weight", "KL weight", "How hard the KL term pulls.", {"kl_weight": "weight"}, only_positive=True),
    Panel(
        "speedup",
        "Expected speed-up",
        "Dense over kept multiply-accumulates of heads and neurons.",
        {"expected_speedup": "speed-up"},
    ),
    Panel(
        "removal",
        "On the way to the target",
        "Share of what has to go that the posterior is about to let go.",
        {"expected_removal": "about to go"},
        in_percent=True,
    ),
    Panel(
        "eval_score",
        "Score on the development split",
        "Mean of the task's metrics on rows cut from the training set.",
        {"eval_score": "score"},
        in_percent=True,
    ),
)


def _draw_panel(panel: Panel, report: RunReport) -> Drawing | None:
    curves = {}
    for name in panel.labels.keys() & report.training.curves.keys():
        curve = report.training.curves[name]
        points = [
            (step, panel.transform(name, value, report))
            for step, value in zip(curve.steps, curve.values, strict=True)
            if value > 0 or not panel.only_positive
        ]
        if points:
            curves[name] = points
    if not curves:
        return None
    figure, axes = canvas(panel.title, CURVES_HEIGHT)
    _mark_phases(axes, report.training.phases)
    for (name, label), colour in zip(panel.labels.items(), ("first", "second", "third"), strict=False):
        if name in curves:
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, values, lw=1.6, marker="o", ms=2.2, color=LIGHT[colour], label=label)
    if len(panel.labels) > 1:
        axes.legend(frameon=False, fontsize=TEXT_SIZE, labelcolor=LIGHT["muted"], handlelength=1.2)
    _scale(axes, [value for points in curves.values() for _, value in points], panel)
    return Drawing(panel.name, panel.title, panel.caption, "", figure)


def _scale(axes: Axes, values: Sequence[float], panel: Panel) -> None:
    """Fit the vertical axis to the values."""
    axes.grid(axis="y", color=LIGHT["line"], lw=0.6)
    axes.set_axisbelow(True)
    if panel.only_positive and max(values) > LOGARITHMIC_FROM * min(values):
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(values) / 1.1, LEAST_DRAWN * max(values)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif panel.in_percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(min(0.0, *values), 1.04 * max(1.0, *values))
    else:
        if panel.only_positive:  # one that stands still would be drawn in its last digits
            axes.set_ylim(0, 1.1 * max(values))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_phases(axes: Axes, phases: PhasePlan) -> None:
    """Shade the sparsification, and name the phases."""
    bounds = [0, phases.sparsify_start, phases.recover_start, phases.recover_start + phases.recover_steps]
    axes.set_xlim(0, max(1, bounds[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", fontsize=TEXT_SIZE, color=LIGHT["muted"])
    axes.axvspan(bounds[1], bounds[2], color=LIGHT["band"], lw=0, zorder=0)
    for bound in bounds[1:3]:
        axes.axvline(bound, color=LIGHT["line"], lw=0.8, zorder=1)
    for name, (start, end) in zip(("fine-tune", "sparsify", "recover"), pairwise(bounds), strict=True):
        if end - start >= SHORTEST_LABELLED_PHASE * bounds[-1]:
            axes.annotate(
                name,
                ((start + end) / 2, 1),
                (0, 3),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                fontsize=TEXT_SIZE,
                color=LIGHT["muted"],
            )


def _draw_dropout_rates(rates: DropoutRateReport | None) -> Drawing | None:
    """Histogram over the logit of the dropout rate, stacked by kind of unit."""
    if rates is None or not rates.counts:
        return None
    title, edges = "Dropout rates", rates.log_alpha_edges
    figure, axes = canvas(title, CURVES_HEIGHT)
    total = sum(map(sum, rates.counts.values()))
    below = [0.0] * (len(edges) - 1)
    for (unit, label), colour in zip(
        {"head": "in heads", "neuron": "in neurons"}.items(), ("first", "second"), strict=True
    ):
        if unit in rates.counts:
            shares = [count / total for count in rates.counts[unit]]
            axes.bar(edges[:-1], shares, edges[1] - edges[0], below, align="edge", color=LIGHT[colour], label=label)
            below = [lower + share for lower, share in zip(below, shares, strict=True)]
    cut = log(rates.threshold / (1 - rates.threshold))
    axes.axvspan(cut, edges[-1], color=LIGHT["band"], lw=0, zorder=0)
    axes.axvline(cut, color=LIGHT["line"], lw=0.8, zorder=1)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks([log(rate / (1 - rate)) for rate in MARKED_RATES], [f"{rate:g}" for rate in MARKED_RATES])
    axes.set_xlabel("dropout rate, on a logit scale", fontsize=TEXT_SIZE, color=LIGHT["muted"])
    axes.grid(axis="y", color=LIGHT["line"], lw=0.6)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(frameon=False, fontsize=TEXT_SIZE, labelcolor=LIGHT["muted"], handlelength=0.8, loc="upper left")
    irrelevant = sum(below[index] for index, edge in enumerate(edges[:-1]) if edge > cut - 1e-9)
    caption = (
        f"Share of the weights by dropout rate when the posterior was last trained, before the cut. Those above "
        f"{rates.threshold:g} (shaded) are irrelevant."
    )
    return Drawing("dropout_rates", title, caption, f"{irrelevant:.0%} of the weights are irrelevant.", figure)
