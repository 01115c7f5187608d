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
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Run a recipe: a list of stages, each one command, whose outputs feed later stages."""
    from postlude import _front_door
    from postlude.errors import SettingsError

    variables: dict[str, str] = {}
    for word in set_ or []:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise SettingsError(f"--set {word!r} is not understood: expected NAME=VALUE.")
        variables[name.strip()] = text
    if dry_run:
        plan = _front_door.forecast(recipe, output, variables, seed=seed)
        return Result(plan, _forecast_view(plan))
    done = _front_door.run(
        recipe, output, variables, seed=seed, notify=lambda line: print(line, file=sys.stderr)
    )
    value: dict[str, Any] = {
        "output": output,
        "report": f"{output}/report.html",
        "stages": [
            {
                "stage": one.stage,
                "command": " ".join(["postlude", *one.command]),
                "seconds": one.seconds,
                "reused": one.reused,
                "result": one.result,
            }
            for one in done
        ],
    }
    return Result(value, _view(value))


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

    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for heading in ("seconds", "memory", "written"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in plan.stages:
        cells = (
            "-" if one.seconds is None else f"{one.seconds:.2g}",
            "-" if one.memory is None else decimal(int(one.memory)),
            "-" if one.bytes is None else decimal(int(one.bytes)),
        )
        table.add_row(one.stage, *cells, "done before" if one.done else one.why)
    commands = Text("\n" + "\n".join(one.command for one in plan.stages), style="dim")
    note = f"\nAn order of magnitude, on {plan.machine}. Nothing was run."
    return Group(table, note, commands)
