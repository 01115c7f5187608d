"""``postlude evaluate speech``: how well an audio language model hears what is wrong with speech."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, number_table, refuse_existing, write_json

__all__ = ["HeardBy", "Questions", "speech"]

HeardBy = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="An audio language model: the directory of Qwen2-Audio, Audio Flamingo 3 or one made by "
        "`python -m postlude.zoo.audio_llm`, tuned or not, or of an adapter.",
        show_default=False,
    ),
]
Questions = Annotated[
    str,
    typer.Option(
        "--questions",
        metavar="long|short",
        help="One answer about everything, or a question for each score, answered by a digit.",
    ),
]


def speech(
    checkpoint: HeardBy,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Clips with labels: made by `python -m postlude.zoo.degraded_speech data`, or in the layout of "
            "QualiSpeech.",
            show_default=False,
        ),
    ],
    questions: Questions = "long",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="Judge the first N clips only."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Questions at a time.")
    ] = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Correlation of scores with labels, F1 of artifacts and overlap of their times."""
    refuse_existing(output, overwrite=overwrite)

    from postlude import _front_door
    from postlude.runs.progress import Progress

    with Progress(show=True) as progress:
        result = _front_door.evaluate_speech(
            _front_door.load(checkpoint, dtype=dtype, device=device),
            data,
            questions=questions,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    write_json(result, output, overwrite=overwrite)
    return Result(result, _view(result))


_SCORES = (
    "score",
    "PCC",
    "rank\ncorr.",
    "right",
    "always\nthe same",
    "mean\nerror",
    "always\nthe same",
    "skipped",
)
_PARTS = (
    "artifact",
    "F1",
    "said of\nevery clip",
    "kind\nright",
    "IoU of\ntimes",
    "one all\nalong",
    "of\nclips",
    "skipped",
)


def _view(result: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.text import Text

    scores: list[tuple[str, ...]] = [
        (
            row["dimension"].lower(),
            _text(row["pcc"], 3),
            _text(row["spearman"], 3),
            _text(row["accuracy"], 2),
            _text(row["constant_accuracy"], 2),
            _text(row["mean_error"], 2),
            _text(row["constant_error"], 2),
            str(row["skipped"]),
        )
        for row in result["dimensions"]
    ]
    parts: list[Any] = [number_table(_SCORES, scores), Text()]
    if result["artifacts"]:
        found: list[tuple[str, ...]] = [
            (
                row["artifact"].lower().removesuffix(" description"),
                _text(row["f1"], 3),
                _text(row["always_f1"], 3),
                _text(row["type_accuracy"], 2),
                _text(row["iou"], 3),
                _text(row["always_iou"], 3),
                str(row["iou_clips"]),
                str(row["skipped"]),
            )
            for row in result["artifacts"]
        ]
        parts += [number_table(_PARTS, found), Text()]
    means = f"mean PCC {_text(result['mean_pcc'], 3)}"
    undefined = [row for row in result["dimensions"] if math.isnan(row["pcc"])]
    if undefined:
        every = len(result["dimensions"])
        means += (
            f" over {every - len(undefined)} of {every} scores ({_text(result['mean_pcc_zero'], 3)} with 0 for the "
            "others)"
        )
    if result["artifacts"]:
        means += f", F1 {_text(result['mean_f1'], 3)}, IoU {_text(result['mean_iou'], 3)}"
    parts.append(Text(means, style="bold"))
    lines = ["always the same: the commonest score, said of every clip, which takes no listening"]
    if result["artifacts"]:
        lines[0] += (
            "; likewise an artifact said of every clip, and one all along it, from its beginning to its end"
        )
        lines.append("kind right: of the artifacts that were rightly said to be there")
        lines += [
            f"no times of {row['artifact'].lower().removesuffix(' description')} to compare: neither label nor answer "
            "of any clip that could be read has some"
            for row in result["artifacts"]
            if not row["iou_clips"]
        ]
    parts += [Text(line) for line in lines]
    if result["advice"]:
        parts.append(Text(f"Nothing could be read: {result['advice']}", style="bold"))
    skipped = (
        f"{result['clips']} clips; {result['skipped']} of {result['asked']} scores and artifacts could not be read and "
        f"are in no number above; {result['exact']:.0%} of the answers are written as they should be"
    )
    parts.append(Text(skipped))
    parts += [
        Text(f"no correlation of {row['dimension'].lower()}: {row['note']}") for row in undefined
    ]
    if result["unclear"]:
        left = f"{len(result['unclear'])} clips are left out, since their labels cannot be read; the first: "
        parts.append(Text(left + result["unclear"][0]))
    if result["cut"]:
        parts.append(Text(f"the answers about {result['cut']} clips were cut off"))
    parts += [
        Text(f"{number} recordings converted: {what}")
        for what, number in result["converted"].items()
    ]
    return Group(*parts)


def _text(value: float, digits: int) -> str:
    return "\u2013" if math.isnan(value) else f"{value:.{digits}f}"
