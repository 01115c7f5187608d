"""``postlude report``: the page of a run of a recipe, or of several runs side by side."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, refuse_existing

__all__ = ["report"]


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Directories that `postlude run` wrote; several are set side by side.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The page; report.html of the run otherwise."
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Write the page of one run of a recipe, or of several side by side."""
    import webbrowser

    from postlude import _front_door
    from postlude.errors import SettingsError

    if len(runs) > 1 and output is None:
        raise SettingsError("a page of several runs belongs to none of them: say where (-o FILE).")
    refuse_existing(output, overwrite=overwrite)
    page = _front_door.report(runs, output)
    if open_:
        address = page.resolve().as_uri()
        if not webbrowser.open(address):
            print(f"postlude: there is no browser to show {address} with.", file=sys.stderr)
    return Result({"report": str(page)})
