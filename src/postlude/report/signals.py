"""One self-contained HTML page of a picture as a network: what it looks like, and PSNR against bytes.

Made from plain values; loads nothing and runs no script.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from postlude.report.environment import environment
from postlude.report.figures import Figure
from postlude.report.plots import Line, line_plot
from postlude.report.sheet import folded, style, template

__all__ = ["curve_figure", "render"]

Values = Mapping[str, Any]


def render(
    result: Values, points: Sequence[Values], pictures: Mapping[str, bytes], command: str
) -> str:
    """The page.

    Args:
        result: of the fit, as ``postlude fit --json`` prints it.
        points: of the curve: line, setting, bytes, psnr.
        pictures: PNG files to show, by what they are.
        command: that makes the page again.
    """
    found = environment()
    return template("signal.html.jinja").render(
        title=f"A picture as a network: {result['network']}, width {result['width']}",
        date=found.pop("date", None),
        style=style("report.css"),
        sentences=_sentences(result, points),
        pictures=[
            (name, "data:image/png;base64," + base64.b64encode(content).decode())
            for name, content in pictures.items()
        ],
        size=result["size"],
        figures=[curve_figure(points)],
        command=folded(command),
        environment=list(found.items()),
    )


def _sentences(result: Values, points: Sequence[Values]) -> list[str]:
    width, height = result["size"]
    words = [
        f"{width} x {height} pixels of {result['channels']} channels are {result['numbers']:,} numbers of a network, "
        f"fitted in {result['steps']:,} steps. In floating point it shows the picture with "
        f"{_decibel(result['psnr_float'])}; stored in {result['bytes']:,} bytes "
        f"({8 * result['bytes'] / (width * height):.2f} bits a pixel) with {_decibel(result['psnr'])}."
    ]
    peers = [point for point in points if point["line"] in ("JPEG", "WEBP")]
    for name in ("JPEG", "WEBP"):
        fitting = [p for p in peers if p["line"] == name and p["bytes"] <= result["bytes"]]
        if fitting:
            best = max(fitting, key=lambda point: point["psnr"])
            words.append(
                f"{name} of quality {best['setting']:g} shows it with {_decibel(best['psnr'])} in "
                f"{best['bytes']:,} bytes."
            )
    return words + [f"{note[0].upper()}{note[1:]}." for note in result["notes"]]


def curve_figure(points: Sequence[Values]) -> Figure:
    """PSNR over kilobytes, a line a coding."""
    names = list(dict.fromkeys(point["line"] for point in points))
    lines = []
    for name in names:
        own = sorted(
            (p["bytes"] / 1000, p["psnr"])
            for p in points
            if p["line"] == name and math.isfinite(p["psnr"])
        )
        lines.append(Line(name, [psnr for _, psnr in own], [size for size, _ in own]))
    caption = (
        "Bytes are those of all files: header, scales, codes, settings. nearest and learned give every matrix but "
        "the first the same number of bits; mixed spends a mean number where it hurts least. JPEG and WebP are the "
        "highest quality that is no larger than a point of the network."
    )
    plot = line_plot(
        "curve",
        lines,
        (),
        x_label="size on disk (kB)",
        y_label="PSNR (dB)",
        alt=f"PSNR against bytes. {caption}",
    )
    rows = [(p["line"], f"{p['setting']:g}", f"{p['bytes']:,}", f"{p['psnr']:.2f}") for p in points]
    return Figure(
        "curve",
        "PSNR against bytes",
        caption,
        plot,
        "coding",
        ["bits a weight, or quality", "bytes", "PSNR (dB)"],
        rows,
    )


def _decibel(value: float | None) -> str:
    return "no error at all" if value is None or math.isinf(value) else f"{value:.2f} dB"
