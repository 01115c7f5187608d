"""The samples of a .wav file: chunks of RIFF, integers of 8 to 32 bits, floats of 32 and 64."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from postlude.errors import DataError
from postlude.zoo.degraded_speech.columns import RATE

__all__ = ["SHORTEST", "check_length", "decode"]

SHORTEST = 0.1
"""Seconds that a recording must have."""

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_CODES = {2: "ADPCM", 6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 49: "GSM 06.10", 85: "MP3"}
# What programs that write into a pipe put for a length they do not know.
_UNKNOWN_LENGTH = 0x7FFFF000


def _chunks(content: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    """Name, declared length and start of every chunk."""
    place = 12
    while place + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, place)
        yield name, length, place + 8
        place += 8 + length + length % 2


def decode(file: Path, longest: float) -> tuple[NDArray[np.float64], int, list[str]]:
    """Read a .wav file that is at most ``longest`` seconds long.

    Returns:
        samples ``[n, channels]`` of full scale 1, samples per second, what was converted.

    Raises:
        DataError: a format without support, a damaged header, fewer samples than declared, none, or too many.
    """
    # What is refused by its header is not read.
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return _decode_chunks(file, content, longest)


def _decode_chunks(
    file: Path, content: mmap.mmap, longest: float
) -> tuple[NDArray[np.float64], int, list[str]]:
    found: dict[bytes, tuple[int, int]] = {}
    for name, length, start in _chunks(content):
        found.setdefault(name, (length, start))
    if b"fmt " not in found or found[b"fmt "][0] < 16 or found[b"fmt "][1] + 16 > len(content):
        raise DataError(f"{file} has no description of its format; it is damaged. Export it again.")
    length, start = found[b"fmt "]
    code, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", content, start)
    if code == _EXTENSIBLE and length >= 40 and start + 26 <= len(content):
        code = struct.unpack_from("<H", content, start + 24)[0]
    supported = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}
    if bits not in supported.get(code, ()):
        what = {_PCM: f"{bits}-bit integers", _FLOAT: f"{bits}-bit floats"}.get(
            code, _CODES.get(code, f"format {code}")
        )
        raise DataError(
            f"{file} holds {what}; expected integers of 8 to 32 bits or floats. Convert it: "
            f"sox {file.name} -r {RATE} -c 1 -b 16 out.wav"
        )
    if not channels or not rate or frame != channels * bits // 8:
        raise DataError(
            f"{file} has {channels} channels at {rate} Hz in frames of {frame} bytes: its header is damaged. "
            "Export it again."
        )
    if b"data" not in found:
        raise DataError(f"{file} has a header and no samples; it is truncated. Copy it once more.")
    length, start = found[b"data"]
    there = len(content) - start
    if length >= _UNKNOWN_LENGTH:
        length = there // frame * frame
    if there < length:
        raise DataError(
            f"{file} is truncated: its header declares {length} bytes of samples, {there} are there. Copy it once more."
        )
    if not length // frame:
        raise DataError(f"{file} holds no samples; expected {SHORTEST} s or more")
    check_length(file, length // frame / rate, longest)
    # Floats stay what they are.
    usual = code == _FLOAT or bits == 16
    converted = [] if usual else [f"{bits}-bit integers to floats of full scale 1"]
    samples = _decode(content[start : start + length // frame * frame], code, bits)
    return samples.reshape(-1, channels), rate, converted


def _decode(content: bytes, code: int, bits: int) -> NDArray[np.float64]:
    if code == _FLOAT:
        return np.frombuffer(content, f"<f{bits // 8}").astype(np.float64)
    if bits == 8:  # the only width without a sign
        return (np.frombuffer(content, np.uint8).astype(np.float64) - 128) / 128
    if bits == 24:
        parts = np.frombuffer(content, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(parts), 4), np.uint8)
        wide[:, 1:] = parts
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(content, f"<i{bits // 8}") / 2.0 ** (bits - 1)


def check_length(file: Path, seconds: float, longest: float) -> None:
    """Refuse recordings that are too long to be meant, before they are decoded.

    Raises:
        DataError: it lasts longer than ``longest``.
    """
    if seconds > longest:
        part = min(longest, 30)
        raise DataError(
            f"{file} lasts {seconds:.0f} s; expected at most {longest:g} s. Cut it: sox {file.name} part.wav trim 0 "
            f"{part:g}, or ffmpeg -i {file.name} -t {part:g} part.wav"
        )
