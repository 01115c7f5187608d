"""The lines of .jsonl files, each with where it stands."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postlude.errors import DataError
from postlude.runs.documents import read_text

__all__ = ["FORMS", "Row", "read_rows"]

FORMS = '"prompt" and "completion", "messages", or "text"'


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a .jsonl file."""

    file: Path
    line: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        """``FILE line N``."""
        return f"{self.file} line {self.line}"


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The objects of a .jsonl file, or of every .jsonl file of a directory in sorted order; blank lines are left out.

    A .json file with a list of objects will do as well; the number of an object stands for its line.

    Raises:
        DataError: no such file, another kind of file, a line that is no JSON object, or no line at all.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(file for file in source.glob("*.jsonl") if file.is_file())
        if not files:
            raise DataError(f"{source} holds no .jsonl file: expected {FORMS}, one object a line.")
    elif not source.is_file():
        raise DataError(f"There is no data at {source}: expected a .jsonl file.")
    elif source.suffix == ".json":
        return _listed(source)
    elif source.suffix != ".jsonl":
        raise DataError(
            f"{source} ends in {source.suffix or 'nothing'}; expected .jsonl with one JSON object a line."
        )
    else:
        files = [source]
    rows = [row for file in files for row in _rows(file)]
    if not rows:
        raise DataError(f"{source} holds no line: expected one JSON object a line.")
    return rows


def _listed(file: Path) -> list[Row]:
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise DataError(
            f"{file} holds no list of objects; expected one, or a .jsonl file with an object a line."
        )
    if not content:
        raise DataError(f"{file} holds an empty list: expected objects.")
    return [Row(file, number, fields) for number, fields in enumerate(content, start=1)]


def _rows(file: Path) -> list[Row]:
    content = read_text(file)
    rows = []
    # Not splitlines: JSON strings may hold U+2028 and other separators as they are.
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} line {line} is not valid JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise DataError(
                f"{file} line {line} is a JSON {type(fields).__name__}; expected an object with {FORMS}."
            )
        rows.append(Row(file, line, fields))
    return rows
