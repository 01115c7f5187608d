"""What is asked about a recording, and the answers: written, parsed, and taken from QualiSpeech's columns.

The short questions (calibration) ask for one dimension, and the answer is one digit:

    Rate the background noise of this speech from 1 to 5. Answer with one number.      4

The long one asks for everything, in a fixed order. Times are in seconds, to a tenth:

    noi=3 dis=5 con=5 eff=4 nat=4 mos=3 | noise hum 0.8-1.6 | dist none | pause none

Nothing else is read: an answer to a short question that is not exactly one digit is skipped, and a part of a long
answer that is missing, twice there, or has a range that ends before it starts is unparsed (``None``), never a score.

Columns and phrases are those of QualiSpeech (arXiv:2503.20290): scores 1 to 5, "not noticeable", "not distorted" and
"very smooth" for nothing, otherwise a phrase with time ranges ("wind-like sound 0-1.7s"). Ranges are looked for in
descriptions only: "from 1 to 5" in a sentence is none. Grammar and wording of the questions are our choice.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from postlude.errors import DataError
from postlude.numerics.intervals import Intervals, union

__all__ = [
    "ALL",
    "LONG_QUESTION",
    "PARTS",
    "SCORES",
    "SPEED",
    "Assessment",
    "Dimension",
    "Finding",
    "Parsed",
    "Part",
    "answer_pair",
    "assessment_of",
    "calibration_pairs",
    "parse",
    "parse_score",
    "part_text",
    "phrase",
    "question",
    "read_phrase",
    "segments",
    "write",
]


@dataclasses.dataclass(frozen=True)
class Dimension:
    """Something that is scored from 1 to 5.

    Attributes:
        key: in a long answer.
        column: of QualiSpeech.
        words: how a question calls it.
    """

    key: str
    column: str
    words: str


@dataclasses.dataclass(frozen=True)
class Part:
    """An artifact that is described.

    Attributes:
        key: in a long answer.
        column: of QualiSpeech.
        nothing: the phrase for none.
        noun: the word that follows a type in a phrase; empty where an artifact has no types, only times.
    """

    key: str
    column: str
    nothing: str
    noun: str


SCORES = (
    Dimension("noi", "Background noise", "background noise"),
    Dimension("dis", "Distortion", "distortion"),
    Dimension("con", "Continuity", "continuity"),
    Dimension("eff", "Listening effort", "listening effort"),
    Dimension("nat", "Naturalness", "naturalness"),
    Dimension("mos", "Overall quality", "overall quality"),
)
"""The scores of a long answer, in its order: 5 is best."""

SPEED = Dimension("spd", "Speed", "speed")
"""3 is normal, 4 mostly fast, 2 fairly slow. Asked for, but no part of long answers and of no metric (imbalanced)."""

ALL = (SPEED, *SCORES)

PARTS = (
    Part("noise", "Noise Description", "not noticeable", "noise"),
    Part("dist", "Distortion description", "not distorted", "distortion"),
    Part("pause", "Unnatural pause", "very smooth", ""),
)

LONG_QUESTION = (
    "Assess this speech: score every dimension from 1 to 5, name the artifacts, "
    "and say when they happen in seconds."
)

_NONE = "none"
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:-|\u2013|~|to)\s*(\d+(?:\.\d+)?)\s*s?(?!\w|\.\d)")
_SCORE = re.compile(r"\b([a-z]{3})\s*=\s*(\d+(?:\.\d+)?)?")


@dataclasses.dataclass(frozen=True)
class Finding:
    """An artifact, or none.

    Attributes:
        type: what it is, in small letters; empty where it has no name.
        times: when, in seconds: disjoint and sorted. Empty where it is not said.
    """

    type: str = ""
    times: Intervals = ()

    @property
    def present(self) -> bool:
        """Whether there is anything."""
        return bool(self.type or self.times)


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What there is to say about a recording.

    Attributes:
        scores: by the key of a dimension, 1 to 5.
        findings: by the key of a part.
    """

    scores: Mapping[str, int]
    findings: Mapping[str, Finding]

    def __post_init__(self) -> None:
        for dimension in SCORES:
            score = self.scores.get(dimension.key)
            if score not in range(1, 6):
                raise DataError(
                    f"the score of {dimension.column} is {score!r}; expected a whole number from 1 to 5"
                )
        missing = [part.key for part in PARTS if part.key not in self.findings]
        if missing:
            raise DataError(
                f"nothing is said about {', '.join(missing)}; expected a finding for each of the parts"
            )


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What could be read of an answer.

    Attributes:
        scores: by the key of a dimension; None where it cannot be read.
        findings: by the key of a part; likewise.
        exact: whether the text is, but for space around it, exactly as :func:`write` would put it.
    """

    scores: Mapping[str, int | None]
    findings: Mapping[str, Finding | None]
    exact: bool

    @property
    def unparsed(self) -> tuple[str, ...]:
        """Keys of dimensions and parts that could not be read."""
        found = {**self.scores, **self.findings}
        return tuple(key for key, value in found.items() if value is None)


# ------------------------------------------------------------------------------------------------ the long answer


def write(assessment: Assessment) -> str:
    """The long answer. Times are rounded to a tenth of a second; nothing becomes shorter than that."""
    scores = " ".join(f"{one.key}={assessment.scores[one.key]}" for one in SCORES)
    return " | ".join([scores, *(part_text(part, assessment.findings[part.key]) for part in PARTS)])


def part_text(part: Part, finding: Finding) -> str:
    """What a long answer says of a part: ``noise hum 0.8-1.6``."""
    if not finding.present:
        return f"{part.key} {_NONE}"
    return " ".join([part.key, *([finding.type] if finding.type else []), *_ranges(finding.times)])


def _ranges(times: Intervals) -> list[str]:
    tenths = [(round(start * 10), round(end * 10)) for start, end in times]
    rounded = union((start, max(end, start + 1)) for start, end in tenths)
    return [f"{start / 10:.1f}-{end / 10:.1f}" for start, end in rounded]


def parse(text: str) -> Parsed:
    """Read a long answer, as far as it can be read.

    A score counts if it is there once and is a digit from 1 to 5; a part if it is there once and says ``none``, or a
    type, or ranges that end after they start.
    """
    places = _places(text)
    scores: dict[str, int | None] = {}
    for dimension in SCORES:
        found = places.get(dimension.key, [])
        digits = text[slice(*found[0])].partition("=")[2].strip() if len(found) == 1 else ""
        scores[dimension.key] = int(digits) if digits in {*"12345"} else None
    findings: dict[str, Finding | None] = {}
    for part in PARTS:
        found = places.get(part.key, [])
        body = text[slice(*found[0])].partition(part.key)[2] if len(found) == 1 else ""
        findings[part.key] = read_phrase(part, body)
    parsed = Parsed(scores, findings, False)
    if parsed.unparsed:
        return parsed
    whole = Assessment(scores, findings)  # type: ignore[arg-type]
    return dataclasses.replace(parsed, exact=text.strip() == write(whole))


def segments(text: str) -> dict[str, tuple[int, int]]:
    """Where an answer speaks of what: characters ``[start, end)`` by key, for keys that are there once.

    ``noise`` and ``noise_times`` (likewise of the other parts) are the words and the ranges of one segment. A segment
    without ranges is both: that none are said is what there is to judge.
    """
    found: dict[str, tuple[int, int]] = {}
    for key, places in _places(text).items():
        if len(places) != 1:
            continue
        start, end = places[0]
        if all(key != part.key for part in PARTS):
            found[key] = (start, end)
            continue
        times = [one.span() for one in _RANGE.finditer(text, start, end)]
        words = times[0][0] if times else end
        found[key] = (start, start + len(text[start:words].rstrip()))
        found[f"{key}_times"] = (times[0][0], times[-1][1]) if times else found[key]
    return found


def _places(text: str) -> dict[str, list[tuple[int, int]]]:
    """Every place where an answer speaks of a dimension or part, without the space around it."""
    found: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for piece in text.split("|"):
        part = next((one for one in PARTS if re.match(rf"\s*{one.key}\b", piece)), None)
        if part is not None:
            left = len(piece) - len(piece.lstrip())
            place = (start + left, start + len(piece.rstrip()))
            found.setdefault(part.key, []).append(place)
        else:
            for one in _SCORE.finditer(piece):
                place = (start + one.start(), start + one.end())
                found.setdefault(one[1], []).append(place)
        start += len(piece) + 1
    return {key: places for key, places in found.items() if key in _KEYS}


_KEYS = {one.key for one in (*SCORES, *PARTS)}


# -------------------------------------------------------------------------------------------------- descriptions


def read_phrase(part: Part, text: str) -> Finding | None:
    """A description, as QualiSpeech or a long answer puts it; None where it cannot be read.

    ``hum noise 0.8-1.6s`` and ``hum 0.8-1.6`` are the same finding, as are ``not noticeable`` and ``none``.
    """
    text = text.strip().lower().rstrip(".")
    if text in (_NONE, part.nothing):
        return Finding()
    ranges = [(float(one[1]), float(one[2])) for one in _RANGE.finditer(text)]
    if any(end <= start for start, end in ranges):
        return None
    words = " ".join(re.sub(r"[\s,;:()|]+", " ", _RANGE.sub(" ", text)).split())
    if re.search(r"\d", words) or not (words or ranges):
        return None
    if not part.noun:
        # Only times describe what has no types.
        return Finding(times=union(ranges)) if ranges else None
    for noun in (part.noun, "sound"):
        # Without the word that says what all of its kind are, unless it is all there is.
        words = words.removesuffix(noun).strip() or words
    return Finding("" if ranges and words == part.noun else words, union(ranges))


def phrase(part: Part, finding: Finding) -> str:
    """A description in QualiSpeech's manner: ``hum noise 0.8-1.6s``, ``0.4-0.9s``, ``not distorted``."""
    if not finding.present:
        return part.nothing
    words = [finding.type.removesuffix(part.noun), part.noun] if part.noun else []
    times = ", ".join(f"{one}s" for one in _ranges(finding.times))
    return " ".join(one for one in (*words, times) if one)


def assessment_of(columns: Mapping[str, Any]) -> Assessment:
    """What QualiSpeech's columns say of a clip.

    Raises:
        DataError: a column that is missing or cannot be read; names it and the clip.
    """
    name = columns.get("id", "a clip")
    for one in (*SCORES, *PARTS):
        if one.column not in columns:
            raise DataError(
                f"{name} has no column {one.column!r}; expected the columns of QualiSpeech"
            )
    findings = {part.key: read_phrase(part, str(columns[part.column])) for part in PARTS}
    for part in PARTS:
        if findings[part.key] is None:
            raise DataError(
                f"{name}: {part.column!r} is {columns[part.column]!r}; expected {part.nothing!r}, or a phrase with "
                "ranges of seconds that end after they start, such as 'hum noise 0.8-1.6s'"
            )
    scores = {one.key: _whole(columns[one.column]) for one in SCORES}
    try:
        return Assessment(scores, findings)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _whole(value: Any) -> Any:
    """4 for 4, 4.0 and "4"; anything else as it is, for the message."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if math.isfinite(number) and number == int(number) else value


# ------------------------------------------------------------------------------------------- questions and answers


def question(dimension: Dimension) -> str:
    """The short question for one dimension."""
    return f"Rate the {dimension.words} of this speech from 1 to 5. Answer with one number."


def parse_score(text: str) -> int | None:
    """The answer to a short question: exactly one digit from 1 to 5, or None (skipped)."""
    text = text.strip()
    return int(text) if text in {*"12345"} else None


def calibration_pairs(columns: Mapping[str, Any]) -> Iterator[tuple[Dimension, str, str]]:
    """Dimension, question and answer of every score that a clip has, Speed among them.

    Raises:
        DataError: a score that is no whole number from 1 to 5.
    """
    for dimension in ALL:
        if dimension.column not in columns:
            continue
        score = _whole(columns[dimension.column])
        if score not in range(1, 6):
            raise DataError(
                f"{columns.get('id', 'a clip')}: {dimension.column!r} is {score!r}; expected a whole number from 1 to 5"
            )
        yield dimension, question(dimension), str(score)


def answer_pair(columns: Mapping[str, Any]) -> tuple[str, str]:
    """The long question and its answer for a clip."""
    return LONG_QUESTION, write(assessment_of(columns))
