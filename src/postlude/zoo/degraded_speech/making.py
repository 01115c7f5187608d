"""Clips with known damage, from a seed.

Each clip has a generator of its own, of seed, split and number, so that any of them can be made alone.

Damage is done in this order, so that what is said of each holds in the end: tempo, pause, distortion, noise, lost
packets, gain. Tempo and pause come first because they move what is later; noise goes on through a pause; lost packets
are silent whatever was there. Intervals begin and end at tenths of a second, as answers give them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postlude.errors import DataError, SettingsError
from postlude.zoo.degraded_speech import damage
from postlude.zoo.degraded_speech.columns import RATE, Artifact
from postlude.zoo.degraded_speech.labels import described
from postlude.zoo.degraded_speech.voices import LEVEL, Source, Utterance

__all__ = ["CLASSES", "LONGEST", "SHORTEST", "Maker", "Plan"]

Array = NDArray[np.float64]

SHORTEST, LONGEST = 2.0, 4.0
"""Seconds of a clip."""

CLASSES = {
    "noise": 0.3,
    "distortion": 0.28,
    "pause": 0.17,
    "discontinuity": 0.15,
    "speed": 0.06,
    "loudness": 0.04,
}
"""How often each class of damage is drawn first."""

_COUNTS = (0.1, 0.45, 0.45)  # of clips with no, one and two artifacts
_NOISES = ("white", "pink", "hum", "babble", "click")
_DISTORTIONS = ("clip", "crush", "band")
_TEMPOS = (0.7, 0.8, 0.85, 1.15, 1.2, 1.3, 1.4)
_GAINS = (-12.0, -9.0, -6.0, 3.0, 6.0)  # dB
_TENTH = RATE // 10
_SHORTEST_PART, _WHOLE = (
    5,
    0.3,
)  # tenths of a second of damage, and how often it lasts for the whole clip
_PAUSES = (3, 9)  # tenths of a second
_TRIES = 200
_OTHERS = 8
_SPLITS = ("train", "test")
_CEILING = 0.98


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is drawn before anything is heard.

    Attributes:
        classes: of damage, each at most once.
        tempo: 1 where it stays.
        pause: tenths of a second that are inserted.
    """

    classes: tuple[str, ...]
    tempo: float = 1.0
    pause: int = 0


class Maker:
    """Makes clips.

    Args:
        sources: who speaks, in turns.
        seed: of every draw.
        codecs: whether distortions include a codec, for which sox is needed.

    Raises:
        SettingsError: no source.
    """

    def __init__(self, sources: Sequence[Source], seed: int, codecs: bool = False) -> None:
        if not sources:
            raise SettingsError("nobody speaks: expected a source or more")
        self._sources = tuple(sources)
        self._seed = seed
        self._distortions = (*_DISTORTIONS, "codec") if codecs else _DISTORTIONS
        self._others: dict[str, list[Array]] = {}

    def make(self, split: str, index: int) -> tuple[Array, dict[str, Any]]:
        """One clip of ``train`` or ``test``: samples ``[n]`` at 16 kHz, and its row of labels."""
        random = np.random.default_rng([self._seed, _SPLITS.index(split), index])
        source = self._sources[index % len(self._sources)]
        voices = source.voices(split)
        voice = voices[int(random.integers(len(voices)))]
        plan = draw_plan(random)
        utterance = self._utterance(source, split, voice, plan, random)
        samples, words, artifacts = self._in_time(utterance, plan, random)
        samples, more = self._spoil(samples, plan, split, random)
        artifacts = [*artifacts, *more]
        row = {
            "id": f"{split}_{index:05d}",
            **described(artifacts, source.naturalness, source.feeling(voice), random),
            "artifacts": [_written(artifact) for artifact in artifacts],
            "duration": len(samples) / RATE,
            "voice": voice,
            "source": source.name,
            "text": utterance.text,
            "words": words,
        }
        return samples, row

    def _utterance(
        self, source: Source, split: str, voice: str, plan: Plan, random: np.random.Generator
    ) -> Utterance:
        """A sentence that leaves room for what takes time."""
        for _ in range(_TRIES):
            found = source.speak(source.sentence(split, voice, random), voice, random)
            if len(found.samples) / RATE / plan.tempo + plan.pause / 10 <= LONGEST - 0.1:
                return found
        raise DataError(
            f"{source.name} says no sentence of the {split} set within {LONGEST} s; expected shorter recordings"
        )

    def _in_time(
        self, utterance: Utterance, plan: Plan, random: np.random.Generator
    ) -> tuple[Array, list[list[float]] | None, list[Artifact]]:
        """Samples, words and artifacts after all that moves times; the length is a multiple of 0.1 s."""
        samples = damage.stretch(utterance.samples, plan.tempo)
        words = utterance.words
        if words is not None:
            words = tuple((start / plan.tempo, end / plan.tempo) for start, end in words)
        pause = None
        if plan.pause:
            place = _inside_a_word(samples, words, random)
            samples = damage.insert_silence(samples, place * _TENTH, plan.pause * _TENTH)
            length = plan.pause / 10
            pause = Artifact(
                "pause", "", place / 10, place / 10 + length, 1 if length < 0.5 else 2, length
            )
            if words is not None:
                words = tuple(
                    (
                        start + length * (start >= place / 10),
                        end + length * (end > place / 10),
                    )
                    for start, end in words
                )
        tenths = max(-(-len(samples) // _TENTH), round(SHORTEST * 10))
        samples = np.pad(samples, (0, tenths * _TENTH - len(samples)))
        artifacts = [] if pause is None else [_rounded(pause)]
        if plan.tempo != 1:
            artifacts.insert(0, Artifact("speed", "", 0.0, tenths / 10, 0, plan.tempo))
        said = None if words is None else [[round(a, 3), round(b, 3)] for a, b in words]
        return samples, said, artifacts

    def _spoil(
        self, samples: Array, plan: Plan, split: str, random: np.random.Generator
    ) -> tuple[Array, list[Artifact]]:
        """Everything that leaves times alone."""
        artifacts: list[Artifact] = []
        speech = samples
        if "distortion" in plan.classes:
            kind, severity, value = _draw(self._distortions, random)
            start, end = _interval(speech, random)
            how = {
                "clip": damage.clip,
                "crush": damage.bit_crush,
                "band": damage.band_limit,
                "codec": damage.gsm,
            }[kind]
            samples = how(samples, start, end, value)
            artifacts.append(_artifact("distortion", kind, start, end, severity, value))
        if "noise" in plan.classes:
            kind, severity, value = _draw(_NOISES, random)
            start, end = _interval(speech, random)
            if kind == "click":
                samples = damage.add_clicks(samples, start, end, value, random)
            else:
                others = self._babblers(split) if kind == "babble" else ()
                added = damage.noise(kind, end - start, random, others)
                samples = damage.add_noise(samples, added, start, value)
            artifacts.append(_artifact("noise", kind, start, end, severity, value))
        if "discontinuity" in plan.classes:
            severity = int(random.integers(1, 5))
            value = damage.STEPS["packets"][severity - 1]
            start, end = _interval(speech, random)
            samples, parts = damage.drop_packets(samples, start, end, value, random)
            lost = _artifact("discontinuity", "", start, end, severity, value)
            silent = tuple((a / RATE, b / RATE) for a, b in parts)
            artifacts.append(dataclasses.replace(lost, parts=silent))
        gain = float(random.choice(_GAINS)) if "loudness" in plan.classes else 0.0
        # Louder than this would clip, and a clip of noise may be too loud without any gain.
        room = 20 * np.log10(_CEILING / np.abs(samples).max())
        if gain:
            gain = min(gain, float(room))
            artifacts.append(_artifact("loudness", "", 0, len(samples), 0, round(gain, 2)))
        return samples * 10 ** (min(round(gain, 2), float(room)) / 20), artifacts

    def _babblers(self, split: str) -> list[Array]:
        """Undamaged speech of the same split to make babble of, the same for all of its clips."""
        if split not in self._others:
            random = np.random.default_rng([self._seed, _SPLITS.index(split), 0, 1])
            found = []
            for index in range(_OTHERS):
                source = self._sources[index % len(self._sources)]
                voices = source.voices(split)
                voice = voices[int(random.integers(len(voices)))]
                text = source.sentence(split, voice, random)
                found.append(source.speak(text, voice, random).samples)
            self._others[split] = found
        return self._others[split]


def draw_plan(random: np.random.Generator) -> Plan:
    """Which damage a clip gets, and what of it takes time."""
    count = int(random.choice(len(_COUNTS), p=_COUNTS))
    names, weights = list(CLASSES), np.array(list(CLASSES.values()))
    drawn = random.choice(len(names), count, replace=False, p=weights / weights.sum())
    classes = tuple(names[int(i)] for i in sorted(drawn))
    tempo, pause = float(random.choice(_TEMPOS)), int(random.integers(_PAUSES[0], _PAUSES[1] + 1))
    return Plan(classes, tempo if "speed" in classes else 1.0, pause if "pause" in classes else 0)


def _draw(kinds: Sequence[str], random: np.random.Generator) -> tuple[str, int, float]:
    """A kind of damage, its severity and what that asks for."""
    kind = kinds[int(random.integers(len(kinds)))]
    severity = int(random.integers(1, 5))
    return kind, severity, damage.STEPS[kind][severity - 1]


def _interval(speech: Array, random: np.random.Generator) -> tuple[int, int]:
    """Samples between tenths of a second in which somebody speaks: at most 6 dB below the level of all speech."""
    tenths = len(speech) // _TENTH
    if random.random() >= _WHOLE:
        for _ in range(_TRIES):
            length = int(random.integers(_SHORTEST_PART, tenths))
            start = int(random.integers(tenths - length + 1))
            found = start * _TENTH, (start + length) * _TENTH
            if damage.power(speech[slice(*found)]) >= (LEVEL / 2) ** 2:
                return found
    return 0, tenths * _TENTH


def _inside_a_word(
    samples: Array, words: Sequence[tuple[float, float]] | None, random: np.random.Generator
) -> int:
    """A tenth of a second with speech on both sides, by the known words or else by loudness."""
    near = RATE // 25
    places = range(2, len(samples) // _TENTH - 1)
    if words is not None:
        inner = [p for p in places if any(a + 0.05 <= p / 10 <= b - 0.05 for a, b in words)]
        places = inner or places  # type: ignore[assignment]
    loud = {
        p: min(
            damage.power(samples[p * _TENTH - near : p * _TENTH]),
            damage.power(samples[p * _TENTH : p * _TENTH + near]),
        )
        for p in places
    }
    chosen = [p for p in places if loud[p] >= (LEVEL / 2) ** 2]
    return int(random.choice(chosen)) if chosen else max(loud, key=lambda p: loud[p])


def _artifact(cls: str, kind: str, start: int, end: int, severity: int, value: float) -> Artifact:
    return _rounded(Artifact(cls, kind, start / RATE, end / RATE, severity, value))


def _rounded(artifact: Artifact) -> Artifact:
    # 0.1 + 0.2 is not 0.3, and 0.3 is meant.
    return dataclasses.replace(artifact, start=round(artifact.start, 1), end=round(artifact.end, 1))


def _written(artifact: Artifact) -> dict[str, Any]:
    """As a row of labels holds it."""
    fields = {f.name: getattr(artifact, f.name) for f in dataclasses.fields(artifact)}
    parts = [list(part) for part in fields.pop("parts")]
    return {"class": fields.pop("cls"), **fields, **({"parts": parts} if parts else {})}
