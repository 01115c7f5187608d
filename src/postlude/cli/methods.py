"""``postlude methods``: what is registered, and what each setting of a method means."""

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
        "meanings": info.meanings,
    }


def _view(found: list[MethodInfo], whole: bool) -> object:
    """Two lines a method, which fits a narrow terminal; with ``whole``, its settings below."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    width = max((len(info.name) for info in found), default=0)
    verb = None
    for info in found:
        if info.verb != verb:
            parts.append(Text(info.verb if verb is None else f"\n{info.verb}", style="bold"))
            verb = info.verb
        details = [info.family, info.paper, *(f"needs {need}" for need in info.needs)]
        row = Table.grid(padding=(0, 2))
        row.add_column(width=width)
        row.add_column()
        row.add_row(Text(info.name, style="cyan"), Text(info.summary))
        row.add_row("", Text(", ".join(filter(None, details)), style="dim"))
        parts.append(Padding(row, (0, 0, 0, 2)))
        if whole and info.options:
            table = Table("setting", "default", "meaning", box=None, pad_edge=False)
            meanings = info.meanings
            for option, default in info.options.items():
                table.add_row(
                    Text(option), Text(str(default)), Text(meanings[option].replace("``", ""))
                )
            parts += ["", Padding(table, (0, 0, 0, 2))]
    return Group(*parts)
