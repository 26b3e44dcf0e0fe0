"""The page of a run: it says what came out, loads nothing, executes nothing, and looks right in a real browser."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import dom, needs_browser, screenshot, widths_in
from reports import make_report

from hf_vdneuron.drawing import DARK, LIGHT, Drawing
from hf_vdneuron.figures import draw_run
from hf_vdneuron.report import RunReport, ScoreReport, SizesReport, TrainingReport
from hf_vdneuron.report_page import render_page
from hf_vdneuron.schedules import PhasePlan


REPORT = make_report()

# Each would do something if it were taken for markup, a style or a template.
HOSTILE = (
    "<script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\">",
    "\" onmouseover=\"document.title = 'run'",
    "' autofocus onfocus='document.title = 1",
    "</style></title><script>document.title = 'run'</script>",
    "]]><!-- -->",
    "{{ 7 * 7 }}{% raw %}",
    "modèle ⅔ 模型 🙂",
)
EVERYTHING_HOSTILE = " ".join(HOSTILE)

VOID = {"meta", "link", "br", "img", "input", "hr"}
NEVER = {"script", "iframe", "object", "embed", "img", "form", "base", "video", "audio", "image", "foreignobject"}


def render(report: RunReport = REPORT, drawings: Sequence[Drawing] = (), **changes: Any) -> str:
    names = {"architecture": "BertForSequenceClassification", "repo_id": "me/x", "is_cut": True, **changes}
    return render_page(report, drawings, **names)


def hostile_report() -> RunReport:
    """A report whose every string is hostile."""
    text = EVERYTHING_HOSTILE
    return make_report(
        base_model=text,
        task=text,
        target=text,
        command=text,
        dense=replace(REPORT.dense, precision=text),
        pruned=replace(REPORT.pruned, precision=text),
        evaluation=ScoreReport({text: 0.5}, text, 872, 128, 32),
        seeds={text: 1},
        device=text,
        versions={text: text},
    )


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return draw_run(REPORT)


@pytest.fixture(scope="module")
def page(drawings: list[Drawing]) -> str:
    return render(REPORT, drawings)


@pytest.fixture(scope="module")
def hostile_page() -> str:
    report = hostile_report()
    return render(report, draw_run(report), repo_id=EVERYTHING_HOSTILE, architecture=EVERYTHING_HOSTILE)


class Reader(HTMLParser):
    """Collects elements, attributes and text, and sees whether elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in {"h1", "h2", "h3"}:
            self.headings.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def test_it_says_what_was_asked_and_what_came_out(page: str) -> None:
    text = Reader(page).text
    for said in (
        "sentence-transformers/all-MiniLM-L6-v2, sparsified on sst2",
        "Asked for: target_speedup 2.5 in macs. Came out: a model with 41 of 72 heads and 2,958 of 9,216 neurons",
        "2.56 times fewer",
        "90.4 → 89.5 −0.92 points on validation",
        "22.7 M → 16.2 M −29 %, 64.9 MB",
        "2.14× 31.3 → 14.6 ms per forward",
        "Score right after the cut, before recovery88.19",
        "23 min 52 s on cpu (x86_64)",
        REPORT.command,
    ):
        assert said in text


#: Nothing was removed.
COMPLETE = replace(REPORT, pruned=REPORT.dense)


@pytest.mark.parametrize(
    ("report", "is_cut"),
    [
        pytest.param(REPORT, True, id="cut"),
        pytest.param(REPORT, False, id="cut to what its config says"),
        pytest.param(COMPLETE, False, id="whole"),
    ],
)
def test_it_says_how_to_load_the_model(report: RunReport, is_cut: bool) -> None:
    text = Reader(render(report, is_cut=is_cut)).text
    assert 'AutoModelForSequenceClassification.from_pretrained("me/x"' in text
    assert ('hf_vdneuron.from_pretrained("me/x")' in text) == is_cut
    assert ("ignore_mismatched_sizes" in text) == is_cut
    assert ("trust_remote_code" in text) == is_cut
    assert ("nothing was removed" in text) == ("Nothing was removed" in text) == (report is COMPLETE)
    assert ("Its config says what is left" in text) == (report is REPORT and not is_cut)


def test_it_says_why_nothing_was_removed() -> None:
    sizes = SizesReport("accuracy", 0.9, 0.89, [1.5, 2.0], [0.8, 0.7], None, 0.85)
    tolerant = replace(COMPLETE, training=replace(REPORT.training, sizes=sizes))
    assert "as everything proved relevant." in Reader(render(COMPLETE, is_cut=False)).text
    assert "as no smaller size was good enough." in Reader(render(tolerant, is_cut=False)).text


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        (PhasePlan(300, 500, 200), "The shaded part of each curve is the sparsification"),
        (PhasePlan(300, 0, 700), "The posterior was taken in closed form"),
    ],
    ids=["trained", "in closed form"],
)
def test_it_says_where_the_posterior_came_from(drawings: list[Drawing], phases: PhasePlan, said: str) -> None:
    text = Reader(render(replace(REPORT, training=replace(REPORT.training, phases=phases)), drawings)).text
    assert said in text
    assert ("The shaded part" in text) == ("The shaded part" in said)


def test_every_figure_is_there_for_everybody(page: str, drawings: list[Drawing]) -> None:
    reader = Reader(page)
    assert reader.tags["svg"] == reader.tags["figure"] == len(drawings)
    labels = {value for _, name, value in reader.attributes if name == "aria-label"}
    assert labels == {f"{drawing.title}. {drawing.numbers}".strip() for drawing in drawings}
    assert all(drawing.caption in unescape(page) for drawing in drawings)
    assert [value for tag, name, value in reader.attributes if (tag, name) == ("figure", "id")] == [
        *("score", "cost", "heads", "neurons"),
        *("loss", "units", "kl", "kl_weight", "speedup", "removal", "dropout_rates"),
    ]


def test_it_is_well_formed(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    assert reader.headings == ["h1"] + ["h2"] * 5
    identifiers = [value for _, name, value in reader.attributes if name == "id"]
    assert len(set(identifiers)) == len(identifiers)
    assert ("html", "lang", "en") in reader.attributes
    named = {value for _, name, value in reader.attributes if name == "aria-labelledby"}
    assert named <= set(identifiers)


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_it_loads_and_executes_nothing(which: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(which)
    reader = Reader(page)
    assert not NEVER & reader.tags.keys()
    assert reader.tags["style"] == reader.tags["title"] == 1
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
            assert value.startswith(("#", "data:")), (tag, name, value)
    (style,) = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    assert "@import" not in style
    assert "url(" not in style
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in reader.attributes


def test_strings_stay_strings(page: str, hostile_page: str) -> None:
    calm, hostile = Reader(page), Reader(hostile_page)
    # One more word of the command is one more `span`.
    assert {**hostile.tags, "span": 0} == {**calm.tags, "span": 0}
    assert hostile.open == []
    for text in HOSTILE:
        assert hostile.text.count(re.sub(r"\s+", " ", text)) >= 10


@pytest.mark.parametrize(
    "changes",
    [
        {"score_after_cut": None},
        {"dense": replace(REPORT.dense, score=None), "pruned": replace(REPORT.pruned, score=None)},
        {"training": TrainingReport(PhasePlan(0, 0, 10), {}, None)},
    ],
    ids=["no score after the cut", "no score", "no curve"],
)
def test_what_was_not_measured_is_called_so_or_left_out(changes: dict[str, object]) -> None:
    report = make_report(**changes)
    text = Reader(render(report, draw_run(report))).text
    assert ("not measured" in text) == (None in (report.score_after_cut, report.pruned.score))
    assert ("How training went" in text) == bool(report.training.curves)
    assert "None" not in text


# ---- In a real browser ----


def save(page: str, folder: Path) -> Path:
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@needs_browser
def test_it_is_shown_in_light_and_dark(page: str, tmp_path: Path) -> None:
    file = save(page, tmp_path)
    for scheme, own, other in (("light", LIGHT, DARK), ("dark", DARK, LIGHT)):
        image = screenshot(file, scheme=scheme, width=1200, height=3000)
        counts = {colour: count for count, colour in image.getcolors(1 << 24)}
        # What covers most is the ground, and all is drawn in the colours of the scheme, not of the other.
        for role, least in (("ground", 500_000), ("first", 10_000), ("gone", 10_000), ("second", 2000), ("ink", 1000)):
            assert counts.get(rgb(own[role]), 0) >= least, (scheme, role)
        for role in ("ground", "first", "second"):
            assert counts.get(rgb(other[role]), 0) < 100, (scheme, role)


@needs_browser
@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_it_fits_a_telephone(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    inner, content = widths_in(save(request.getfixturevalue(which), tmp_path), 400)
    assert inner == 400
    assert content <= inner


@needs_browser
def test_a_browser_executes_no_string(hostile_page: str, tmp_path: Path) -> None:
    policy = r"<meta http-equiv=.Content-Security-Policy.[^>]*>"
    assert re.search(policy, hostile_page)
    shown = dom(save(re.sub(policy, "", hostile_page), tmp_path))
    (title,) = re.findall(r"<title>(.*?)</title>", shown, flags=re.DOTALL)
    assert unescape(title) == f"{EVERYTHING_HOSTILE}, sparsified on {EVERYTHING_HOSTILE}"
    assert "<script" not in shown


@needs_browser
def test_the_browser_would_have_executed_it(tmp_path: Path) -> None:
    """Without escaping the same strings change the title: the test above can fail."""
    shown = dom(save(f"<!doctype html><title>calm</title><body>{EVERYTHING_HOSTILE}", tmp_path))
    assert "<title>run</title>" in shown


@needs_browser
def test_the_frame_would_have_shown_an_overflow(tmp_path: Path) -> None:
    inner, content = widths_in(save("<!doctype html><body><p style='width: 900px'>wide", tmp_path), 400)
    assert (inner, content > inner) == (400, True)
