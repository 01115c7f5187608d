"""``postlude methods``: what is registered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result

if TYPE_CHECKING:
    from postlude.registry import MethodInfo

__all__ = ["methods"]


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One method, with its settings and their defaults."),
    ] = None,
    verb: Annotated[
        str | None, typer.Option("--verb", help="Only the methods of this verb.", metavar="VERB")
    ] = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """List every method: verb, family, paper, what it needs."""
    from postlude import registry
    from postlude.errors import UnknownNameError

    found = registry.available(verb)
    if name is not None:
        known = [info.name for info in found]
        if name not in known:
            raise UnknownNameError("method", name, known, "`postlude methods` lists them all.")
        found = [info for info in found if info.name == name]
    return Result({"methods": [_entry(info) for info in found]}, _view(found, name is not None))


def _entry(info: MethodInfo) -> dict[str, Any]:
    return {
        "verb": info.verb,
        "name": info.name,
        "family": info.family,
        "paper": info.paper,
        "needs": info.needs,
        "summary": info.summary,
        "options": info.options,
    }


def _view(found: list[MethodInfo], whole: bool) -> object:
    from rich.console import Group
    from rich.table import Table

    if not whole:
        table = Table(box=None, pad_edge=False)
        for column in ("verb", "method", "family", "paper", "needs", "what it does"):
            table.add_column(column, no_wrap=column != "what it does")
        for info in found:
            needs = ", ".join(info.needs) or "-"
            paper = info.paper or "-"
            table.add_row(info.verb, info.name, info.family, paper, needs, info.summary)
        return table
    parts: list[Any] = []
    for info in found:
        about = f"[bold]{info.verb} {info.name}[/]  {info.summary}"
        parts.append(f"{about}\nfamily {info.family}; {info.paper or 'no paper'}")
        table = Table("setting", "default", box=None, pad_edge=False)
        for option, default in info.options.items():
            table.add_row(option, str(default))
        parts += [table, ""]
    return Group(*parts)
