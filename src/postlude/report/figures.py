"""The figures of a page: numbers of a result, drawn, with what to see in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postlude.report.plots import Line, Plot, heat_map, line_plot
from postlude.report.sheet import NONE, short

__all__ = ["Figure", "error_figure", "inside_figures", "line_figure"]

_SHOWN_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot and its words.

    Attributes:
        identifier: unique in the page.
        title: what is plotted.
        caption: what to see.
        plot: the drawing.
        x_label: what the rows of the table are.
        names: its columns.
        rows: the name of a place, then its values as text.
    """

    identifier: str
    title: str
    caption: str
    plot: Plot
    x_label: str = ""
    names: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def error_figure(
    methods: Sequence[Mapping[str, Any]], inspections: Mapping[str, Any]
) -> Figure | None:
    """The relative error of the residual stream after every block, a line a method."""
    lines = [
        Line(row["name"], row["layer_error"]["median"])
        for row in methods
        if (row.get("layer_error") or {}).get("median")
    ]
    if not lines:
        return None
    blocks = [str(block) for block in range(max(len(line.values) for line in lines))]
    last = sorted(lines, key=lambda line: line.values[-1] or 0.0)
    order = ", ".join(
        f"{line.name} {line.values[-1]:.0%}" for line in last if line.values[-1] is not None
    )
    caption = (
        "How far the hidden state of a typical token is from the float model's, relative to its length: 100% would be "
        "an error as large as the state itself. Errors are handed on, so what matters is where a line climbs. "
        f"After the last block: {order}."
    )
    return line_figure(
        "error",
        "Error inside the model, block by block",
        caption,
        lines,
        blocks,
        x_label="after block",
        y_label="relative error (median token)",
        logarithmic=True,
        marks=_marks(inspections, 0),
    )


def inside_figures(inspections: Mapping[str, Any]) -> list[Figure]:
    """What inspections found, as far as they are there: norms by layer, by token, and angles by layer."""
    outliers = inspections.get("outliers") or {}
    defects = inspections.get("singular-defects") or {}
    made = (
        _norms(outliers, inspections),
        _norm_map(outliers),
        _angles(defects, inspections),
    )
    return [figure for figure in made if figure is not None]


def _norms(outliers: Mapping[str, Any], inspections: Mapping[str, Any]) -> Figure | None:
    layers = outliers.get("layers")
    if not layers:
        return None
    lines = [
        Line("largest token", [layer["max_norm"] for layer in layers]),
        Line("median token", [layer["median_norm"] for layer in layers]),
    ]
    traced = outliers.get("traced") or {}
    if traced.get("tokens") and traced.get("norms"):
        first = traced["tokens"][0]
        lines.append(Line("first token", [row[0] for row in traced["norms"]]))
        named = f" \u201cFirst token\u201d is {first!r} at the start of a sequence."
    else:
        named = ""
    peak = max(layers, key=lambda layer: layer["max_norm"] / max(layer["median_norm"], 1e-30))
    ratio = peak["max_norm"] / max(peak["median_norm"], 1e-30)
    caption = (
        f"The length of the hidden states on their way through the model. After {_place(peak['layer'])} the largest "
        f"one is {ratio:,.3g} times the median"
        + (
            ": a few tokens carry a vector so large that a 4-bit grid wide enough for it has nothing left for the rest."
            if ratio > 10
            else ", so no token stands far out."
        )
        + named
    )
    return line_figure(
        "norms",
        "Length of the hidden states, layer by layer",
        caption,
        lines,
        ["input", *(str(layer["layer"]) for layer in layers[1:])],
        x_label="after block",
        y_label="L2 norm of a token",
        logarithmic=True,
        marks=_marks(inspections, 1),
    )


def _norm_map(outliers: Mapping[str, Any]) -> Figure | None:
    traced = outliers.get("traced") or {}
    if not traced.get("tokens") or not traced.get("norms"):
        return None
    tokens = traced["tokens"][:_SHOWN_TOKENS]
    values = [row[: len(tokens)] for row in traced["norms"]]
    places = ["input", *(str(block) for block in range(len(values) - 1))]
    norm, token, layer = max(
        (value, column, row) for row, line in enumerate(values) for column, value in enumerate(line)
    )
    caption = (
        "The beginning of one text, token by token: darker is longer. The longest hidden state here is that of "
        f"{tokens[token]!r} after {_place(layer - 1)}, {norm:,.4g}. A dot stands for a blank."
    )
    plot = heat_map(
        "map",
        values,
        tokens,
        places,
        x_label="token of the text",
        y_label="after block",
        scale_label="L2 norm",
        alt=caption,
    )
    return Figure("map", "Which tokens are long", caption, plot)


def _angles(defects: Mapping[str, Any], inspections: Mapping[str, Any]) -> Figure | None:
    layers = defects.get("layers")
    if not layers:
        return None
    angles = [layer["angle_degrees"] for layer in layers]
    nearest = min(layers, key=lambda layer: layer["angle_degrees"])
    met = (
        "the massive hidden states" if defects.get("massive", True) else "the longest hidden states"
    )
    caption = (
        f"From its weights alone, every block has a direction that it amplifies most; the angle to the direction that "
        f"{met} really have is near 90 degrees where the block has nothing to do with them and small where it makes "
        f"or removes them. Smallest: {nearest['angle_degrees']:.1f} degrees in block {nearest['layer']}."
    )
    return line_figure(
        "angles",
        "Predicted and real direction of the outliers, block by block",
        caption,
        [Line("angle", angles)],
        [str(layer["layer"]) for layer in layers],
        x_label="block",
        y_label="acute angle (degrees)",
        limits=(0.0, 100.0),
        y_ticks=(0, 30, 60, 90),
        marks=_marks(inspections, 0),
    )


def _marks(inspections: Mapping[str, Any], shift: int) -> dict[int, str]:
    """Explosion and decay block by tick; ``shift`` ticks stand before block 0."""
    defects = inspections.get("singular-defects") or {}
    marks: dict[int, str] = {}
    for word in ("explosion", "decay"):
        layer = (defects.get(word) or {}).get("layer")
        if layer is not None:
            place = layer + shift
            marks[place] = f"{marks[place]}, {word}" if place in marks else word
    return marks


def line_figure(
    identifier: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    ticks: Sequence[str],
    *,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    limits: tuple[float, float] | None = None,
    y_ticks: Sequence[float] | None = None,
    marks: Mapping[int, str] | None = None,
    show: Callable[[float | None], str] | None = None,
) -> Figure:
    """Lines over ticks, and the same numbers as a table; ``show`` writes them there, in three digits if None."""
    show = show or _value
    plot = line_plot(
        identifier,
        lines,
        ticks,
        x_label=x_label,
        y_label=y_label,
        alt=f"{title}. {caption}",
        logarithmic=logarithmic,
        limits=limits,
        y_ticks=y_ticks,
        marks=marks,
    )
    rows = [
        (tick, *(show(line.values[i]) if i < len(line.values) else "" for line in lines))
        for i, tick in enumerate(ticks)
    ]
    return Figure(identifier, title, caption, plot, x_label, [line.name for line in lines], rows)


def _value(value: float | None) -> str:
    return NONE if value is None else short(value)


def _place(layer: int) -> str:
    return "the embeddings" if layer < 0 else f"block {layer}"
