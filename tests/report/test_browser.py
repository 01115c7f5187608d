"""The page in a real browser: as wide as a phone, and as a desk."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from postlude.report.page import render

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (360, 1440)

# Frames of both widths in one page, so that the browser starts once.
HOST = """<!doctype html><body>{frames}<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const shown = [...page.querySelectorAll("svg")].filter(svg => svg.clientWidth > 0);
    return {{
      visible: root.clientWidth,
      needed: root.scrollWidth,
      drawings: shown.length,
      scale: Math.min(...shown.map(svg => svg.clientWidth / svg.viewBox.baseVal.width)),
      table: page.querySelector(".scroll").scrollWidth,
      box: page.querySelector(".scroll").clientWidth,
    }};
  }});
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
}});
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")


def opened(chromium: str, page: str, folder: Path) -> list[dict[str, Any]]:
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    file = folder / "host.html"
    file.write_text(HOST.format(frames=frames), encoding="utf-8")
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1600,900",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [chromium, *arguments, file.as_uri()], capture_output=True, text=True, timeout=100
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"{done.returncode}: {done.stderr[-2000:]}"
    measured: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return measured


def test_the_page_fits_a_phone_and_a_desk(
    chromium: str, results: dict[str, Any], tmp_path: Path
) -> None:
    # Long words must not push the page apart either.
    results["title"] = "a-model-with-a-name-that-nobody-would-want-to-type-twice in W4A4KV4"
    results["environment"]["processor"] = "x" * 200
    results["methods"][1]["continuation"] = "of" * 150
    phone, desk = opened(chromium, render(results), tmp_path)
    assert (phone["visible"], desk["visible"]) == WIDTHS
    assert phone["needed"] == phone["visible"]
    assert desk["needed"] == desk["visible"]
    # One drawing a figure, at nearly its own size: letters stay as large as they were drawn.
    assert phone["drawings"] == desk["drawings"] == 4
    assert 0.9 < phone["scale"] < 1.3
    assert 0.9 < desk["scale"] < 1.3
    # The table scrolls inside its box where it must.
    assert phone["table"] > phone["box"]
    assert desk["table"] == desk["box"]
