"""A real browser without a window: what it shows of a page, and what it makes of it."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from PIL import Image


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(NAMES)} is installed")

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

#: Of a page's colour scheme, as the browser counts them.
SCHEMES = {"dark": 0, "light": 1}

#: Seconds that a page may take; a browser starts slowly on a busy machine.
TIMEOUT = 240


def _browse(page: Path, *switches: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, *SWITCHES, f"--user-data-dir={profile}", *switches, page.as_uri()]
        return subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT).stdout.decode()


def screenshot(page: Path, *, scheme: str, width: int, height: int) -> Image.Image:
    """What is seen in a window of a size."""
    file = page.with_name(f"{page.stem}-{scheme}-{width}.png")
    _browse(
        page,
        f"--screenshot={file}",
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    )
    return Image.open(file).convert("RGB")


def dom(page: Path) -> str:
    """What the page has become once its scripts, if any, have run."""
    return _browse(page, "--dump-dom")


def widths_in(page: Path, width: int) -> tuple[int, int]:
    """Width of a frame and of what is in it: more means that a reader has to scroll sideways.

    A window of the browser is never narrower than 500 pixels; a frame can be.
    """
    frame = page.with_name("frame.html")
    source = page.read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
    frame.write_text(
        f'''<!doctype html><meta charset="utf-8"><body>
        <iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{source}"></iframe>
        <script>onload = () => {{
            const root = document.querySelector("iframe").contentDocument.documentElement;
            document.body.textContent = `widths ${{root.clientWidth}} ${{root.scrollWidth}}`;
        }}</script>''',
        encoding="utf-8",
    )
    inner, content = re.search(r"widths (\d+) (\d+)", dom(frame)).groups()
    return int(inner), int(content)
