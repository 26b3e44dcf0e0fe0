"""Figures go into a page as SVG in the page's own colours, and into files as PNG."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from hf_vdneuron.drawing import DARK, LIGHT, MARGIN, RESOLUTION, WIDTH, Drawing, canvas, save_drawings, to_svg


@pytest.fixture
def drawing() -> Drawing:
    figure, axes = canvas("A title", 2)
    axes.plot([1, 2], [1, 3], color=LIGHT["first"], label="<script>a & b</script>")
    axes.legend(labelcolor=LIGHT["muted"])
    axes.axhspan(1, 2, color=LIGHT["band"])
    return Drawing("one", "A title", "What it shows.", "1 to 3.", figure)


def test_both_grounds_have_a_colour_for_each_role() -> None:
    assert LIGHT.keys() == DARK.keys()
    for colours in (LIGHT, DARK):
        assert len(set(colours.values())) == len(colours), "a page could not tell two roles of one colour apart"
        assert all(re.fullmatch(r"#[0-9a-f]{6}", colour) for colour in colours.values())


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("role", "ratio"), [("ink", 7), ("muted", 4.5), ("first", 3), ("second", 3), ("third", 3)])
def test_letters_and_lines_stand_out_from_the_ground(role: str, ratio: float, colours: dict[str, str]) -> None:
    """Contrasts that WCAG 2.2 asks of text (AA; AAA for most of it) and of graphics."""
    for ground in ("ground", "band"):
        darker, lighter = sorted((luminance(colours[role]), luminance(colours[ground])))
        assert (lighter + 0.05) / (darker + 0.05) >= ratio


def test_svg_takes_colours_and_font_from_its_page(drawing: Drawing) -> None:
    svg = to_svg(drawing)
    ElementTree.fromstring(svg)
    assert {"var(--first)", "var(--band)", "var(--ink)", "var(--muted)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not [colour for colour in LIGHT.values() if colour in svg]
    assert "font-family" not in svg
    assert "<style" not in svg


def test_svg_is_whole_in_itself(drawing: Drawing) -> None:
    svg = to_svg(drawing)
    names = re.findall(r'\bid="([^"]+)"', svg)
    assert names
    assert all(name.startswith("one-") for name in names)
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)} <= set(names)
    assert not re.search(r'href="(?!#)', svg)


def test_svg_escapes_texts_and_repeats_itself(drawing: Drawing) -> None:
    svg = to_svg(drawing)
    assert "&lt;script&gt;a &amp; b&lt;/script&gt;" in svg
    assert "<script" not in svg
    assert to_svg(drawing) == svg


def test_png_files(drawing: Drawing, tmp_path: Path) -> None:
    save_drawings([drawing], tmp_path / "new" / "figures")
    (path,) = (tmp_path / "new" / "figures").iterdir()
    assert path.name == "one.png"
    with Image.open(path) as image:
        assert image.size == pytest.approx(((WIDTH + 2 * MARGIN) * RESOLUTION, (2 + 2 * MARGIN) * RESOLUTION), abs=1)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
