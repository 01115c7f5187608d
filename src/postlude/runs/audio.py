"""Recordings, and folders of recordings with labels in the columns of QualiSpeech (arXiv:2503.20290).

:func:`read_wav` gives every recording as 16 kHz mono and says what it converted. :func:`read_clips` reads a folder:

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
import wave
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from postlude.errors import DataError, MissingDependencyError
from postlude.numerics.resampling import resample
from postlude.runs.atomic import atomic_write
from postlude.runs.riff import SHORTEST, check_length, decode
from postlude.zoo.degraded_speech.columns import (
    DESCRIPTIONS,
    EXPLANATION,
    RATE,
    SCORES,
    Artifact,
)

__all__ = ["LABELS", "LONGEST", "RATE", "Clip", "Recording", "read_clips", "read_wav", "write_wav"]

Samples = NDArray[np.float32]

LABELS = "labels.jsonl"

LONGEST = 600.0
"""Seconds; longer recordings are refused unless the caller asks for them."""

_SILENT = 1e-4  # 80 dB below full scale
_FOLDERS = ("wav", "wavs", "audio", "")
_TABLES = (".jsonl", ".csv", ".json")
_ENCODED = (".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aif", ".aiff")


@dataclasses.dataclass(frozen=True)
class Recording:
    """Sound.

    Attributes:
        samples: ``float32 [n]``, full scale is 1.
        rate: samples per second, always :data:`RATE`.
        converted: what had to be changed to get there, in words; empty for a 16 kHz mono file of 16 bits or floats.
    """

    samples: Samples
    rate: int = RATE
    converted: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / self.rate


def read_wav(path: str | os.PathLike[str], longest: float = LONGEST) -> Recording:
    """Read a recording as 16 kHz mono.

    ``.wav`` with integers of 8, 16, 24 or 32 bits or floats of 32 or 64 bits, any number of channels, any rate. Other
    formats (FLAC, MP3, Ogg, ...) are read with the library soundfile.

    Args:
        path: of the file.
        longest: seconds that are accepted.

    Raises:
        DataError: no such file, not a recording, a format that cannot be read, truncated, empty, silent, shorter than
            0.1 s, longer than ``longest``, or with NaN.
        MissingDependencyError: the file is no wav and soundfile is not installed.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(
            f"{file} is a folder; expected one recording. Give the path of a .wav in it."
        )
    if not file.is_file():
        raise DataError(f"there is no recording {file}; expected the path of a .wav file")
    with file.open("rb") as opened:
        head = opened.read(12)
    if not head:
        raise DataError(f"{file} is empty, 0 bytes; expected a .wav file. Export it once more.")
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        sound, rate, converted = decode(file, longest)
    elif file.suffix.lower() in _ENCODED or head[:4] in (b"fLaC", b"OggS", b"ID3\x03", b"ID3\x04"):
        sound, rate, converted = _read_encoded(file, longest)
    else:
        raise DataError(
            f"{file} is not a recording: it begins with {head[:8]!r}, a .wav file with b'RIFF'. Give a .wav, or "
            f"convert it first: sox {file.name} -r {RATE} -c 1 -b 16 out.wav"
        )
    return _standard(file, sound, rate, converted)


def write_wav(path: str | os.PathLike[str], samples: Samples, rate: int = RATE) -> None:
    """Write mono 16-bit integers, atomically.

    Args:
        path: of the file; its folder is there.
        samples: ``[n]`` within [-1, 1].
        rate: samples per second.

    Raises:
        DataError: samples that are not finite or lie outside.
    """
    sound = np.asarray(samples, dtype=np.float64)
    if sound.ndim != 1 or not len(sound):
        raise DataError(f"samples have shape {list(sound.shape)}; expected [n] with n of 1 or more")
    peak = float(np.abs(sound).max())
    if not peak <= 1.0:
        raise DataError(f"samples reach {peak:g}; expected at most 1. Scale them before writing.")
    # The scale that reading divides by, so that what was read is written as it was.
    codes = np.clip(np.round(sound * 32768.0), -32768, 32767).astype("<i2")
    with atomic_write(path) as temporary, wave.open(str(temporary), "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(codes.tobytes())


# --------------------------------------------------------------------------------------------- conversions


def _read_encoded(file: Path, longest: float) -> tuple[NDArray[np.float64], int, list[str]]:
    try:
        import soundfile
    except ImportError as error:
        raise MissingDependencyError(
            f"{file} is no .wav file, and other formats are read with soundfile: pip install 'postlude[audio]', or "
            f"convert it: sox {file.name} -r {RATE} -c 1 -b 16 out.wav"
        ) from error
    try:
        described = soundfile.info(str(file))
        check_length(file, described.duration, longest)
        samples, rate = soundfile.read(str(file), dtype="float64", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise DataError(
            f"{file} cannot be read as a recording: {error}. Convert it: sox {file.name} -r {RATE} -c 1 -b 16 out.wav"
        ) from error
    if not len(samples):
        raise DataError(f"{file} holds no samples; expected {SHORTEST} s or more")
    return samples, int(rate), [f"{described.format} to samples"]


def _standard(
    file: Path, samples: NDArray[np.float64], rate: int, converted: list[str]
) -> Recording:
    """16 kHz mono from samples ``[n, channels]``."""
    if not np.isfinite(samples).all():
        raise DataError(f"{file} holds samples that are NaN or infinite; it is damaged")
    _check_sounds(file, samples, "")
    if len(samples) / rate < SHORTEST:
        raise DataError(
            f"{file} lasts {len(samples) / rate:.3f} s; expected {SHORTEST} s or more of speech"
        )
    channels = samples.shape[1]
    mono = samples.mean(axis=1)
    if channels > 1:
        converted.append(f"the mean of {channels} channels")
        _check_sounds(file, mono, f" as the mean of its {channels} channels, which cancel")
    if rate != RATE:
        mono = resample(torch.from_numpy(mono), rate, RATE).numpy()
        converted.append(f"{rate} Hz to {RATE} Hz")
    peak = float(np.abs(samples).max())
    if peak > 1:
        converted.append(f"nothing done about samples beyond full scale, up to {peak:.3g}")
    return Recording(mono.astype(np.float32), RATE, tuple(converted))


def _check_sounds(file: Path, samples: NDArray[np.float64], how: str) -> None:
    # A constant is silence as well.
    if float(np.ptp(samples, axis=0).max()) < _SILENT:
        raise DataError(
            f"{file} is silent{how}: no sample is 80 dB below full scale or louder. Expected speech; check the "
            "microphone, or the part that was cut out."
        )


# --------------------------------------------------------------------------------------------------- clips


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
    file = name if name.lower().endswith((".wav", *_ENCODED)) else f"{name}.wav"
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
