"""What a model says of a recording: a picture, and one self-contained HTML page of it.

The page loads nothing and runs no script; every text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postlude.numerics.spectrogram import decibels, spectrogram
from postlude.report.environment import environment
from postlude.report.figures import Figure
from postlude.report.sheet import NONE, folded, style, template
from postlude.report.spectrogram import Mark, picture, spectrogram_plot
from postlude.runs.audio import Recording

__all__ = ["caveat", "draw", "marks", "render", "sentences", "spoken"]

Values = Mapping[str, Any]

_ROWS = {"noise": "noise", "dist": "distortion", "pause": "pause"}


def draw(result: Values, recording: Recording) -> bytes:
    """A PNG file: the spectrogram with the artifacts that were found."""
    return picture(
        *_levels(recording), marks(result), f"{result['recording']}, by {result['model']}"
    )


def render(result: Values, recording: Recording, command: str) -> str:
    """The page.

    Args:
        result: as ``postlude explain --json`` prints it.
        recording: that was heard.
        command: that makes the page again.
    """
    found = environment()
    plot = spectrogram_plot("sound", *_levels(recording), marks(result), alt=spoken(result))
    caption = (
        "Darker is louder: pieces of 25 ms, 10 ms apart. Dashed lines are the ends of the intervals below, as the "
        "model gives them, to a tenth of a second."
    )
    return template("speech.html.jinja").render(
        title=f"What is wrong with {result['recording']}",
        date=found.pop("date", None),
        style=style("report.css"),
        verdict=spoken(result),
        caveat=caveat(result),
        sentences=sentences(result),
        figure=Figure("sound", "Spectrogram and artifacts", caption, plot),
        scores=[
            (row["dimension"], NONE if row["score"] is None else str(row["score"]))
            for row in result["scores"]
        ],
        artifacts=[(row["artifact"], *_described(row)) for row in result["artifacts"]],
        answers=result["answers"],
        command=folded(command),
        environment=list(found.items()),
    )


def _levels(recording: Recording) -> tuple[Any, float, float]:
    power = spectrogram(torch.from_numpy(recording.samples), recording.rate)
    return decibels(power).numpy(), recording.duration, recording.rate / 2


def marks(result: Values) -> list[Mark]:
    """The rows below the spectrogram."""
    rows: list[Mark] = []
    for row in result["artifacts"]:
        what, when = _described(row)
        rows.append(
            (
                _ROWS[row["key"]],
                what if row["times"] else f"{what}{when and f', {when}'}",
                row["times"],
            )
        )
    return rows or [("artifacts", "not asked for", None)]


def _described(row: Values) -> tuple[str, str]:
    """What an artifact is, and when."""
    if row["present"] is None:
        return "could not be read", ""
    if not row["present"]:
        return "none", ""
    return row["type"] or "there", times_text(row["times"]) or "no time given"


def times_text(times: Sequence[Sequence[float]]) -> str:
    """``0.8 to 1.6 s, 2.0 to 2.3 s``."""
    return ", ".join(f"{start:.1f} to {end:.1f} s" for start, end in times)


def spoken(result: Values) -> str:
    """The artifacts in a sentence."""
    if not result["artifacts"]:
        return "Asked for scores only."
    found = []
    for row in result["artifacts"]:
        name = "an unnatural pause" if row["key"] == "pause" else _ROWS[row["key"]]
        if row["present"]:
            kind = f" ({row['type']})" if row["type"] else ""
            when = times_text(row["times"])
            found.append(f"{name}{kind}{when and f', {when}'}")
    unread = [row["artifact"] for row in result["artifacts"] if row["present"] is None]
    words = f"Heard: {'; '.join(found)}." if found else "The model names no artifact."
    if unread:
        words += f" What was said of {', '.join(unread)} could not be read."
    return words


def caveat(result: Values) -> str:
    """What the sentence about artifacts is worth."""
    words = (
        "This is what the model says, and no better than the model is: postlude evaluate speech compares it with "
        "labels."
    )
    if result["artifacts"]:
        words += " Drop-outs have no times in this answer; they show in Continuity."
    return words


def sentences(result: Values) -> list[str]:
    """What was heard, and what was done to it."""
    lines = [
        f"{result['model']} was asked about {result['recording']}, {result['duration']:.2f} s of sound."
    ]
    if result["converted"]:
        lines.append(f"Converted before it was heard: {', '.join(result['converted'])}.")
    lines += [
        f"{note[0].upper()}{note[1:]}." for note in result["notes"] if "drop-outs" not in note
    ]
    return lines
