"""Folders of recordings with labels in the columns of QualiSpeech (arXiv:2503.20290).

    labels.jsonl        one object a row: `id`, the columns by their names, and what else is known (`artifacts`, ...)
    wav/ID.wav

The published data set is a table of the same columns; a ``.csv``, ``.jsonl`` or ``.json`` list is read, with recordings
in ``wav``, ``wavs``, ``audio`` or beside it.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from postlude.errors import DataError
from postlude.runs.audio import ENCODED, Recording, read_wav
from postlude.zoo.degraded_speech.columns import DESCRIPTIONS, EXPLANATION, SCORES, Artifact

__all__ = ["LABELS", "Clip", "read_clips"]

LABELS = "labels.jsonl"

_FOLDERS = ("wav", "wavs", "audio", "")
_TABLES = (".jsonl", ".csv", ".json")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording and what listeners, or its maker, say about it.

    Attributes:
        id: its name.
        path: of the recording.
        scores: by the columns of `SCORES`, 1 to 5.
        descriptions: by the columns of `DESCRIPTIONS`, words with times in seconds.
        explanation: the long text.
        artifacts: what is wrong with it and when, or None where only the descriptions tell.
        details: every other column: `duration`, `voice`, `source`, `text`, ...
    """

    id: str
    path: Path
    scores: Mapping[str, int]
    descriptions: Mapping[str, str]
    explanation: str
    artifacts: tuple[Artifact, ...] | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """Its row in the data set: `id` and the columns of QualiSpeech."""
        explained = {EXPLANATION: self.explanation}
        return {"id": self.id, **self.scores, **self.descriptions, **explained}

    def read(self) -> Recording:
        """Its sound."""
        return read_wav(self.path)


def read_clips(path: str | os.PathLike[str], limit: int | None = None) -> list[Clip]:
    """Read the labels of a folder and find their recordings, which are not opened yet.

    Args:
        path: a folder with one table of labels, or the table.
        limit: read this many, from the first one.

    Raises:
        DataError: no table or several; no rows; by file and row: a column that is missing, a score outside of 1 to 5,
            an id that occurs twice or leaves the folder, a recording that is not there, times that end before they
            start.
    """
    table = _table(Path(path))
    clips: list[Clip] = []
    seen: dict[str, int] = {}
    for number, row in _rows(table):
        where = f"{table} row {number}"
        clip = _clip(table.parent, row, where)
        if clip.id in seen:
            raise DataError(
                f"{where} has the id {clip.id!r} of row {seen[clip.id]}; expected another"
            )
        seen[clip.id] = number
        clips.append(clip)
        if limit is not None and len(clips) >= limit:
            break
    if not clips:
        raise DataError(f"{table} holds no rows; expected one a clip")
    return clips


def _table(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in _TABLES:
            raise DataError(f"{path} is no table that is read here: expected {', '.join(_TABLES)}")
        return path
    if not path.is_dir():
        raise DataError(f"there is no folder or file {path}; expected clips with {LABELS}")
    if (path / LABELS).is_file():
        return path / LABELS
    inner = [f.parent for f in sorted(path.glob(f"*/{LABELS}"))]
    if inner:
        # What lies beside sets of clips, such as how they were made, is no table of labels.
        names = ", ".join(one.name for one in inner)
        raise DataError(
            f"{path} holds no {LABELS}; it has clips below it: {names}. Give the path of one, for example {inner[0]}"
        )
    found = [f for f in sorted(path.iterdir()) if f.suffix in _TABLES and f.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f.name for f in found)
        raise DataError(f"{path} holds several tables ({names}); give the path of one")
    raise DataError(f"{path} holds no {LABELS} and no other table ({', '.join(_TABLES)})")


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows and their numbers: lines of a .jsonl file, else counted from 1 without the header."""
    try:
        content = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8 at byte {error.start}: convert it first") from error
    rows: Iterator[tuple[int, Any]]
    if table.suffix == ".csv":
        rows = enumerate(csv.DictReader(content.splitlines(keepends=True)), start=1)
    elif table.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), start=1)
        rows = ((number, _json(line, table, number)) for number, line in lines if line.strip())
    else:
        listed = _json(content, table, 1)
        if not isinstance(listed, list):
            raise DataError(
                f"{table} is a JSON {type(listed).__name__}; expected a list of objects"
            )
        rows = enumerate(listed, start=1)
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{table} row {number} is a {type(row).__name__}; expected an object")
        yield number, row


def _json(content: str, table: Path, number: int) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{table} row {number} is not JSON: {error}") from error


def _clip(folder: Path, row: Mapping[str, Any], where: str) -> Clip:
    texts = {name: _text(row, name, where) for name in ("id", *DESCRIPTIONS, EXPLANATION)}
    known = {"id", *SCORES, *DESCRIPTIONS, EXPLANATION, "artifacts"}
    artifacts = row.get("artifacts")
    return Clip(
        id=texts["id"],
        path=_recording(folder, texts["id"], where),
        scores={name: _score(row, name, where) for name in SCORES},
        descriptions={name: texts[name] for name in DESCRIPTIONS},
        explanation=texts[EXPLANATION],
        artifacts=None if artifacts is None else _artifacts(artifacts, where),
        details={name: value for name, value in row.items() if name not in known},
    )


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        raise DataError(f"{where} has no {name!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(value, str) or (name == "id" and not value.strip()):
        raise DataError(f"{where}: {name!r} is {value!r}; expected words")
    return value


def _score(row: Mapping[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if value is None:
        raise DataError(f"{where} has no {name!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number not in (1, 2, 3, 4, 5):
        raise DataError(f"{where}: {name!r} is {value!r}; expected a score of 1, 2, 3, 4 or 5")
    return int(number)


def _recording(folder: Path, name: str, where: str) -> Path:
    file = name if name.lower().endswith((".wav", *ENCODED)) else f"{name}.wav"
    places = [folder / inner / file for inner in _FOLDERS]
    # Links in the folder may point elsewhere; an id may not.
    if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file or "\0" in file:
        raise DataError(f"{where}: the id {name!r} leaves the folder {folder}; expected a name")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(
            f"{where}: there is no recording {places[0]}, nor in {', '.join(map(repr, _FOLDERS[1:3]))} or beside "
            f"{LABELS}. Put it there, or leave the row out."
        )
    return found


def _artifacts(listed: Any, where: str) -> tuple[Artifact, ...]:
    if not isinstance(listed, list):
        raise DataError(f"{where}: 'artifacts' is a {type(listed).__name__}; expected a list")
    return tuple(_artifact(entry, where) for entry in listed)


def _artifact(entry: Any, where: str) -> Artifact:
    try:
        parts: Sequence[Sequence[float]] = entry.get("parts", ())
        found = Artifact(
            cls=str(entry["class"]),
            kind=str(entry.get("kind", "")),
            start=float(entry["start"]),
            end=float(entry["end"]),
            severity=int(entry["severity"]),
            value=float(entry.get("value", math.nan)),
            parts=tuple((float(start), float(end)) for start, end in parts),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: the artifact {entry!r} cannot be read ({type(error).__name__}: {error}); expected class, start, "
            "end and severity"
        ) from error
    if not 0 <= found.start <= found.end < math.inf:
        raise DataError(
            f"{where}: the artifact {found.cls!r} lasts from {found.start} to {found.end} s; expected 0 <= start <= end"
        )
    return found
