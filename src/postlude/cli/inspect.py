"""``postlude inspect``: what is inside a checkpoint, and how two of them are related."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli import _options as options
from postlude.cli._group import PLAIN, PlainCommand, PlainFormGroup
from postlude.cli._output import Result, refuse_existing, write_json

__all__ = ["app", "checkpoint", "compare"]

app = typer.Typer(
    cls=PlainFormGroup,
    help="Look inside a checkpoint; `inspect compare A B` tells how checkpoints are related.",
)

Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Text to run through the model (.txt, .jsonl or a directory); a built-in one otherwise.",
    ),
]


@app.command(
    PLAIN,
    cls=PlainCommand,
    hidden=True,
    epilog="Related: `postlude inspect compare A B ...` tells whether checkpoints share their ancestry.",
)
def checkpoint(
    checkpoint: options.Checkpoint,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B",
            help="Inspections to run, comma-separated; all that fit one checkpoint otherwise.",
        ),
    ] = None,
    text: Text = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Look inside a checkpoint: outliers, singular defects and more."""
    from postlude import _front_door, registry
    from postlude.runs.progress import Progress

    refuse_existing(output, overwrite=overwrite)
    names = [name.strip() for name in methods.split(",") if name.strip()] if methods else None
    for name in names or []:
        registry.find("inspect", name)
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    with Progress() as progress:
        reports = _front_door.inspect(model, names, text=text, seed=seed, progress=progress)
    write_json(reports, output, overwrite=overwrite)
    return Result(reports)


@app.command("compare")
def compare(
    checkpoints: options.Checkpoints,
    text: Text = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Tell how two or more checkpoints are related, by the angle between their signatures."""
    from postlude import _front_door
    from postlude.errors import SettingsError

    if len(checkpoints) < 2:
        raise SettingsError(f"compare takes two or more checkpoints, got {len(checkpoints)}.")
    refuse_existing(output, overwrite=overwrite)
    models = [_front_door.load(path, dtype=dtype, device=device) for path in checkpoints]
    result = _front_door.compare(models, text=text, seed=seed)
    write_json(result, output, overwrite=overwrite)
    return Result(result)
