"""``postlude explain``: what an audio language model says is wrong with a recording, and when."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, refuse_existing, this_command
from postlude.cli.speech import Questions

__all__ = ["explain"]


def explain(
    recording: Annotated[
        str,
        typer.Argument(
            metavar="RECORDING.wav",
            help="Speech; other rates, channels and widths than 16 kHz mono are converted, and that is said.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="CHECKPOINT",
            help="An audio language model that was tuned to it; docs/speech.md says how.",
            show_default=False,
        ),
    ],
    questions: Questions = "long",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.png",
            help="Draw the spectrogram with the artifacts and their times.",
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write a page: picture, scores, artifacts."),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Scores of a recording, the artifacts in it and their times, by an audio language model."""
    for file in (output, html):
        refuse_existing(file, overwrite=overwrite)

    from postlude import _front_door

    result = _front_door.explain(
        recording,
        _front_door.load(model, dtype=dtype, device=device),
        questions=questions,
        picture=output,
        html=html,
        overwrite=overwrite,
        seed=seed,
        command=this_command(),
    )
    return Result(result, _view(result))


def _view(result: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("score, 1 to 5", no_wrap=True)
    table.add_column("", justify="right")
    for row in result["scores"]:
        score = row["score"]
        table.add_row(row["dimension"].lower(), "\u2013" if score is None else str(score))
    parts: list[Any] = [table]
    if result["artifacts"]:
        found = Table(box=None, pad_edge=False)
        for name in ("artifact", "what", "when"):
            found.add_column(name, no_wrap=True)
        for row in result["artifacts"]:
            times = ", ".join(f"{start:.1f} to {end:.1f} s" for start, end in row["times"])
            what = {None: "could not be read", False: "none"}.get(
                row["present"], row["type"] or "yes"
            )
            found.add_row(row["artifact"].lower(), what, times)
        parts += ["", found]
    lines = [f"{result['recording']}: {result['duration']:.2f} s, heard by {result['model']}"]
    if result["converted"]:
        lines.append(f"converted: {', '.join(result['converted'])}")
    lines += result["notes"]
    if result["artifacts"] and all(row["present"] is False for row in result["artifacts"]):
        lines.insert(0, "The model names no artifact.")
    if result["unparsed"]:
        lines += [f"the answer was: {_short(one['answer'])}" for one in result["answers"]]
    # To be copied, so in one piece.
    files = [
        Text(f"{name}: {result[key]}", no_wrap=True, overflow="ignore")
        for name, key in (("Picture", "picture"), ("Page", "html"))
        if result[key] is not None
    ]
    return Group(*parts, "", *map(Text, lines), *files)


def _short(text: str, letters: int = 160) -> str:
    return repr(text if len(text) <= letters else text[:letters] + " ...")
