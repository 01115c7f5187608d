"""One picture of a demo: why four bits are hard for its model, and what each method makes of them.

``python -m postlude.report.picture runs/demo/results.json -o docs/demo.svg`` draws what ``postlude demo`` measured. The
picture loads nothing and is readable on white and on dark pages.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postlude.report.plots import Line, bar_plot, line_plot
from postlude.runs.atomic import atomic_write

__all__ = ["draw"]

_WIDTH, _COLUMN, _TOP = 740, 340, 66
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def draw(results: Mapping[str, Any]) -> str:
    """The picture as an SVG file.

    Args:
        results: as ``results.json`` of a demo holds them: inspections with outliers, and methods.
    """
    layers = [row for row in results["inspections"]["outliers"]["layers"] if row["layer"] >= 0]
    longest = max(layers, key=lambda row: row["max_norm"])
    times = longest["max_norm"] / longest["median_norm"]
    states = line_plot(
        "states",
        [
            Line("longest", [row["max_norm"] for row in layers]),
            Line("typical", [row["median_norm"] for row in layers]),
        ],
        [str(row["layer"]) for row in layers],
        x_label="after block",
        y_label="length of the hidden state",
        alt="Lengths of hidden states, block by block.",
        logarithmic=True,
    )
    methods = results["methods"]
    losses = bar_plot(
        "losses",
        [Line("perplexity", [row["perplexity"] for row in methods])],
        [row["name"] for row in methods],
        x_label="perplexity on held-out text",
        alt="Perplexity of every method.",
    )
    bits = results["settings"]["bits"]
    form = f"w{bits['weights']}a{bits['activations']}kv{bits['kv']}"
    base = next(row["perplexity"] for row in methods if row["baseline"])
    costs = {row["name"]: row["perplexity"] / base - 1 for row in methods if not row["baseline"]}
    best, plain = min(costs, key=costs.__getitem__), next(iter(costs))
    titles = (
        f"Inspect: from block {longest['layer']} on, some states are {times:.0f} times as long as others",
        f"Quantize to {form}: {plain} raises perplexity by {costs[plain]:.0%}, {best} by {costs[best]:.0%}",
    )
    panels, heights = [], []
    for column, (title, drawing) in enumerate(zip(titles, (states, losses), strict=True)):
        left = 15 + column * (_COLUMN + 30)
        words = textwrap.wrap(title, 38)
        lines = "".join(
            f'<tspan x="{left}" dy="{0 if number == 0 else 19}">{html.escape(line)}</tspan>'
            for number, line in enumerate(words)
        )
        panels.append(f'<text x="{left}" y="28" font-size="14.5" font-weight="600">{lines}</text>')
        width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawing.narrow)[0])
        place = f'<svg x="{left}" y="{_TOP}" width="{width}" height="{height}" '
        panels.append(drawing.narrow.replace("<svg ", place, 1))
        heights.append(height)
    bottom = _TOP + max(heights) + 12
    name = f"{results['model']['name']} by postlude demo"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom}" width="{_WIDTH}" '
        f'height="{bottom}" role="img" aria-label="{html.escape(" ".join([*titles, name]))}">'
        f"<style>text {{ font-family: {_FONT} !important; fill: #1b1b1b; }}</style>"
        f'<rect width="{_WIDTH}" height="{bottom}" rx="6" fill="#fdfdfb"/>{"".join(panels)}</svg>\n'
    )


def main() -> None:
    """Draw the results of a file into another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="results.json of a demo")
    parser.add_argument("--output", "-o", type=Path, required=True, help="the .svg file")
    options = parser.parse_args()
    picture = draw(json.loads(options.results.read_text(encoding="utf-8")))
    with atomic_write(options.output) as temporary:
        temporary.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
