"""How well an audio language model scores speech and finds what is wrong with it, against labels.

    PCC         correlation of answered and true scores over clips, a dimension; Speed is left out (imbalanced)
    F1          of whether there is noise, distortion, an unnatural pause
    IoU         of when: length of the intersection over length of the union of all intervals of a clip, mean over
                clips where label or answer has any (our definition: arXiv:2603.10175 does not give its own)

An answer that cannot be parsed is counted and no part of any of these: read every number beside what was skipped. A
correlation with something constant is undefined, NaN; the mean over dimensions is given over those that are defined,
and with 0 for those that are not, so that a model that always says the same does not gain by it.

Beside them stands what needs no ears: the score that most of these clips have, an artifact in every clip from beginning
to end.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postlude.errors import DataError, SettingsError
from postlude.evaluation.lds import spearman as _spearman
from postlude.numerics.intervals import iou
from postlude.runs.audio import Recording
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.clips import Clip, read_clips
from postlude.runs.listening import generate
from postlude.runs.progress import Progress
from postlude.zoo.speech_answers import (
    LONG_QUESTION,
    PARTS,
    SCORES,
    Assessment,
    Finding,
    Parsed,
    assessment_of,
    parse,
    parse_score,
    question,
)

__all__ = [
    "QUESTIONS",
    "UNREAD",
    "Heard",
    "ask",
    "evaluate_speech",
    "judge_findings",
    "judge_scores",
    "pearson",
    "spearman",
]

QUESTIONS = ("long", "short")
"""One answer about everything, or a question for each score, whose answer is a digit."""

UNREAD = {
    "long": "the model does not answer this way yet: tune it on answers.jsonl first (docs/speech.md); one that was "
    "tuned on calibration.jsonl answers --questions short",
    "short": "the model does not answer by a digit yet: tune it on calibration.jsonl first (docs/speech.md); one that "
    "was tuned on scores.jsonl or answers.jsonl answers --questions long",
}
"""What to do where nothing of the answers to such questions could be read."""

_LONGEST_ANSWER = {"long": 200, "short": 8}


@dataclasses.dataclass(frozen=True)
class Heard:
    """What a model said of a recording.

    Attributes:
        parsed: as far as it can be read; without findings where short questions were asked.
        texts: of the answers.
        ended: whether the model ended all of them.
    """

    parsed: Parsed
    texts: tuple[str, ...]
    ended: bool


def ask(
    checkpoint: Checkpoint,
    recordings: Sequence[Recording],
    questions: str = "long",
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Heard]:
    """Ask a model about recordings; it takes the most probable token throughout.

    Args:
        checkpoint: an audio language model.
        recordings: what it hears.
        questions: ``long`` or ``short``.
        batch_size: questions at a time.
        progress: where to show a bar.

    Raises:
        SettingsError: another word.
    """
    if questions not in QUESTIONS:
        raise SettingsError(f"questions is {questions!r}; expected {' or '.join(QUESTIONS)}")
    asked = [LONG_QUESTION] if questions == "long" else [question(one) for one in SCORES]
    answers = generate(
        checkpoint,
        [recording for recording in recordings for _ in asked],
        [text for _ in recordings for text in asked],
        max_new_tokens=_LONGEST_ANSWER[questions],
        batch_size=batch_size,
        progress=progress,
    )
    found = []
    for start in range(0, len(answers), len(asked)):
        own = answers[start : start + len(asked)]
        texts = tuple(one.text for one in own)
        if questions == "long":
            parsed = parse(texts[0])
        else:
            scores = {one.key: parse_score(text) for one, text in zip(SCORES, texts, strict=True)}
            parsed = Parsed(scores, {}, None not in scores.values())
        found.append(Heard(parsed, texts, all(one.ended for one in own)))
    return found


def evaluate_speech(
    checkpoint: Checkpoint,
    data: str | os.PathLike[str] | Sequence[Clip],
    *,
    questions: str = "long",
    limit: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a model's answers with the labels of clips.

    Args:
        checkpoint: an audio language model.
        data: a folder of clips, see :func:`postlude.runs.clips.read_clips`; or clips.
        questions: ``long`` asks for everything at once, ``short`` for each score alone; then there are no artifacts.
        limit: this many clips, from the first one.
        batch_size: questions at a time.
        progress: where to show bars.

    Returns:
        ``dimensions``, see :func:`judge_scores`; ``artifacts``, see :func:`judge_findings`; means of their ``pcc``,
        ``spearman``, ``f1`` and ``iou``; ``mean_pcc_zero``, with 0 for an undefined one; ``clips``, ``skipped``
        (dimensions and parts of answers that could not be read), ``asked`` (how many there were), ``exact`` (share of
        answers written as they should be), ``cut`` (answers that reached the longest), ``unclear`` (clips left out
        because a description among their labels cannot be read, and why), ``converted``, ``samples``, ``advice`` (what
        to do if nothing could be read, else None).

    Raises:
        ArchitectureError: another kind of model.
        DataError: clips that cannot be read, or no labels that can.
        SettingsError: other questions.
    """
    clips, truth, unclear = _readable(_clips(data, limit))
    display = progress or Progress(show=False)
    with display:
        recordings = [clip.read() for clip in display.iterate(clips, "recordings")]
        heard = ask(checkpoint, recordings, questions, batch_size=batch_size, progress=display)
    said = [one.parsed for one in heard]
    dimensions = judge_scores(said, truth)
    artifacts = []
    if questions == "long":
        artifacts = judge_findings(said, truth, [one.duration for one in recordings])
    skipped = [row["skipped"] for row in (*dimensions, *artifacts)]
    converted = Counter(what for one in recordings for what in one.converted)
    return {
        "questions": questions,
        "clips": len(clips),
        "asked": len(skipped) * len(clips),
        "skipped": sum(skipped),
        "exact": sum(one.exact for one in said) / len(said),
        "cut": sum(not one.ended for one in heard),
        "mean_pcc": _mean(row["pcc"] for row in dimensions),
        "mean_pcc_zero": _mean(0.0 if math.isnan(row["pcc"]) else row["pcc"] for row in dimensions),
        "mean_spearman": _mean(row["spearman"] for row in dimensions),
        "mean_f1": _mean(row["f1"] for row in artifacts),
        "mean_iou": _mean(row["iou"] for row in artifacts),
        "dimensions": dimensions,
        "artifacts": artifacts,
        "unclear": unclear,
        "advice": UNREAD[questions] if sum(skipped) == len(skipped) * len(clips) else None,
        "converted": dict(sorted(converted.items())),
        "samples": [
            {"id": clip.id, "answers": list(one.texts)}
            for clip, one in zip(clips[:3], heard, strict=False)
        ],
    }


def _clips(data: str | os.PathLike[str] | Sequence[Clip], limit: int | None) -> list[Clip]:
    if isinstance(data, str | os.PathLike):
        return read_clips(data, limit)
    return list(data[:limit])


def _readable(clips: Sequence[Clip]) -> tuple[list[Clip], list[Assessment], list[str]]:
    """Clips whose labels can be read, these labels, and why others are left out: people write them in many ways."""
    kept: list[Clip] = []
    truth: list[Assessment] = []
    unclear: list[str] = []
    for clip in clips:
        try:
            truth.append(assessment_of({"id": clip.id, **clip.scores, **clip.descriptions}))
            kept.append(clip)
        except DataError as error:
            unclear.append(str(error))
    if not kept:
        raise DataError(
            f"the labels of none of {len(clips)} clips can be read"
            + (f"; the first: {unclear[0]}" if unclear else "")
        )
    return kept, truth, unclear


# -------------------------------------------------------------------------------------------------------- scores


def judge_scores(said: Sequence[Parsed], truth: Sequence[Assessment]) -> list[dict[str, Any]]:
    """Correlation and errors of each dimension.

    Returns:
        A row a dimension: ``dimension``, ``key``, ``pcc``, ``spearman``, ``accuracy``, ``mean_error`` (absolute),
        ``read`` and ``skipped`` answers; ``constant_score``, ``constant_accuracy`` and ``constant_error`` of always
        saying the commonest score of these clips; ``note``, why a correlation is undefined.
    """
    rows = []
    for dimension in SCORES:
        pairs = [
            (answer.scores[dimension.key], right.scores[dimension.key])
            for answer, right in zip(said, truth, strict=True)
        ]
        read = [(float(score), float(right)) for score, right in pairs if score is not None]
        rights = [right for _, right in pairs]
        usual = statistics.mode(rights) if rights else math.nan
        first, second = [one for one, _ in read], [one for _, one in read]
        rows.append(
            {
                "dimension": dimension.column,
                "key": dimension.key,
                "pcc": pearson(first, second),
                "spearman": spearman(first, second),
                "accuracy": _mean(float(a == b) for a, b in read),
                "mean_error": _mean(abs(a - b) for a, b in read),
                "read": len(read),
                "skipped": len(pairs) - len(read),
                "constant_score": usual,
                "constant_accuracy": _mean(float(usual == right) for right in rights),
                "constant_error": _mean(abs(usual - right) for right in rights),
                "note": _note(first, second),
            }
        )
    return rows


def _note(said: Sequence[float], rights: Sequence[float]) -> str | None:
    if len(said) < 2:
        return "fewer than two answers could be read"
    for name, values in (("answer", said), ("label", rights)):
        if len(set(values)) == 1:
            return f"every {name} is {values[0]:g}"
    return None


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation; NaN where either is constant or there are fewer than two."""
    if len(first) < 2 or len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    return statistics.correlation(first, second)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing theirs; NaN as in :func:`pearson`."""
    if math.isnan(pearson(first, second)):
        return math.nan
    both = torch.tensor([first, second], dtype=torch.float64)[:, :, None]
    return float(_spearman(both[0], both[1]))


# ------------------------------------------------------------------------------------------------------ artifacts


def judge_findings(
    said: Sequence[Parsed], truth: Sequence[Assessment], durations: Sequence[float]
) -> list[dict[str, Any]]:
    """Presence, type and times of each kind of artifact.

    Args:
        said: answers.
        truth: labels.
        durations: of the recordings, in seconds.

    Returns:
        A row a part: ``artifact``, ``key``, ``f1``, ``precision``, ``recall``, ``type_accuracy`` (of those rightly
        said to be there; NaN where there are none, or no types), ``iou``, ``iou_clips`` (clips it is a mean of),
        ``read`` and ``skipped`` answers; ``always_f1`` and ``always_iou`` of an artifact in every clip from beginning
        to end.
    """
    rows = []
    for part in PARTS:
        read: list[tuple[Finding, Finding]] = []
        for answer, right in zip(said, truth, strict=True):
            finding = answer.findings.get(part.key)
            if finding is not None:
                read.append((finding, right.findings[part.key]))
        every = [right.findings[part.key] for right in truth]
        found = [(one, right) for one, right in read if one.present and right.present]
        overlaps = _overlaps([(one.times, right.times) for one, right in read])
        whole = [
            (((0.0, seconds),), right.times)
            for seconds, right in zip(durations, every, strict=True)
        ]
        rows.append(
            {
                "artifact": part.column,
                "key": part.key,
                **_presence([(one.present, right.present) for one, right in read]),
                "type_accuracy": _mean(float(a.type == b.type) for a, b in found)
                if part.noun
                else math.nan,
                "iou": _mean(overlaps),
                "iou_clips": len(overlaps),
                "read": len(read),
                "skipped": len(every) - len(read),
                "always_f1": _presence([(True, right.present) for right in every])["f1"],
                "always_iou": _mean(_overlaps(whole)),
            }
        )
    return rows


def _overlaps(pairs: Sequence[tuple[Any, Any]]) -> list[float]:
    """IoU of each pair of which one has any length."""
    values = (iou(first, second, both_empty=math.nan) for first, second in pairs)
    return [value for value in values if not math.isnan(value)]


def _presence(pairs: Sequence[tuple[bool, bool]]) -> Mapping[str, float]:
    """F1, precision and recall; NaN where there is nothing to find and nothing was said to be."""
    right = sum(one and other for one, other in pairs)
    said, there = sum(one for one, _ in pairs), sum(other for _, other in pairs)
    return {
        "f1": 2 * right / (said + there) if said + there else math.nan,
        "precision": right / said if said else math.nan,
        "recall": right / there if there else math.nan,
    }


def _mean(values: Any) -> float:
    """The mean of those that are defined; NaN of none."""
    kept = [value for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan
