"""What a command hands back, printed for a person or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "Result",
    "number_table",
    "plain",
    "refuse_existing",
    "tables",
    "this_command",
    "to_json",
    "write_json",
]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one command.

    Attributes:
        value: what ``--json`` prints: a mapping, or something that :func:`plain` makes one of.
        view: what a person sees, a rich renderable; ``None`` shows ``value``, as tables if need be.
    """

    value: Any
    view: object = None

    def show(self, console: Console) -> None:
        """Print for a person."""
        view = self.view
        if view is None and _is_renderable(self.value):
            view = self.value
        for part in [view] if view is not None else tables(self.value):
            # What asks for no wrapping, such as a command to be copied, is not cut off either.
            console.print(part, crop=False)


def plain(value: object) -> Any:
    """``value`` in the types of JSON.

    An object with a ``to_dict`` method is asked for it; data classes become objects; tensors and arrays
    become lists; paths, types and dtypes become strings. NaN and infinity, which JSON cannot write, become
    null.

    Raises:
        TypeError: a value that none of this covers.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike | type) or type(value).__name__ == "dtype":
        return value.__name__ if isinstance(value, type) else str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def to_json(value: object) -> str:
    """One line of strict JSON."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False)


def write_json(value: object, path: str | None, *, overwrite: bool) -> None:
    """Write ``value`` to ``path``; nothing happens without a path, or on another rank than the first.

    Raises:
        OutputExistsError: the file exists and may not be replaced.
    """
    from postlude.runs.ranks import rank

    if path is None or rank():
        return
    from postlude.runs.atomic import atomic_write

    refuse_existing(path, overwrite=overwrite)
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(value) + "\n", encoding="utf-8")


def refuse_existing(path: str | None, *, overwrite: bool) -> None:
    """Refuse an output file that is there already, before any work is done for it.

    Raises:
        OutputExistsError: the path is a directory, or a file that may not be replaced.
    """
    from postlude.errors import OutputExistsError

    if path is None or not os.path.exists(path):
        return
    if os.path.isdir(path):
        raise OutputExistsError(f"{path} is a directory, and the output is a file: name a file.")
    if not overwrite:
        raise OutputExistsError(
            f"{path} already exists. Choose another output, or pass --overwrite to replace it."
        )


def _is_renderable(value: object) -> bool:
    return hasattr(value, "__rich__") or hasattr(value, "__rich_console__")


def tables(value: Any) -> list[Any]:
    """Tables for a result: its single values, then one for every nested part."""
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    single = Table(show_header=False, box=None, pad_edge=False)
    single.add_column()
    # A path that is cut off is of no use.
    single.add_column(overflow="fold")
    for name, item in (value if isinstance(value, Mapping) else plain(value)).items():
        if _is_renderable(item):
            parts += [Text(f"\n{name}", style="bold"), item]
            continue
        item = plain(item)
        if isinstance(item, dict) and item:
            parts += [Text(f"\n{name}", style="bold"), *tables(item)]
        elif isinstance(item, list) and item and all(isinstance(row, dict) for row in item):
            parts += [Text(f"\n{name}", style="bold"), _rows(item)]
        else:
            single.add_row(Text(name, style="dim"), Text(_cell(item)))
    return [single, *parts] if single.row_count else parts


def number_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of names and numbers: the names on the left fold where there is little room, the numbers never."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number > 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def this_command() -> str:
    """The command line as it was typed, to be printed on what it makes."""
    return shlex.join(["postlude", *sys.argv[1:]])


def _rows(rows: list[dict[str, Any]]) -> object:
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=None, pad_edge=False)
    for name in columns:
        numbers = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(map(_cell, value[:8]))
        return f"{shown}, ... ({len(value)} values)" if len(value) > 8 else shown
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
