"""``postlude attribute plan``: what an index will take, before it is built."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result

__all__ = ["plan"]

# Parts of a build.
_BUILD = ("gradients", "projection", "outer", "factorisation")
_YEAR = 365.25 * 86400


def plan(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CHECKPOINT]", help="The model; or say --parameters."),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option("--parameters", metavar="70B", help="Weights of a Llama-like model."),
    ] = None,
    examples: Annotated[
        str, typer.Option("--examples", metavar="5M", help="Training examples.")
    ] = "1M",
    tokens: Annotated[
        float | None,
        typer.Option(
            "--tokens", min=1, help="Mean tokens of each; the model's context otherwise, or 512."
        ),
    ] = None,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Asked together.")] = 1,
    factor: Annotated[
        int | None,
        typer.Option("--factor", min=1, help="Of the projection. Settings not given are lorif's."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Columns of the factors.")
    ] = None,
    format: options.StoredFormat = None,
    curvature_rank: Annotated[
        int | None,
        typer.Option("--curvature-rank", min=0, help="Directions of the curvature."),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option("--hardware", metavar="this|h100|...", help="This machine is measured."),
    ] = "this",
    devices: Annotated[int, typer.Option("--devices", min=1, help="How many of them.")] = 1,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Predict what an index will take: bytes, operations, bytes read by a query, and time."""
    from postlude import _front_door
    from postlude.attribution.plan import parse_count

    given = {
        "tokens": tokens,
        "factor": factor,
        "rank": rank,
        "format": format,
        "curvature_rank": curvature_rank,
    }
    report = _front_door.attribution_plan(
        checkpoint=checkpoint,
        parameters=None if parameters is None else parse_count(parameters, "--parameters"),
        examples=parse_count(examples, "--examples"),
        hardware=hardware,
        devices=devices,
        sweep=True,
        queries=queries,
        **{name: value for name, value in given.items() if value is not None},
    )
    return Result(report, None if json else _plan_view(report))


def _plan_view(report: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from postlude.attribution.forecast import readable_bytes

    chosen = Table(show_header=False, box=None, pad_edge=False)
    sizes, seconds, read = report["bytes"], report["seconds"], report["read"]
    hardware = report["hardware"]

    def where(index: float) -> str:
        return "in memory" if index <= hardware["memory"] else "from disk"

    for name, value in (
        ("model", report["model"]),
        ("layers", f"{report['layers']}, {report['parameters']:,} weights"),
        ("examples", f"{report['examples']:,} of {report['tokens']:,.0f} tokens"),
        (
            "settings",
            f"factor {report['factor']}, rank {report['rank']}, {report['format']}",
        ),
        ("hardware", f"{hardware['name']}, {readable_bytes(hardware['memory'])} of memory"),
        (
            "index",
            f"{readable_bytes(sizes['index'])}, {sizes['ratio']:.0f} times smaller than whole gradients",
        ),
        ("curvature, if kept", readable_bytes(sizes["curvature"])),
        ("of the largest layer", readable_bytes(sizes["curvature_layer"])),
        (
            "build",
            f"{sum(report['flops'][n] for n in _BUILD):.2g} operations, {_time(seconds['build'])} on an idle machine",
        ),
        ("fitting the curvature", _time(seconds["fit"])),
        (
            "a query reads",
            f"{readable_bytes(read['score'])} {where(sizes['index'])}, {_time(seconds['score'])}",
        ),
    ):
        chosen.add_row(name, str(value))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("factor", "rank", "format", "index", "ratio", "curvature", "build", "query", "read")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.get("table", []):
        table.add_row(
            str(row["factor"]),
            str(row["rank"]),
            row["format"],
            readable_bytes(row["index_bytes"]),
            f"{row['ratio']:.0f}",
            readable_bytes(row["curvature_bytes"]),
            _time(row["build_seconds"]),
            _time(row["score_seconds"]),
            where(row["index_bytes"]),
        )
    notes = []
    if seconds["build"] > _YEAR:
        measured = hardware["name"].endswith("measured")
        elsewhere = "; --hardware h100 --devices 64 for others" if measured else ""
        notes += ["", f"A build takes {_time(seconds['build'])} here{elsewhere}."]
    return Group(chosen, "", table, *map(Text, notes))


def _time(seconds: float) -> str:
    for size, unit in ((_YEAR / 2, "years"), (86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            number = seconds / (_YEAR if unit == "years" else size)
            # Three digits, and never an exponent.
            return f"{float(f'{number:.3g}'):,.{0 if number >= 100 else 1}f} {unit}"
    return f"{seconds:.2g} s"
