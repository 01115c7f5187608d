"""What stands in a row of labels: QualiSpeech's columns (arXiv:2503.20290) and, of clips made here, the artifacts."""

from __future__ import annotations

import dataclasses

from postlude.zoo.speech_answers import ALL, PARTS

__all__ = ["DESCRIPTIONS", "EXPLANATION", "FEELING", "RATE", "SCORES", "Artifact"]

RATE = 16000
"""Samples per second of every clip."""

SCORES = tuple(dimension.column for dimension in ALL)
"""Columns with a whole number from 1 to 5. 5 is best, but for Speed, where 3 is normal and more is faster."""

FEELING = "Feeling of voice"
"""The column with a few words about the voice."""

DESCRIPTIONS = (FEELING, *(part.column for part in PARTS))
"""Columns with a few words, the last three with times in seconds: ``hum noise 0.8-1.6s``."""

EXPLANATION = "Natural language description"
"""The column with a long text, which ends in the overall score."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One thing that is wrong with a clip.

    Attributes:
        cls: ``noise``, ``distortion``, ``discontinuity``, ``pause``, ``speed`` or ``loudness``; ``class`` in files.
        kind: of noise ``white``, ``pink``, ``hum``, ``babble`` or ``click``, of distortion ``clip``, ``crush``,
            ``band`` or ``codec``; else empty.
        start: seconds.
        end: seconds.
        severity: step from 1 (slight) to 4 (severe); 1 or 2 for a pause, 0 for speed and loudness, which have none.
        value: what was asked of the damage: SNR in dB, clicks per second, share of the peak, bits, cut-off in Hz, share
            of lost packets, seconds of a pause, tempo as a factor, gain in dB.
        parts: silent intervals within ``[start, end]`` of a discontinuity, in seconds.
    """

    cls: str
    kind: str
    start: float
    end: float
    severity: int
    value: float
    parts: tuple[tuple[float, float], ...] = ()
