"""Plots as SVG text to put into a page.

Every plot is drawn twice, for a wide column and for a phone: an image that only shrinks has unreadable
letters. One unit of the drawing is one CSS pixel. Nothing depends on colour alone: lines differ in dash and marker
and are named at their right end, in the palette of Okabe and Ito, which people with any colour vision can tell apart.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from postlude.report.drawing import FONT_SIZE, drawing_settings, svg
from postlude.report.sheet import short

__all__ = [
    "Line",
    "Plot",
    "bar_plot",
    "heat_map",
    "line_plot",
]

# (colour, dashes, marker). Okabe and Ito's yellow is left out: it cannot be seen on white.
_STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#0072B2", "-", "o"),
    ("#D55E00", (0, (6, 2)), "s"),
    ("#009E73", (0, (2, 1.5)), "^"),
    ("#CC79A7", (0, (7, 2, 1.5, 2)), "D"),
    ("#E69F00", (0, (1, 1)), "v"),
    ("#56B4E9", (0, (4, 1, 1, 1, 1, 1)), "P"),
    ("#000000", (0, (9, 3)), "X"),
)
# Of bars, beside the colours of the same index.
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo")
_GRID = "#dcdcdc"
_WIDE, _NARROW = (700, 380), (340, 330)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: written at its end.
        values: one for each tick; None leaves a gap.
        places: where they stand on an axis of numbers, for a plot without ticks of its own.
    """

    name: str
    values: Sequence[float | None]
    places: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawing in two widths.

    Attributes:
        wide, narrow: ``<svg>`` elements.
    """

    wide: str
    narrow: str


def line_plot(
    identifier: str,
    lines: Sequence[Line],
    ticks: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    alt: str,
    logarithmic: bool = False,
    limits: tuple[float, float] | None = None,
    y_ticks: Sequence[float] | None = None,
    marks: Mapping[int, str] | None = None,
) -> Plot:
    """Lines over equally spaced places, or over the places that each line has.

    Args:
        identifier: unique in the page; letters, digits and dashes.
        lines: at most seven are told apart by dash and marker.
        ticks: what equally spaced places are called; none for an axis of numbers.
        x_label, y_label: with units.
        alt: what a reader who cannot see the plot should know.
        logarithmic: the vertical axis; values that are not positive are left out.
        limits: of the vertical axis.
        y_ticks: where the vertical axis has numbers.
        marks: words to put above places, by index.
    """

    def draw(size: tuple[int, int]) -> str:
        figure, axes = _figure(size)
        _axes(axes, x_label, y_label, ticks, logarithmic)
        if ticks:
            axes.set_xlim(-0.3, max(len(ticks) - 0.7, 0.7))
        for index, line in enumerate(lines):
            colour, dashes, marker = _STYLES[index % len(_STYLES)]
            axes.plot(
                range(len(line.values)) if line.places is None else line.places,
                [_plottable(value, logarithmic) for value in line.values],
                color=colour,
                linestyle=dashes,
                linewidth=2,
                marker=marker,
                markersize=6.5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                clip_on=False,
                zorder=3,
            )
        if limits is not None:
            axes.set_ylim(*limits)
        if y_ticks is not None:
            axes.set_yticks(y_ticks)
        if logarithmic:
            _decades(axes)
        elif max(map(abs, axes.get_ylim())) < 1e-3:
            # Rather than an exponent that stands apart above the axis.
            axes.yaxis.set_major_formatter(FuncFormatter(_number))
        for place, word in (marks or {}).items():
            axes.axvline(place, color=_GRID, linewidth=7, zorder=0.5)
            axes.annotate(
                word,
                (place, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=FONT_SIZE - 0.5,
                fontstyle="italic",
            )
        if len(lines) > 1:
            _name_ends(axes, lines, logarithmic)
        else:
            _write_values(axes, lines)
        return svg(figure, f"{identifier}-{size[0]}", alt)

    with drawing_settings():
        return Plot(draw(_WIDE), draw(_NARROW))


def bar_plot(
    identifier: str,
    groups: Sequence[Line],
    names: Sequence[str],
    *,
    x_label: str,
    alt: str,
) -> Plot:
    """Horizontal bars from 0, each with its value at its end.

    Args:
        identifier: unique in the page; letters, digits and dashes.
        groups: a bar for each at every name; several are told apart by hatch, colour and a legend.
        names: from the top.
        x_label: with units.
        alt: what a reader who cannot see the plot should know.
    """

    def draw(size: tuple[int, int]) -> str:
        figure, axes = _figure((size[0], 90 + 30 * len(names) * max(1, len(groups))))
        thick = 0.8 / len(groups)
        for index, group in enumerate(groups):
            places = [row + (index + 0.5) * thick - 0.4 for row in range(len(names))]
            bars = axes.barh(
                places,
                [0.0 if value is None else value for value in group.values],
                height=thick * 0.9,
                color=_STYLES[index % len(_STYLES)][0],
                hatch=_HATCHES[index % len(_HATCHES)],
                edgecolor="white",
                label=group.name,
            )
            words = ["" if value is None else short(value) for value in group.values]
            axes.bar_label(bars, words, padding=4)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_xlim(left=0)
        _labels(axes, x_label)
        axes.xaxis.set_major_formatter(FuncFormatter(_number))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        if len(groups) > 1:
            beside = min(len(groups), 4 if size == _WIDE else 2)
            figure.legend(loc="outside upper center", ncols=beside, frameon=False)
        return svg(figure, f"{identifier}-{size[0]}", alt)

    with drawing_settings():
        return Plot(draw(_WIDE), draw(_NARROW))


def heat_map(
    identifier: str,
    values: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    scale_label: str,
    alt: str,
) -> Plot:
    """Positive numbers as shades, on a logarithmic scale; darker is larger.

    Args:
        identifier: unique in the page.
        values: ``[rows][columns]``; the first row is drawn at the bottom.
        columns, rows: their names. A phone gets the first fourteen columns.
        x_label, y_label, scale_label: with units.
        alt: what a reader who cannot see the plot should know.
    """
    positive = [value for row in values for value in row if value and value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)

    def draw(size: tuple[int, int]) -> str:
        shown = len(columns) if size == _WIDE else min(14, len(columns))
        figure, axes = _figure((size[0], size[1] - 20))
        image = axes.pcolormesh(
            [
                [value if value and value > 0 else math.nan for value in row[:shown]]
                for row in values
            ],
            cmap="Blues",
            norm=LogNorm(low, high if high > low else low * 10),
            edgecolors="white",
            linewidth=0.8,
        )
        axes.set_xticks([i + 0.5 for i in range(shown)])
        axes.set_xticklabels([_readable(name) for name in columns[:shown]], rotation=90)
        axes.set_yticks([i + 0.5 for i in range(len(rows))])
        axes.set_yticklabels(rows)
        axes.tick_params(length=0)
        axes.tick_params(axis="x", labelsize=FONT_SIZE - 2)
        _labels(axes, x_label, y_label)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03, aspect=28)
        bar.set_label(scale_label)
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        bar.ax.yaxis.set_major_formatter(FuncFormatter(_number))
        return svg(figure, f"{identifier}-{size[0]}", alt)

    with drawing_settings():
        return Plot(draw(_WIDE), draw(_NARROW))


def _figure(size: tuple[int, int]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def _axes(axes: Any, x_label: str, y_label: str, ticks: Sequence[str], logarithmic: bool) -> None:
    _labels(axes, x_label, y_label)
    if logarithmic:
        axes.set_yscale("log")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    if ticks:
        # As many names as fit beside each other, with the values that lines may have at their ends.
        width = 0.55 * axes.figure.bbox.width / (0.62 * FONT_SIZE)
        fit = min(12, int(width / (1.5 + max(map(len, ticks)))))
        step = math.ceil(len(ticks) / max(1, fit))
        axes.set_xticks(range(0, len(ticks), step))
        axes.set_xticklabels(list(ticks)[::step])


def _labels(axes: Any, x_label: str, y_label: str = "") -> None:
    """Words at the axes, in lines that fit beside what else the drawing holds."""
    width, height = axes.figure.bbox.size
    letter = 0.62 * FONT_SIZE
    axes.set_xlabel(textwrap.fill(x_label, int(0.7 * width / letter)))
    axes.set_ylabel(textwrap.fill(y_label, max(12, int(0.8 * height / letter))))


def _decades(axes: Any) -> None:
    """Plain numbers at decades; at 2 and 5 too where the axis spans few."""
    low, high = axes.get_ylim()
    few = math.log10(high / low) < 2.2
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _number(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"


def _plottable(value: float | None, logarithmic: bool) -> float:
    if value is None or not math.isfinite(value) or (logarithmic and value <= 0):
        return math.nan
    return value


def _write_values(axes: Any, lines: Sequence[Line]) -> None:
    """Write the values of a line that is alone, as long as there is room for them."""
    for line in lines:
        values = [value for value in line.values if value is not None]
        if len(values) > 12:
            continue
        for place, value in enumerate(line.values):
            if value is not None:
                axes.annotate(
                    f"{value:.3g}",
                    (place, value),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
                    zorder=4,
                )


def _name_ends(axes: Any, lines: Sequence[Line], logarithmic: bool) -> None:
    """Write every name right of its line's last point, moved apart where they would cover each other."""
    height = FONT_SIZE * 1.3
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    # Pixels are not known before the layout; a little over what is left of them after labels and ticks is near enough.
    pixels = axes.figure.bbox.height * 0.72

    def fraction(value: float) -> float:
        if logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    ends = []
    for index, line in enumerate(lines):
        points = [
            (x, value)
            for x, value in zip(
                line.places or range(len(line.values)),
                (_plottable(value, logarithmic) for value in line.values),
                strict=True,
            )
            if not math.isnan(value)
        ]
        if points:
            x, value = points[-1]
            ends.append([fraction(value) * pixels, index, x, fraction(value)])
    ends.sort(key=lambda end: end[0])
    places = _apart([end[0] for end in ends], height, pixels)
    for (_, index, x, y), place in zip(ends, places, strict=True):
        colour = _STYLES[int(index) % len(_STYLES)][0]
        axes.text(
            1.03,
            place / pixels,
            lines[int(index)].name,
            transform=axes.transAxes,
            va="center",
            ha="left",
            fontsize=FONT_SIZE,
        )
        # A plain line: an arrow that keeps its distance from both of its ends takes longer than all else.
        pointer = Line2D(
            [(x - left) / (right - left), 1.02],
            [y, place / pixels],
            transform=axes.transAxes,
            color=colour,
            linewidth=1,
            clip_on=False,
            zorder=1,
        )
        pointer.set_in_layout(False)
        axes.add_artist(pointer)


def _apart(wanted: Sequence[float], distance: float, top: float) -> list[float]:
    """Sorted positions moved as little as a simple sweep can, so that neighbours are ``distance`` apart."""
    places: list[float] = []
    for position in wanted:
        places.append(max(position, places[-1] + distance) if places else max(position, 0.0))
    limit = max(top, (len(places) - 1) * distance)
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - distance
    return places


def _readable(token: str) -> str:
    """A token as letters that every font has: blanks and line ends become visible."""
    text = token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u00b7")
    text = "".join(
        letter if 32 < ord(letter) < 127 or letter == "\u00b7" else "\u25a1" for letter in text
    )
    return text if len(text) <= 10 else text[:8] + ".."
