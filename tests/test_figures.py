"""Figures of a run hold the numbers of its report."""

from dataclasses import replace
from itertools import pairwise
from math import log

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch
from reports import HEADS, LAYERS, NEURONS, PHASES, make_report

from hf_vdneuron.drawing import LIGHT, Drawing
from hf_vdneuron.figures import SQUARE, draw_run
from hf_vdneuron.report import Curve, ModelReport, RunReport, SizesReport, TrainingReport
from hf_vdneuron.schedules import PhasePlan


REPORT = make_report()


def drawings(report: RunReport = REPORT) -> dict[str, Drawing]:
    return {drawing.name: drawing for drawing in draw_run(report)}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawing]:
    return drawings()


def axes_of(drawing: Drawing) -> Axes:
    (axes,) = drawing.figure.axes
    return axes


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def widths(axes: Axes, colour: str) -> list[float]:
    """Widths of the bars of one colour, from the first row to the last."""
    bars = [bar for bars in axes.containers for bar in bars if to_hex(bar.get_facecolor()) == LIGHT[colour]]
    return [bar.get_width() for bar in bars]


def test_a_run_is_told_in_order(drawn: dict[str, Drawing]) -> None:
    assert list(drawn) == [
        *("heads", "neurons", "cost", "score"),
        *("loss", "units", "kl", "kl_weight", "speedup", "removal", "dropout_rates"),
    ]
    for drawing in drawn.values():
        assert drawing.title == drawing.figure.get_suptitle()
        assert drawing.caption.endswith(".")


def test_heads_are_a_grid(drawn: dict[str, Drawing]) -> None:
    axes = axes_of(drawn["heads"])
    squares = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    assert len(squares) == LAYERS * HEADS
    filled = [
        (round(square.get_y() + SQUARE / 2), round(square.get_x() + SQUARE / 2))
        for square in squares
        if to_hex(square.get_facecolor()) == LIGHT["first"]
    ]
    assert filled == [(layer, head) for layer, heads in enumerate(REPORT.kept_heads) for head in heads]
    assert texts(axes) == [f"{len(heads)} of {HEADS}" for heads in REPORT.kept_heads]
    assert "41 of 72 remain: 8, 9, 10, 7, 5, 2." in drawn["heads"].numbers


def test_neurons_are_shown_before_and_after(drawn: dict[str, Drawing]) -> None:
    axes, left = axes_of(drawn["neurons"]), REPORT.pruned.neurons_per_layer
    assert widths(axes, "gone") == [1.0] * LAYERS
    assert widths(axes, "first") == [count / NEURONS for count in left]
    assert texts(axes)[0] == "310 of 1,536"
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"layer {layer}" for layer in range(LAYERS)]


def test_costs_are_shares_of_the_dense_ones(drawn: dict[str, Drawing]) -> None:
    dense, pruned, speed = REPORT.dense, REPORT.pruned, REPORT.speedup
    assert widths(axes_of(drawn["cost"]), "first") == [
        pruned.parameters / dense.parameters,
        pruned.bytes / dense.bytes,
        speed.pruned_seconds / speed.dense_seconds,
        1 / speed.predicted,
    ]
    assert texts(axes_of(drawn["cost"])) == ["16.2 M", "64.9 MB", "14.6 ms", "2.56x fewer"]


def test_a_pruned_model_that_is_slower_is_shown_so() -> None:
    slower = replace(REPORT.speedup, pruned_seconds=2 * REPORT.speedup.dense_seconds)
    axes = axes_of(drawings(replace(REPORT, speedup=slower))["cost"])
    assert max(widths(axes, "first")) == 2
    assert axes.get_xlim()[1] > 2


@pytest.mark.parametrize(
    ("after_cut", "expected"),
    [(0.8819, [90.37, 88.19, 89.45]), (None, [90.37, 89.45]), (0.0, [90.37, 0.0, 89.45])],
    ids=["measured", "not measured", "zero"],
)
def test_scores_along_the_way(after_cut: float | None, expected: list[float]) -> None:
    axes = axes_of(drawings(replace(REPORT, score_after_cut=after_cut))["score"])
    (line,) = axes.lines
    assert list(line.get_ydata()) == pytest.approx(expected)
    assert texts(axes) == [f"{score:.2f}" for score in expected]
    assert len(axes.get_xticklabels()) == len(expected)


def lines(axes: Axes) -> dict[str, Curve]:
    """What is drawn, by label; lines without one mark phases."""
    named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    return {
        name: Curve([int(step) for step in line.get_xdata()], [float(value) for value in line.get_ydata()])
        for name, line in named.items()
    }


def test_curves_are_those_of_the_log(drawn: dict[str, Drawing]) -> None:
    logged = REPORT.training.curves
    assert lines(axes_of(drawn["loss"])) == {"labels": logged["nll"], "teacher": logged["distillation"]}
    assert lines(axes_of(drawn["kl"])) == {"KL": logged["kl"]}
    assert lines(axes_of(drawn["speedup"])) == {"speed-up": logged["expected_speedup"]}
    assert lines(axes_of(drawn["removal"])) == {"about to go": logged["expected_removal"]}
    left = lines(axes_of(drawn["units"]))
    assert left["heads"].values == [count / (LAYERS * HEADS) for count in logged["heads"].values]
    assert left["neurons"].values == [count / (LAYERS * NEURONS) for count in logged["neurons"].values]
    assert left["relevant weights"].values == [1 - share for share in logged["irrelevant_weights"].values]


def test_the_kl_weight_is_drawn_where_there_is_one(drawn: dict[str, Drawing]) -> None:
    (curve,) = lines(axes_of(drawn["kl_weight"])).values()
    assert min(curve.steps) > PHASES.sparsify_start
    assert max(curve.steps) <= PHASES.recover_start
    assert axes_of(drawn["kl_weight"]).get_yscale() == "log"


@pytest.mark.parametrize(
    ("values", "scale", "bottom"),
    [([2.0, 2.0], "linear", 0.0), ([1.0, 0.02], "log", 0.02 / 1.1), ([1.0, 1e-9], "log", 1e-3)],
    ids=["stands-still", "falls", "is-braked"],
)
def test_the_axis_of_the_kl_weight(values: list[float], scale: str, bottom: float) -> None:
    training = replace(REPORT.training, curves={"kl_weight": Curve([1, 2], values)})
    axes = axes_of(drawings(replace(REPORT, training=training))["kl_weight"])
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[0] == pytest.approx(bottom)


def test_scores_on_the_way_are_drawn_if_there_are_any() -> None:
    curve = Curve([100, 200], [0.5, 0.75])
    training = replace(REPORT.training, curves={**REPORT.training.curves, "eval_score": curve})
    assert lines(axes_of(drawings(replace(REPORT, training=training))["eval_score"])) == {"score": curve}


@pytest.mark.parametrize(
    ("chosen", "told", "captioned"),
    [
        (1, "the size that was chosen is 2.00 times as fast, at 0.82.", "was chosen."),
        (None, "no size is good enough.", "so nothing was removed."),
    ],
    ids=["one is good enough", "none is"],
)
def test_sizes_to_choose_from(chosen: int | None, told: str, captioned: str) -> None:
    sizes = SizesReport("accuracy", 0.9, 0.8, [1.5, 2.0, 3.0], [0.88, 0.82, 0.6], chosen, 0.85)
    drawing = drawings(replace(REPORT, training=replace(REPORT.training, sizes=sizes)))["sizes"]
    drawn = {line.get_label(): tuple(map(list, line.get_data())) for line in axes_of(drawing).lines}
    assert drawn["tried"] == (sizes.speedups, sizes.values)
    assert (drawn["dense"][1], drawn["limit"][1]) == ([0.9, 0.9], [0.8, 0.8])
    assert drawn.get("chosen") == (([2.0], [0.82]) if chosen is not None else None)
    assert drawing.numbers.endswith(told)
    assert drawing.caption.endswith(captioned)


def test_a_way_that_leads_beyond_the_target_is_seen_to_its_end() -> None:
    training = replace(REPORT.training, curves={"expected_removal": Curve([400, 500], [-0.05, 1.2])})
    low, high = axes_of(drawings(replace(REPORT, training=training))["removal"]).get_ylim()
    assert low <= -0.05
    assert high >= 1.2


def test_phases_are_marked(drawn: dict[str, Drawing]) -> None:
    for name in ("loss", "units", "kl", "kl_weight", "speedup", "removal"):
        axes = axes_of(drawn[name])
        assert axes.get_xlim() == (0, 1000)
        assert texts(axes) == ["fine-tune", "sparsify", "recover"]
        assert [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")] == [300, 800]
        (band,) = axes.patches
        assert (band.get_x(), band.get_width()) == (300, 500)


def test_a_phase_without_room_goes_unnamed() -> None:
    training = replace(REPORT.training, phases=PhasePlan(0, 950, 50))
    assert texts(axes_of(drawings(replace(REPORT, training=training))["loss"])) == ["sparsify"]


def test_dropout_rates_are_a_stacked_histogram(drawn: dict[str, Drawing]) -> None:
    axes, rates = axes_of(drawn["dropout_rates"]), REPORT.training.dropout_rates
    total = sum(map(sum, rates.counts.values()))
    heads, neurons = axes.containers
    for bars, unit in ((heads, "head"), (neurons, "neuron")):
        assert [bar.get_height() for bar in bars] == pytest.approx([count / total for count in rates.counts[unit]])
    assert [bar.get_y() for bar in neurons] == [bar.get_height() for bar in heads]
    assert [bar.get_x() for bar in heads] == rates.log_alpha_edges[:-1]
    (line,) = axes.lines
    assert line.get_xdata()[0] == pytest.approx(log(99))
    irrelevant = sum(
        sum(counts[index] for counts in rates.counts.values())
        for index, (low, high) in enumerate(pairwise(rates.log_alpha_edges))
        if (low + high) / 2 > log(99)
    )
    assert drawn["dropout_rates"].numbers == f"{irrelevant / total:.0%} of the weights are irrelevant."


def test_what_was_not_measured_is_not_drawn() -> None:
    bare = replace(
        REPORT,
        dense=replace(REPORT.dense, score=None),
        pruned=replace(REPORT.pruned, score=None),
        score_after_cut=None,
        training=TrainingReport(PhasePlan(0, 0, 10), {}, None),
    )
    assert list(drawings(bare)) == ["heads", "neurons", "cost"]


@pytest.mark.parametrize("num_heads", [0, 1, 40], ids=str)
def test_any_number_of_heads_has_room(num_heads: int) -> None:
    sizes = [num_heads] * 2
    report = replace(
        REPORT,
        dense=ModelReport(None, "fp32", 10, 40, sizes, [0, 3]),
        pruned=ModelReport(None, "fp32", 10, 40, sizes, [0, 0]),
        kept_heads=[list(range(num_heads))] * 2,
    )
    drawn = drawings(report)
    assert widths(axes_of(drawn["neurons"]), "first") == [0, 0]
    left, right = axes_of(drawn["heads"]).get_xlim()
    assert left < -0.5
    assert right > max(0, num_heads - 0.5)
