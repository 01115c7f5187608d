"""Who speaks: espeak-ng, human digits joined to sentences, or a toy voice where neither is there.

Every source has voices and sentences for training and others for testing. All voices are low-passed at 3500 Hz: spoken
digits come at 8 kHz and would else give themselves away, and a band limit with them.
"""

from __future__ import annotations

import abc
import dataclasses
import io
import os
import re
import shutil
import subprocess
import tarfile
import wave
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from postlude.errors import DataError, MissingDependencyError
from postlude.numerics.resampling import resample
from postlude.zoo.degraded_speech.columns import RATE
from postlude.zoo.degraded_speech.damage import low_pass, power
from postlude.zoo.degraded_speech.sentences import ENGLISH, GERMAN

__all__ = ["LEVEL", "Digits", "Espeak", "Source", "Toy", "Utterance", "find_digits"]

Array = NDArray[np.float64]

LEVEL = 0.05
"""Root mean square of the frames in which somebody speaks, of every voice: 26 dB below full scale."""

_BAND = 3500.0
_FRAME = RATE // 50
_FADE = RATE // 200
# espeak-ng's rate in words per minute and its pitch, from slow and low to fast and high.
_RATES, _PITCHES = (120, 140, 160, 180, 200), (30, 40, 50, 60, 70)
_DIGIT = re.compile(r"(?:[^/]+/)*(\d)_([A-Za-z]+)_(\d+)\.wav")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A sentence that somebody says, without damage.

    Attributes:
        samples: ``[n]`` at 16 kHz, of the level `LEVEL`.
        text: what is said.
        words: start and end of each word in seconds; None where nobody knows.
    """

    samples: Array
    text: str
    words: tuple[tuple[float, float], ...] | None


class Source(abc.ABC):
    """Something that speaks.

    Attributes:
        name: in labels.
        naturalness: of its undamaged speech, 1 to 5.
        train: voices for training.
        test: voices for testing, none of them among the others.
    """

    name: str
    naturalness: int
    train: tuple[str, ...]
    test: tuple[str, ...]

    def voices(self, split: str) -> tuple[str, ...]:
        """Those of ``train`` or ``test``."""
        return self.test if split == "test" else self.train

    @abc.abstractmethod
    def sentence(self, split: str, voice: str, random: np.random.Generator) -> str:
        """A sentence of the split that this voice can say."""

    @abc.abstractmethod
    def speak(self, text: str, voice: str, random: np.random.Generator) -> Utterance:
        """Say it."""

    @abc.abstractmethod
    def feeling(self, voice: str) -> str:
        """A few words about a voice."""


def _is_test(text: str) -> bool:
    """One sentence in five is for testing, whatever the seed."""
    return zlib.crc32(text.encode()) % 5 == 0


def _ready(samples: Array) -> Array:
    """Low-passed, without silence at both ends, at the level of all voices."""
    samples = low_pass(samples, _BAND)
    loud = _levels(samples)
    spoken = np.flatnonzero(loud > 0.05 * loud.max())
    samples = samples[spoken[0] * _FRAME : (spoken[-1] + 1) * _FRAME]
    return samples * (LEVEL / active_level(samples))


def _levels(samples: Array) -> Array:
    frames = samples[: len(samples) // _FRAME * _FRAME].reshape(-1, _FRAME)
    return np.sqrt(np.mean(np.square(frames), axis=1))


def active_level(samples: Array) -> float:
    """Root mean square over the frames of 20 ms that are not 26 dB below the loudest."""
    loud = _levels(samples)
    return float(np.sqrt(np.mean(np.square(loud[loud > 0.05 * loud.max()]))))


def _read(content: bytes, name: str) -> Array:
    """16-bit mono at 16 kHz."""
    try:
        with wave.open(io.BytesIO(content)) as opened:
            if (opened.getsampwidth(), opened.getnchannels()) != (2, 1):
                raise DataError(f"{name} is no 16-bit mono recording; expected one")
            rate = opened.getframerate()
            data = opened.readframes(len(content))
    except (wave.Error, EOFError) as error:
        raise DataError(f"{name} cannot be read as a recording: {error}") from error
    samples = torch.from_numpy(np.frombuffer(data[: len(data) // 2 * 2], "<i2") / 32768.0)
    return resample(samples, rate, RATE).numpy()


# --------------------------------------------------------------------------------------------------- espeak-ng


class Espeak(Source):
    """espeak-ng, with sentences in the language of the voice.

    Raises:
        MissingDependencyError: it is not installed.
    """

    name = "espeak"
    naturalness = 4
    train = ("en-us", "en-us+f2", "en-us+m3", "en-gb", "en-gb+m3", "de", "de+f2")
    test = ("en-gb+f2", "de+m3")

    def __init__(self) -> None:
        if not self.available():
            raise MissingDependencyError(
                "there is no espeak-ng on this machine: apt-get install espeak-ng, or take spoken digits (--digits)"
            )

    @staticmethod
    def available() -> bool:
        """Whether it is installed."""
        return shutil.which("espeak-ng") is not None

    def sentence(self, split: str, voice: str, random: np.random.Generator) -> str:
        """One of our own, or two in one."""
        german = voice.startswith("de")
        sentences = [s for s in (GERMAN if german else ENGLISH) if _is_test(s) == (split == "test")]
        drawn = [
            str(s) for s in random.choice(sentences, int(random.integers(1, 3)), replace=False)
        ]
        later = [s if s.startswith("I ") else s[0].lower() + s[1:] for s in drawn[1:]]
        return (" und " if german else " while ").join([drawn[0], *later]).replace(". ", " ", 1)

    def speak(self, text: str, voice: str, random: np.random.Generator) -> Utterance:
        """At a rate and a pitch that are drawn."""
        rate, pitch = int(random.choice(_RATES)), int(random.choice(_PITCHES))
        command = ["espeak-ng", "-v", voice, "-s", str(rate), "-p", str(pitch), "--stdout", text]
        try:
            done = subprocess.run(command, capture_output=True, check=True)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            raise DataError(f"espeak-ng cannot speak with the voice {voice}: {said}") from error
        return Utterance(_ready(_read(done.stdout, f"speech of {voice}")), text, None)

    def feeling(self, voice: str) -> str:
        """Sex and accent."""
        sex = "female" if voice.endswith("f2") else "male"
        accent = {"en-us": "American", "en-gb": "British", "de": "German"}[voice.split("+")[0]]
        return f"robotic and flat, a {sex} {accent} voice"


# ------------------------------------------------------------------------------------------------- spoken digits


class _Strings(Source):
    """Sentences of four to six words, drawn from a few words."""

    words: tuple[str, ...]

    def sentence(self, split: str, voice: str, random: np.random.Generator) -> str:
        """Words in any order; which orders are for testing is fixed."""
        while True:
            count = int(random.integers(4, 7))
            text = " ".join(
                self.words[int(i)] for i in random.integers(len(self.words), size=count)
            )
            if _is_test(text) == (split == "test"):
                return text

    def _join(self, text: str, parts: Sequence[Array], random: np.random.Generator) -> Utterance:
        """Words one after the other, with 40 to 120 ms between them."""
        pieces: list[Array] = []
        words: list[tuple[float, float]] = []
        place = 0
        for index, part in enumerate(parts):
            if index:
                pieces.append(np.zeros(int(random.integers(40, 121)) * RATE // 1000))
                place += len(pieces[-1])
            ramp = np.linspace(0, 1, min(_FADE, len(part) // 2))
            part = part.copy()
            part[: len(ramp)] *= ramp
            part[len(part) - len(ramp) :] *= ramp[::-1]
            pieces.append(part)
            words.append((place / RATE, (place + len(part)) / RATE))
            place += len(part)
        samples = np.concatenate(pieces)
        return Utterance(samples * (LEVEL / active_level(samples)), text, tuple(words))


class Digits(_Strings):
    """Recordings of spoken digits (FSDD), joined to sentences.

    Args:
        path: the archive ``fsdd_recordings.tar.gz``, which is read and never unpacked, or a folder of its recordings
            (``7_theo_12.wav``).

    Raises:
        DataError: it cannot be read, or lacks digits of the speakers.
    """

    name = "digits"
    naturalness = 5
    train = ("george", "jackson", "lucas", "nicolas")
    test = ("theo", "yweweler")
    words = _WORDS

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._takes: dict[tuple[str, int], list[bytes]] = {}
        found: dict[tuple[str, int, int], bytes] = {}
        for name, content in _files(Path(path)):
            match = _DIGIT.fullmatch(name)
            if match:
                found[match[2], int(match[1]), int(match[3])] = content
        # In the order of their names, however they come.
        for (speaker, digit, _), content in sorted(found.items()):
            self._takes.setdefault((speaker, digit), []).append(content)
        for speaker in (*self.train, *self.test):
            missing = [d for d in range(10) if (speaker, d) not in self._takes]
            if missing:
                raise DataError(
                    f"{path} has no recording of {speaker} saying {missing[0]}; expected names as "
                    f"{missing[0]}_{speaker}_0.wav, for each digit of {', '.join((*self.train, *self.test))}"
                )

    def speak(self, text: str, voice: str, random: np.random.Generator) -> Utterance:
        """One recording of each digit, at the same level."""
        parts = []
        for word in text.split():
            takes = self._takes[voice, _WORDS.index(word)]
            take = takes[int(random.integers(len(takes)))]
            parts.append(_ready(_read(take, f"a recording of {voice}")))
        return self._join(text, parts, random)

    def feeling(self, voice: str) -> str:
        """That it is a human one."""
        return f"human and clear, {voice} reading digits"


def find_digits() -> Path | None:
    """``audio/fsdd_recordings.tar.gz`` in ``POSTLUDE_DATA`` (by default ``../shared/data``), where it is there."""
    base = Path(os.environ.get("POSTLUDE_DATA", "../shared/data"))
    file = base / "audio" / "fsdd_recordings.tar.gz"
    return file if file.is_file() else None


def _files(path: Path) -> Iterable[tuple[str, bytes]]:
    if path.is_dir():
        yield from ((file.name, file.read_bytes()) for file in sorted(path.glob("*.wav")))
        return
    if not path.is_file():
        raise DataError(
            f"there are no spoken digits at {path}; expected fsdd_recordings.tar.gz or a folder of its recordings"
        )
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                opened = archive.extractfile(member) if member.isfile() else None
                if opened is not None:
                    yield member.name, opened.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an archive of recordings: {error}") from error


# ---------------------------------------------------------------------------------------------------------- toy


class Toy(_Strings):
    """Nobody's voice: syllables of a buzz through three resonances, for tests and machines without the others."""

    name = "toy"
    naturalness = 4
    train = ("toy-85", "toy-110", "toy-140", "toy-180")
    test = ("toy-125", "toy-210")
    # Vowels by their formants in Hz.
    _formants = (
        ("ba", (730, 1090, 2440)),
        ("de", (530, 1840, 2480)),
        ("gi", (270, 2290, 3010)),
        ("lo", (570, 840, 2410)),
        ("mu", (300, 870, 2240)),
        ("na", (660, 1720, 2410)),
        ("re", (490, 1350, 1690)),
        ("so", (440, 1020, 2240)),
    )
    words = tuple(name for name, _ in _formants)

    def speak(self, text: str, voice: str, random: np.random.Generator) -> Utterance:
        """Syllables of 250 to 450 ms, their pitch falling."""
        pitch = float(voice.removeprefix("toy-"))
        formants = dict(self._formants)
        parts = []
        for word in text.split():
            count = int(random.integers(250, 451)) * RATE // 1000
            times = np.arange(count) / RATE
            fall = pitch * (1.05 - 0.2 * times / times[-1])
            phase = 2 * np.pi * np.cumsum(fall) / RATE
            sound = np.zeros(count)
            for k in range(1, int(_BAND / pitch)):
                gain = sum(1 / (1 + ((k * pitch - f) / 90) ** 2) for f in formants[word])
                sound += gain / np.sqrt(k) * np.sin(k * phase)
            sound *= np.minimum(1, np.minimum(times, times[::-1]) / 0.03)
            parts.append(low_pass(sound / np.sqrt(power(sound)), _BAND))
        return self._join(text, parts, random)

    def feeling(self, voice: str) -> str:
        """That it is none."""
        return "artificial, syllables of a toy voice"
