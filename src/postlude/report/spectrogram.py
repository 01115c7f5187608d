"""The spectrogram of a recording, with the artifacts that were found in it and their times.

Louder is darker, on one scale of grey. Artifacts are told apart by row, hatch and words, so nothing depends on colour;
thin lines carry the ends of each interval up into the spectrogram.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from postlude.report.drawing import INK, drawing_settings, svg
from postlude.report.plots import Plot

__all__ = ["Mark", "picture", "spectrogram_plot"]

# (name of the row, words, intervals in seconds or None for what could not be read)
Mark = tuple[str, str, Sequence[tuple[float, float]] | None]

_WIDE, _NARROW = (700, 430), (340, 430)
_HATCHES = ("////", "....", "xxxx")
_FILLS = ("#bcd7ea", "#f5d3bd", "#cfe6dd")
_SOFT = "#595959"
_COLUMNS = 800


def spectrogram_plot(
    identifier: str,
    levels: NDArray[np.float64],
    seconds: float,
    highest: float,
    marks: Sequence[Mark],
    alt: str,
) -> Plot:
    """The drawing for a page.

    Args:
        identifier: unique in the page.
        levels: ``[frequencies, times]`` in dB, 0 the loudest.
        seconds: how long the recording is.
        highest: frequency in Hz.
        marks: a row below the spectrogram each.
        alt: what a reader who cannot see it should know.
    """
    with drawing_settings():
        drawn = (
            svg(_figure(levels, seconds, highest, marks, size), f"{identifier}-{size[0]}", alt)
            for size in (_WIDE, _NARROW)
        )
        return Plot(*drawn)


def picture(
    levels: NDArray[np.float64],
    seconds: float,
    highest: float,
    marks: Sequence[Mark],
    title: str = "",
) -> bytes:
    """The same as a PNG file of 1400 x 860 pixels."""
    with drawing_settings():
        figure = _figure(levels, seconds, highest, marks, _WIDE, title)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
        return buffer.getvalue()


def _figure(
    levels: NDArray[np.float64],
    seconds: float,
    highest: float,
    marks: Sequence[Mark],
    size: tuple[int, int],
    title: str = "",
) -> Figure:
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    upper, lower = figure.subplots(
        2, sharex=True, height_ratios=[3.2, 0.42 * max(1, len(marks)) + 0.1]
    )
    image = upper.imshow(
        _narrowed(levels),
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, highest / 1000),
        cmap="Greys",
        vmin=float(levels.min()),
        vmax=0,
        interpolation="nearest",
    )
    upper.set_ylabel("frequency (kHz)")
    upper.tick_params(axis="x", length=0)
    if title:
        upper.set_title(title, loc="left", fontsize=12.5)
    bar = figure.colorbar(image, ax=upper, fraction=0.05, pad=0.02, aspect=24)
    bar.set_label("dB (0: the loudest)" if size == _WIDE else "dB")
    bar.outline.set_visible(False)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    _rows(upper, lower, seconds, marks)
    return figure


def _narrowed(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """No more columns than can be seen, each the loudest of those it stands for."""
    step = -(-levels.shape[1] // _COLUMNS)
    if step == 1:
        return levels
    missing = -levels.shape[1] % step
    padded = np.pad(levels, ((0, 0), (0, missing)), mode="edge")
    return padded.reshape(len(levels), -1, step).max(axis=2)


def _rows(upper: Any, lower: Any, seconds: float, marks: Sequence[Mark]) -> None:
    for row, (_, words, times) in enumerate(marks):
        for start, end in times or ():
            lower.barh(
                row,
                end - start,
                left=start,
                height=0.62,
                color=_FILLS[row % len(_FILLS)],
                edgecolor=INK,
                linewidth=1,
                hatch=_HATCHES[row % len(_HATCHES)],
            )
            for at in (start, end):
                upper.axvline(at, color="white", linewidth=2.4)
                upper.axvline(at, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        # Beside the last interval where there is room, else before the first.
        if times:
            right = times[-1][1] < 0.72 * seconds
            place = times[-1][1] if right else times[0][0]
            fits = right or times[0][0] > 0.28 * seconds
            lower.annotate(
                words,
                (place if fits else seconds / 2, row),
                xytext=((5 if right else -5) if fits else 0, 0),
                textcoords="offset points",
                ha=("left" if right else "right") if fits else "center",
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
            )
        else:
            lower.text(0.012 * seconds, row, words, va="center", ha="left", color=_SOFT)
    lower.set_yticks(range(len(marks)), [name for name, _, _ in marks])
    lower.set_ylim(len(marks) - 0.5, -0.5)
    lower.set_xlim(0, seconds)
    lower.set_xlabel("time (s)")
    lower.tick_params(axis="y", length=0)
    lower.grid(axis="x", color="#dcdcdc", linewidth=0.8)
    lower.set_axisbelow(True)
