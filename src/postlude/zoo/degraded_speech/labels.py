"""What was done to a clip, as a listener would put it: the columns of QualiSpeech (arXiv:2503.20290).

Scores follow from severities (our choice), with deficit = 5 - score:

    noise, distortion   5 - severity; 5 where there is none
    continuity          5 - severity of lost packets, less 1 for a pause below half a second and 2 for a longer one
    listening effort    5 - 0.5 * (deficits of the three above)
    naturalness         of the voice (5 for people, 4 for machines) less the deficit of distortion
    overall quality     0.5 * least + 0.5 * mean of these five
    speed               of the tempo: 1 below 0.77, 2 below 0.9, 3, 4 from 1.12, 5 from 1.3

Everything is cut off at 1 and 5, and halves are rounded up. Loudness has no score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from postlude.zoo.degraded_speech.columns import EXPLANATION, FEELING, Artifact
from postlude.zoo.speech_answers import (
    PARTS,
    SPEED,
    Assessment,
    Finding,
    assessment_of,
    phrase,
)
from postlude.zoo.speech_answers import SCORES as DIMENSIONS

__all__ = ["described", "findings", "scores"]

_LONG_PAUSE = 0.5  # seconds
_TEMPOS = (0.77, 0.9, 1.12, 1.3)
_PART_OF = {"noise": "noise", "distortion": "dist", "pause": "pause"}
_SPEEDS = ("very slow", "fairly slow", "normal", "mostly fast", "very fast")
_DEGREES = ("severe", "strong", "moderate", "slight")
_QUALITIES = ("bad", "poor", "fair", "good", "excellent")


def scores(artifacts: Sequence[Artifact], naturalness: int) -> dict[str, int]:
    """By the key of each dimension, Speed among them.

    Args:
        artifacts: of a clip.
        naturalness: of the voice without damage.
    """
    worst = {a.cls: a for a in artifacts}
    severity = {
        cls: worst[cls].severity if cls in worst else 0
        for cls in ("noise", "distortion", "discontinuity")
    }
    pause = 0
    if "pause" in worst:
        pause = 1 if worst["pause"].value < _LONG_PAUSE else 2
    tempo = worst["speed"].value if "speed" in worst else 1.0
    found = {
        "noi": 5 - severity["noise"],
        "dis": 5 - severity["distortion"],
        "con": _whole(5 - severity["discontinuity"] - pause),
    }
    found["eff"] = _whole(5 - 0.5 * sum(5 - score for score in found.values()))
    found["nat"] = _whole(naturalness - severity["distortion"])
    found["mos"] = _whole(0.5 * min(found.values()) + 0.5 * sum(found.values()) / len(found))
    found["spd"] = 1 + sum(tempo >= bound for bound in _TEMPOS)
    return found


def _whole(value: float) -> int:
    return min(5, max(1, math.floor(value + 0.5)))


def findings(artifacts: Sequence[Artifact]) -> dict[str, Finding]:
    """By the key of each part."""
    found = {part.key: Finding() for part in PARTS}
    for artifact in artifacts:
        key = _PART_OF.get(artifact.cls)
        if key is not None:
            found[key] = Finding(artifact.kind, ((artifact.start, artifact.end),))
    return found


def described(
    artifacts: Sequence[Artifact], naturalness: int, feeling: str, random: np.random.Generator
) -> dict[str, Any]:
    """The columns of a clip.

    Args:
        artifacts: one of a class at most.
        naturalness: of the voice without damage.
        feeling: a few words about it.
        random: of the long text's wording.
    """
    by_key = scores(artifacts, naturalness)
    found = findings(artifacts)
    columns: dict[str, Any] = {one.column: by_key[one.key] for one in (SPEED, *DIMENSIONS)}
    columns[FEELING] = feeling
    columns |= {part.column: phrase(part, found[part.key]) for part in PARTS}
    columns[EXPLANATION] = _explained(artifacts, by_key, feeling, random)
    # Said in words, it is read as it was meant.
    _check_same(columns, Assessment({d.key: by_key[d.key] for d in DIMENSIONS}, found))
    return columns


def _check_same(columns: dict[str, Any], meant: Assessment) -> None:
    """Refuse to write words that are read as something else.

    Raises:
        RuntimeError: a fault of this module or of the phrases.
    """
    read = assessment_of(columns)
    if dataclasses.asdict(read) != dataclasses.asdict(meant):
        raise RuntimeError(f"{columns} is read as {read}, and {meant} was meant")


def _explained(
    artifacts: Sequence[Artifact],
    by_key: dict[str, int],
    feeling: str,
    random: np.random.Generator,
) -> str:
    """A long text that ends in the overall score."""
    by_class = {a.cls: a for a in artifacts}
    opening = ("The recording is of", "One hears", "What is presented is", "The listener hears")
    lines = [
        f"{random.choice(opening)} a voice that is {feeling}.",
        f"It speaks at a {_SPEEDS[by_key['spd'] - 1]} speed, which keeps the listener "
        f"{'at ease' if by_key['spd'] == 3 else 'busy following'}.",
        _about_noise(by_class.get("noise"), by_key["noi"]),
        _about_distortion(by_class.get("distortion"), by_key["dis"]),
        _about_continuity(by_class.get("discontinuity"), by_class.get("pause"), by_key["con"]),
        _about_loudness(by_class.get("loudness")),
        f"Following the speech takes {_effort(by_key['eff'])}, and the listening effort is rated {by_key['eff']}.",
        f"As for naturalness, the voice sounds {_QUALITIES[by_key['nat'] - 1]} and earns a {by_key['nat']}.",
    ]
    if random.integers(2):
        lines[2:4] = lines[3:1:-1]
    return " ".join(
        [
            *lines,
            f"Taken together, from the clarity of the signal to its flow, this is a recording of "
            f"{_QUALITIES[by_key['mos'] - 1]} quality, and its overall quality is rated {by_key['mos']} out of 5.",
        ]
    )


def _times(artifact: Artifact) -> str:
    return f"between {artifact.start:.1f} and {artifact.end:.1f} seconds"


def _about_noise(found: Artifact | None, score: int) -> str:
    if found is None:
        return "The background is clean throughout, no noise is noticeable behind the speech, so it is rated 5."
    name = phrase(PARTS[0], Finding(found.kind))
    return (
        f"A {_DEGREES[4 - found.severity]} {name} can be heard {_times(found)} and competes with the words there, "
        f"so the background is rated {score}."
    )


def _about_distortion(found: Artifact | None, score: int) -> str:
    if found is None:
        return "The timbre is intact and the speech is not distorted at any moment, which makes a 5 for distortion."
    name = phrase(PARTS[1], Finding(found.kind))
    return (
        f"The speech itself suffers from {_DEGREES[4 - found.severity]} {name} {_times(found)}, which changes the "
        f"timbre of the voice and makes a {score} for distortion."
    )


def _about_continuity(lost: Artifact | None, pause: Artifact | None, score: int) -> str:
    said = []
    if lost is not None:
        said.append(f"short drop-outs interrupt it {_times(lost)}")
    if pause is not None:
        said.append(f"an unnatural pause tears a word apart {_times(pause)}")
    how = " and ".join(said) if said else "nothing interrupts it and it is very smooth"
    return f"Regarding the flow of the speech, {how}; its continuity is rated {score}."


def _about_loudness(found: Artifact | None) -> str:
    if found is None:
        return "The level is comfortable from the beginning to the end."
    return f"The level is too {'high' if found.value > 0 else 'low'} from the beginning to the end."


def _effort(score: int) -> str:
    return ("very great effort", "great effort", "some effort", "little effort", "no effort")[
        score - 1
    ]
