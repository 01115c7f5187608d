"""Recordings: every one is read as 16 kHz mono, and what was converted is said."""

from __future__ import annotations

import dataclasses
import os
import wave
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from postlude.errors import DataError, MissingDependencyError
from postlude.numerics.resampling import resample
from postlude.runs.atomic import atomic_write
from postlude.runs.riff import SHORTEST, check_length, decode
from postlude.zoo.degraded_speech.columns import RATE

__all__ = ["ENCODED", "LONGEST", "RATE", "Recording", "read_wav", "write_wav"]

Samples = NDArray[np.float32]

LONGEST = 600.0
"""Seconds; longer recordings are refused unless the caller asks for them."""

ENCODED = (".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aif", ".aiff")
"""Endings of files that soundfile reads."""

_SILENT = 1e-4  # 80 dB below full scale


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
    elif file.suffix.lower() in ENCODED or head[:4] in (b"fLaC", b"OggS", b"ID3\x03", b"ID3\x04"):
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
