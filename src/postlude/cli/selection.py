"""``postlude attribute select`` and ``damage``: training examples that queries point at, and texts that were lost."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result
from postlude.cli.query import opened_index

__all__ = ["damage", "select"]

_NewLines = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="FILE.jsonl", help="Where to write.", show_default=False
    ),
]


def select(
    index: options.Index,
    source: Annotated[
        str,
        typer.Argument(
            metavar="QUERIES",
            help="A .jsonl file with a query a line, or a text.",
            show_default=False,
        ),
    ],
    output: _NewLines,
    top: Annotated[
        int,
        typer.Option(
            "--top", "-n", min=1, help="How many examples are chosen.", show_default=False
        ),
    ],
    drop: Annotated[
        bool, typer.Option("--drop", help="Write all the others: leave the chosen ones out.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="The model that this one was made from: ask which examples would bring the queries' predictions back "
            "to its own, rather than which support the queries.",
        ),
    ] = None,
    method: options.OtherMethod = None,
    set_: options.Set = None,
    checkpoint: options.Moved = None,
    keep: options.Keep = True,
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
            reference=None
            if reference is None
            else _front_door.load(reference, dtype=dtype, device=device),
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


def damage(
    checkpoint: options.Checkpoint,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help='Texts: a .jsonl file, a line each with "text", or "prompt" and "completion".',
            show_default=False,
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="The model that this one was made from.",
            show_default=False,
        ),
    ],
    output: _NewLines,
    top: Annotated[
        int,
        typer.Option("--top", "-n", min=1, help="How many texts are written.", show_default=False),
    ],
    by: Annotated[
        Literal["kl", "gap", "loss"],
        typer.Option(
            "--by",
            help="Nats a token: how far predictions moved, the loss added, or the model's own loss.",
        ),
    ] = "kl",
    max_length: Annotated[
        int,
        typer.Option("--max-length", min=0, help="Tokens at which a text is cut; 0: context."),
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Write the texts that a compressed model lost most, as queries for `select` or as data to tune on.

    Nothing here is random: --seed is taken for uniformity.
    """
    from postlude import _front_door
    from postlude.attribution.examples import Collection
    from postlude.runs.progress import Progress

    model, exact = (
        _front_door.load(one, dtype=dtype, device=device) for one in (checkpoint, reference)
    )
    with Progress(show=True) as progress:
        found = _front_door.attribution_damage(
            model,
            data,
            output,
            reference=exact,
            top=top,
            by=by,
            collection=Collection(max_length=max_length),
            overwrite=overwrite,
            progress=progress,
        )
    measured = found.damage
    return Result(
        {
            "output": output,
            "texts": len(found.numbers),
            "of": len(measured.tokens),
            "by": by,
            **{name: measured.mean(name) for name in ("kl", "gap", "loss")},
            "chosen": [
                {
                    "id": id,
                    **{
                        name: float(getattr(measured, name)[number])
                        for name in ("kl", "gap", "loss")
                    },
                }
                for id, number in zip(found.ids, found.numbers, strict=True)
            ],
        }
    )
