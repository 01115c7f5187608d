"""``postlude attribute select``: the training examples that queries point at, or all but those, as a file."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result
from postlude.cli.attribute import Index, Keep, Method, Moved, opened_index

__all__ = ["select"]


def select(
    index: Index,
    source: Annotated[
        str,
        typer.Argument(
            metavar="QUERIES",
            help="A .jsonl file with a query a line, or a text.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE.jsonl", help="Where to write.", show_default=False
        ),
    ],
    top: Annotated[
        int,
        typer.Option(
            "--top", "-n", min=1, help="How many examples are chosen.", show_default=False
        ),
    ],
    drop: Annotated[
        bool, typer.Option("--drop", help="Write all the others: leave the chosen ones out.")
    ] = False,
    method: Method = None,
    set_: options.Set = None,
    checkpoint: Moved = None,
    keep: Keep = True,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Write the training examples that support queries most, to tune on them again, or all but those.

    Nothing here is random: --seed is taken for uniformity.
    """
    from postlude import _front_door
    from postlude.runs.progress import Progress

    opened, asked, changes, loaded = opened_index(index, method, set_, checkpoint, dtype, device)
    with Progress(show=True) as progress:
        found = _front_door.attribution_select(
            opened,
            source,
            output,
            top=top,
            drop=drop,
            method=asked,
            changes=changes,
            checkpoint=loaded,
            keep=keep,
            overwrite=overwrite,
            progress=progress,
        )
    return Result(
        {
            "output": output,
            "examples": found.written,
            "dropped" if drop else "kept": len(found.numbers),
            "of": len(opened),
            "weakest_chosen": found.strengths[-1],
            "chosen": [
                {"id": id, "strength": value}
                for id, value in zip(found.ids, found.strengths, strict=True)
            ],
        }
    )
