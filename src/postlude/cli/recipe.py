"""``postlude run``: the stages of a recipe, one after the other, each at most once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result

if TYPE_CHECKING:
    from postlude.recipes.forecast import Forecasts

__all__ = ["run"]


def run(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE.yaml", help="Stages and their options.", show_default=False),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="DIRECTORY",
            help="Where the run goes. In that of an earlier run, what did not change is not done again.",
        ),
    ] = "runs/recipe",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="The value of a variable of the recipe; repeat for more.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the recipe and print what would be run, with a forecast of time, memory and bytes.",
        ),
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            "--assume",
            metavar="NAME=COUNT",
            help="With --dry-run: a variable stands for a model of so many parameters, or for data of so many tokens "
            "(model=70B, data=500M), which need not be there; repeat for more.",
        ),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            metavar="this|h100|...",
            help="With --dry-run: what each rank runs on. This machine is measured.",
        ),
    ] = "this",
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="With --dry-run: how many torchrun would start.")
    ] = 1,
    sharded: Annotated[
        bool,
        typer.Option(
            "--sharded", help="With --dry-run: accelerate shards what is trained (FSDP2)."
        ),
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Run a recipe: a list of stages, each one command, whose outputs feed later stages."""
    from postlude import _front_door
    from postlude.errors import SettingsError
    from postlude.recipes.commands import shell_line
    from postlude.runs.progress import Progress

    # Every command of it is read, with the libraries behind them: seconds.
    Progress(show=True).log(f"checking {recipe}")
    variables, sizes = _pairs("--set", set_), _pairs("--assume", assume)
    if dry_run:
        plan = _front_door.forecast(
            recipe,
            output,
            variables,
            assume=sizes,
            hardware=hardware,
            ranks=ranks,
            sharded=sharded,
            seed=seed,
        )
        return Result(plan, _forecast_view(plan))
    if sizes or sharded or ranks > 1 or hardware != "this":
        raise SettingsError(
            "--assume, --hardware, --ranks and --sharded are of a forecast: add --dry-run. To run on several ranks: "
            "torchrun --nproc-per-node N -m postlude run ..."
        )
    done = _front_door.run(
        recipe, output, variables, seed=seed, notify=lambda line: print(line, file=sys.stderr)
    )
    value: dict[str, Any] = {
        "output": output,
        "report": f"{output}/report.html",
        "stages": [
            {
                "stage": one.stage,
                "command": shell_line(one.command),
                "seconds": one.seconds,
                "reused": one.reused,
                "result": one.result,
            }
            for one in done
        ],
    }
    return Result(value, _view(value))


def _pairs(option: str, words: list[str] | None) -> dict[str, str]:
    from postlude.errors import SettingsError

    pairs: dict[str, str] = {}
    for word in words or []:
        name, equals, text = word.partition("=")
        if not equals or not name:
            kind = "COUNT" if option == "--assume" else "VALUE"
            raise SettingsError(f"{option} {word!r} is not understood: expected NAME={kind}.")
        pairs[name.strip()] = text
    return pairs


def _view(value: Mapping[str, Any]) -> object:
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("command")
    table.add_column("seconds", justify="right")
    for row in value["stages"]:
        seconds = "kept" if row["reused"] else f"{row['seconds']:.1f}"
        table.add_row(row["stage"], row["command"].split(" ")[1], seconds)
    return Group(table, f"\nReport: {value['report']}")


def _forecast_view(plan: Forecasts) -> object:
    from rich.console import Group
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from postlude.attribution.forecast import duration

    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for heading in ("time", "memory a rank", "written", "ranks"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in plan.stages:
        cells = (
            "-" if one.seconds is None else duration(one.seconds),
            "-" if one.memory is None else decimal(int(one.memory)),
            "-" if one.bytes is None else decimal(int(one.bytes)),
            str(one.ranks),
        )
        why = [one.why] if one.why else []
        if one.fits is False:
            why.insert(0, "more memory than that machine has")
        table.add_row(one.stage, *cells, "done before" if one.done else "; ".join(why))
    left = [one for one in plan.stages if not one.done]
    table.add_row(
        "in all" if all(one.seconds is not None for one in left) else "in all, of these",
        "-"
        if not any(one.seconds for one in left)
        else duration(sum(one.seconds or 0 for one in left)),
        "",
        decimal(int(sum(one.bytes or 0 for one in left))),
        style="bold",
    )
    commands = Text("\n" + "\n".join(one.command for one in plan.stages), style="dim")
    note = f"\nAn order of magnitude, on {plan.machine}. Nothing was run."
    return Group(table, note, commands)
