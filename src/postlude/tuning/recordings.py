"""The recordings that demonstrations speak of.

    {"audio": "wav/0001.wav", "prompt": "Rate the distortion ...", "completion": "4"}

The path is relative to the folder of the .jsonl file and stays in it. A recording is read and turned into features
once, however many lines ask about it and however many epochs follow.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError, InputError
from postlude.runs.audio import read_wav
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.listening import Features, Listener, join_features, window_numbers
from postlude.surgery.anatomy import AudioAnatomy
from postlude.tuning.rows import Row, read_rows

__all__ = [
    "AUDIO",
    "Recordings",
    "audio_path",
    "recorded_probes",
    "recordings_digest",
    "recordings_for",
]

AUDIO = "audio"
# Rows about one recording stand together from so many recordings in a batch on: fewer would make steps too much alike.
_LEAST = 4


def audio_path(row: Row) -> Path:
    """The file that a line names.

    Raises:
        DataError: no string, or a path that leaves the folder of the .jsonl file.
    """
    given = row.fields[AUDIO]
    if not isinstance(given, str) or not given:
        raise DataError(
            f'{row.where} has "{AUDIO}" as a {type(given).__name__}; expected the path of a recording'
        )
    folder = os.path.abspath(row.file.parent)
    path = os.path.normpath(os.path.join(folder, given))
    if os.path.commonpath([folder, path]) != folder:
        raise DataError(
            f'{row.where} names the recording "{given}", which is outside of {folder}; expected a path relative to '
            "the folder of the .jsonl file, and inside of it"
        )
    return Path(path)


def recordings_for(checkpoint: Checkpoint) -> Recordings | None:
    """What reads the recordings of a model's demonstrations; None for a model that hears nothing."""
    if not isinstance(checkpoint.anatomy, AudioAnatomy) or checkpoint.processor is None:
        return None
    return Recordings(Listener(checkpoint))


def recorded_probes(checkpoint: Checkpoint, data: Path, count: int) -> list[dict[str, Tensor]]:
    """Arguments of the model's forward for the first lines that ask about a recording; none for a deaf model."""
    recordings = recordings_for(checkpoint)
    rows = [] if recordings is None else [row for row in read_rows(data) if AUDIO in row.fields]
    if recordings is None:
        return []
    return [
        recordings.listener.prepare([recordings.read(row)], [str(row.fields["prompt"])])
        for row in rows[:count]
    ]


def recordings_digest(checkpoint: Checkpoint, data: Path) -> str | None:
    """A SHA-256 over the recordings that lines name, in hexadecimal; None where there are none."""
    if not isinstance(checkpoint.anatomy, AudioAnatomy):
        return None
    paths = {audio_path(row): None for row in read_rows(data) if AUDIO in row.fields}
    found = hashlib.sha256()
    for path in paths:
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest() if paths else None


class Recordings:
    """What a model hears of every recording of a set of examples.

    Attributes:
        listener: of the model.
        of: for each example the number of its recording; -1 for none.
        features: of each recording.
        tokens: of a question, its answer and the number of embeddings between, for whoever makes them.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.of: list[int] = []
        self.features: list[Features] = []
        self.tokens: dict[tuple[str, str, int], Any] = {}
        self.seconds = 0.0
        self._known: dict[Path, int] = {}
        self._converted: Counter[str] = Counter()

    def read(self, row: Row) -> Features:
        """What the model hears of the recording that a line names.

        Raises:
            DataError: names the line: a recording that is not there, is none, is silent, or is too long.
        """
        path = audio_path(row)
        if path not in self._known:
            try:
                recording = read_wav(path)
                features = self.listener.features(recording)
            except InputError as error:
                raise DataError(f"{row.where}: {error}") from error
            self._known[path] = len(self.features)
            self.features.append(features)
            self.seconds += recording.duration
            self._converted.update(recording.converted)
        return self.features[self._known[path]]

    def note(self, row: Row) -> None:
        """Count a line as the next example."""
        self.of.append(self._known[audio_path(row)] if AUDIO in row.fields else -1)

    def inputs(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """Audio arguments of the model's forward for some examples, in order, under ``audio.NAME``.

        ``recordings [windows]`` numbers equal ones; nothing at all where no example has a recording.
        """
        heard = [self.features[self.of[index]] for index in examples if self.of[index] >= 0]
        if not heard:
            return {}
        found = {f"{AUDIO}.{name}": value for name, value in join_features(heard).items()}
        return {**found, "recordings": window_numbers(heard)}

    def together(self, order: Sequence[int], rows: int) -> list[int]:
        """The same order, but that examples of one recording follow its first one.

        Only where a batch of ``rows`` holds several recordings even so.
        """
        groups: dict[Any, list[int]] = {}
        for index in order:
            number = self.of[index]
            groups.setdefault(number if number >= 0 else (index,), []).append(index)
        if rows < _LEAST * max(map(len, groups.values())):
            return list(order)
        return [index for group in groups.values() for index in group]

    def digest(self) -> str:
        """A SHA-256 over features and which example has which, in hexadecimal."""
        found = hashlib.sha256(torch.tensor(self.of, dtype=torch.int64).numpy().tobytes())
        for one in self.features:
            for name, value in sorted(one.inputs.items()):
                found.update(f"{name} {tuple(value.shape)}".encode())
                found.update(value.contiguous().numpy().tobytes())
        return found.hexdigest()

    def counts(self) -> dict[str, Any]:
        """What was read, in numbers; ``converted`` names what was done to how many recordings."""
        return {
            "recordings": len(self.features),
            "recorded_seconds": round(self.seconds, 3),
            "converted": dict(sorted(self._converted.items())),
        }
