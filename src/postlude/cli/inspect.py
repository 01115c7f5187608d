"""``postlude inspect``: what is inside a checkpoint, how two are related, and what computes its layers."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._group import PLAIN, PlainCommand, PlainFormGroup
from postlude.cli._output import Result, refuse_existing, this_command, write_json

__all__ = ["app", "checkpoint", "compare", "kernels"]

app = typer.Typer(
    cls=PlainFormGroup,
    help="Look inside a checkpoint; `inspect compare A B` tells how checkpoints are related, "
    "`inspect kernels` what computes its layers.",
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
    with Progress(show=True) as progress:
        reports = _front_door.inspect(model, names, text=text, seed=seed, progress=progress)
    write_json(reports, output, overwrite=overwrite)
    return Result(reports)


@app.command("compare")
def compare(
    checkpoints: options.Checkpoints,
    text: Text = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="0,4-7",
            help="Blocks whose ranks and intruder dimensions are computed, the slow part; all otherwise.",
        ),
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Tell how checkpoints are related, and what tuning changed from the first to each of the others."""
    from postlude import _front_door
    from postlude.cli._settings import parse_numbers
    from postlude.errors import SettingsError
    from postlude.runs.progress import Progress

    if len(checkpoints) < 2:
        raise SettingsError(f"compare takes two or more checkpoints, got {len(checkpoints)}.")
    blocks = None if layers is None else parse_numbers("--layers", layers)
    refuse_existing(output, overwrite=overwrite)
    refuse_existing(html, overwrite=overwrite)
    models = [_front_door.load(path, dtype=dtype, device=device) for path in checkpoints]
    command = this_command()
    with Progress(show=True) as progress:
        result = _front_door.compare(
            models,
            text=text,
            layers=blocks,
            seed=seed,
            html=html,
            command=command,
            progress=progress,
        )
    write_json(result, output, overwrite=overwrite)
    return Result(result)


@app.command("kernels")
def kernels(
    checkpoint: options.Checkpoint,
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel", metavar="NAME", help="Ask for one kernel; the cheapest otherwise."
        ),
    ] = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Tell which kernel computes each quantized layer, for one row (decode) and 512 (prefill), and why."""
    from postlude import _front_door

    refuse_existing(output, overwrite=overwrite)
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    report = _front_door.kernels(model, kernel)
    write_json(report, output, overwrite=overwrite)
    return Result(report, None if json else _view(report))


def _view(report: dict[str, Any]) -> object:
    """Layers in one table, and every reason for a refusal once."""
    from rich.console import Group
    from rich.table import Table

    head = f"{report['dtype']} activations on {report['device']}"
    layers = report["layers"]
    if not layers:
        return f"{head}: no quantized layers, PyTorch computes this model"
    columns = ("weight", "input", "layout", "decode", "prefill")
    rows: dict[tuple[str, ...], int] = {}
    reasons: dict[tuple[str, str], int] = {}
    for one in layers:
        # The same layer of every block is one row.
        name = re.sub(r"^.*\.\d+\.", "*.", one.layer)
        row = (name, *(getattr(one, column) for column in columns))
        rows[row] = rows.get(row, 0) + 1
        for refusal in one.refused.items():
            reasons[refusal] = reasons.get(refusal, 0) + 1
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True, overflow="fold")
    for column in ("count", *columns):
        table.add_column(column, justify="right" if column == "count" else "left")
    for (name, *cells), count in rows.items():
        table.add_row(name, str(count), *cells)
    refusals = Table("refused by", "layers", "because it", box=None, pad_edge=False)
    for (name, reason), count in reasons.items():
        refusals.add_row(name, str(count), reason)
    simulated = report["simulated"]
    note = f"\n{simulated} of {len(layers)} layers are simulated." if simulated else ""
    return Group(head, "", table, "", refusals, note)
