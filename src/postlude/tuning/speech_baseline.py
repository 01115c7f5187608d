"""What answers about recordings get without ears, and how many say nothing that can be read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from postlude.tuning.speech_rewards import SpeechReward
from postlude.zoo.speech_answers import PARTS, SCORES, Assessment, assessment_of, parse, write

__all__ = ["NOTHING_READ", "commonest_answer", "reward_without_ears", "unreadable"]

NOTHING_READ = (
    "no answer of the first step could be read, so there is nothing to compare and nothing is learned: let the model "
    "learn the long answers first, postlude tune MODEL answers.jsonl -o sft/ (docs/speech.md)"
)
"""What to say where all answers of a first step are unreadable."""


def unreadable(completions: Sequence[str]) -> float:
    """The share of answers of which no score and no part can be read."""
    parts = len(SCORES) + len(PARTS)
    return statistics.fmean(len(parse(text).unparsed) == parts for text in completions)


def commonest_answer(columns: Sequence[Mapping[str, Any]]) -> str:
    """The long answer that has the commonest score and the commonest finding of each kind among some clips."""
    every = [assessment_of(row) for row in columns]
    scores = {one.key: statistics.mode(truth.scores[one.key] for truth in every) for one in SCORES}
    found = {
        part.key: statistics.mode(truth.findings[part.key] for truth in every) for part in PARTS
    }
    return write(Assessment(scores, found))


def reward_without_ears(
    reward: SpeechReward, columns: Sequence[Mapping[str, Any]]
) -> tuple[str, float]:
    """The commonest answer, and the mean reward of giving it to each of these clips."""
    answer = commonest_answer(columns)
    names = sorted(set.intersection(*(set(row) for row in columns)))
    values = reward(
        [answer] * len(columns), **{name: [row[name] for row in columns] for name in names}
    )
    return answer, math.fsum(values) / len(values)
