"""Rewards for answers about recordings, dimension by dimension (:mod:`postlude.zoo.speech_answers` has the grammar).

    r = sum_d r[d] / n + 0.1 [the answer is written exactly as it should be]

Each row of the table below says what a dimension gets; one that cannot be parsed gets 0.

| name                       | a score              | a description               | its times                |
| -------------------------- | -------------------- | --------------------------- | ------------------------ |
| speech-verifiable          | 1[equal]             | (1[presence] + 1[type]) / 2 | IoU, 1 for none and none |
| speech-verifiable-graded   | 1 - abs(error) / 4   | the same                    | the same                 |
| speech-similarity          | 1[equal]             | (1 + cos) / 2 of embeddings | in the description       |
| speech-trigrams            | 1[equal]             | the same of letter counts   | in the description       |

``speech-similarity`` is the "accuracy and semantic similarity" reported of arXiv:2603.10175, with a sentence encoder
(all-MiniLM-L6-v2 there) read from a local directory: mean of the last states, cosine. Without one there is
``speech-trigrams``, which counts every three letters in a row: our choice, as are the other two and the sum over
dimensions.

The reference is taken from the columns of QualiSpeech in the same line of the data.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postlude.errors import CheckpointError, SettingsError
from postlude.numerics.intervals import iou
from postlude.zoo.speech_answers import (
    PARTS,
    SCORES,
    Assessment,
    Finding,
    Parsed,
    Part,
    assessment_of,
    parse,
    part_text,
    segments,
)

__all__ = ["FORMAT", "SPEECH_REWARDS", "SpeechReward"]

FORMAT = "format"
"""The dimension of being written exactly as it should be; it is no part of the mean over the others."""

_FORMAT_WEIGHT = 0.1

ScoreReward = Callable[[int, int], float]
PartReward = Callable[[Part, Finding, Finding], float]
Encoder = Callable[[Sequence[str]], Sequence[Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class SpeechReward:
    """A row of the table; called as any reward.

    Attributes:
        score: of an answered and a true score.
        part: of an answered and a true finding.
        times: whether times are dimensions of their own, by their IoU.
    """

    score: ScoreReward
    part: PartReward
    times: bool

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Scores, descriptions, their times, and the format."""
        times = [f"{part.key}_times" for part in PARTS] if self.times else []
        return (*(one.key for one in (*SCORES, *PARTS)), *times, FORMAT)

    def __call__(self, completions: list[str], **columns: list[Any]) -> list[float]:
        """The sums; ``columns`` are those of QualiSpeech."""
        return [self.total(one) for one in self.by_dimension(completions, **columns)]

    def total(self, values: Sequence[float]) -> float:
        """The mean over dimensions, and what the format adds."""
        *inner, exact = values
        return math.fsum(inner) / len(inner) + _FORMAT_WEIGHT * exact

    def by_dimension(self, completions: list[str], **columns: list[Any]) -> list[list[float]]:
        """For each completion what each of :attr:`dimensions` got."""
        rows = [
            {name: values[at] for name, values in columns.items()} for at in range(len(completions))
        ]
        return [
            self._judge(parse(text), assessment_of(row))
            for text, row in zip(completions, rows, strict=True)
        ]

    def _judge(self, answer: Parsed, truth: Assessment) -> list[float]:
        found: list[float] = []
        for dimension in SCORES:
            said = answer.scores[dimension.key]
            right = truth.scores[dimension.key]
            found.append(0.0 if said is None else self.score(said, right))
        pairs = [(part, answer.findings[part.key], truth.findings[part.key]) for part in PARTS]
        found += [
            0.0 if said is None else self.part(part, said, right) for part, said, right in pairs
        ]
        if self.times:
            found += [
                0.0 if said is None else iou(said.times, right.times, both_empty=1.0)
                for _, said, right in pairs
            ]
        return [*found, float(answer.exact)]

    def segments(self, completion: str) -> Mapping[str, tuple[int, int]]:
        """Characters that speak of a dimension; the format is spoken of by all that no other one is."""
        found = segments(completion)
        if not self.times:
            for part in PARTS:
                times = found.pop(f"{part.key}_times", None)
                if times is not None:
                    found[part.key] = (found[part.key][0], max(found[part.key][1], times[1]))
        return found

    def check(self, columns: Mapping[str, Any]) -> None:
        """Refuse columns that are not QualiSpeech's.

        Raises:
            DataError: one is missing or cannot be read.
        """
        assessment_of(columns)


def equal(said: int, right: int) -> float:
    """1 where both are the same."""
    return float(said == right)


def nearness(said: int, right: int) -> float:
    """1 where both are the same, 0 where they are as far apart as can be."""
    return 1 - abs(said - right) / 4


def presence_and_type(part: Part, said: Finding, right: Finding) -> float:
    """Half for whether there is something, half for what it is; without types all for the former."""
    present = float(said.present == right.present)
    if not part.noun:
        return present
    return (present + float(said.type == right.type)) / 2


def similarity(encode: Encoder) -> PartReward:
    """``(1 + cos) / 2`` of what encodes the segments of answer and reference."""

    def reward(part: Part, said: Finding, right: Finding) -> float:
        first, second = encode([part_text(part, said), part_text(part, right)])
        dot = math.fsum(a * b for a, b in zip(first, second, strict=True))
        norms = math.sqrt(math.fsum(a * a for a in first) * math.fsum(b * b for b in second))
        return (1 + dot / norms) / 2 if norms else 0.5

    return reward


def trigrams(texts: Sequence[str]) -> list[list[float]]:
    """How often each three letters in a row are in each of some texts, with a space at both ends."""
    counts = [Counter(f" {text} "[at : at + 3] for at in range(len(text))) for text in texts]
    keys = sorted(set().union(*counts))
    return [[float(count[key]) for key in keys] for count in counts]


def sentence_encoder(directory: str) -> Encoder:
    """Mean of the last hidden states of a transformers model in a local directory, loaded when first asked.

    Raises:
        CheckpointError: the directory holds none; raised at once where it is not there.
    """
    import os

    if not os.path.isfile(os.path.join(directory, "config.json")):
        raise CheckpointError(
            f"{directory} is no sentence encoder: it has no config.json. Expected a directory of transformers, such as "
            "a copy of sentence-transformers/all-MiniLM-L6-v2."
        )

    @functools.cache
    def parts() -> tuple[Any, Any]:
        transformers = importlib.import_module("transformers")
        from postlude.runs.quiet import quiet_transformers

        try:
            with quiet_transformers():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    directory, local_files_only=True
                )
                model = transformers.AutoModel.from_pretrained(
                    directory, local_files_only=True, use_safetensors=True
                )
        except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
        return tokenizer, model.eval()

    @functools.lru_cache(maxsize=4096)
    def one(text: str) -> tuple[float, ...]:
        import torch

        tokenizer, model = parts()
        given = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            states = model(**given).last_hidden_state[0]
        return tuple(states.double().mean(0).tolist())

    return lambda texts: [one(text) for text in texts]


def _without(name: str, reward: SpeechReward) -> Callable[[str], SpeechReward]:
    def make(encoder: str) -> SpeechReward:
        if encoder:
            raise SettingsError(f"{name} uses no sentence encoder: leave sentence_encoder out.")
        return reward

    return make


def _similarity(encoder: str) -> SpeechReward:
    if not encoder:
        raise SettingsError(
            "speech-similarity needs a sentence encoder: --set sentence_encoder=DIRECTORY, a local copy of "
            "sentence-transformers/all-MiniLM-L6-v2 or another model of transformers. speech-trigrams needs none."
        )
    return SpeechReward(equal, similarity(sentence_encoder(encoder)), times=False)


SPEECH_REWARDS: Mapping[str, Callable[[str], SpeechReward]] = {
    "speech-verifiable": _without(
        "speech-verifiable", SpeechReward(equal, presence_and_type, times=True)
    ),
    "speech-verifiable-graded": _without(
        "speech-verifiable-graded", SpeechReward(nearness, presence_and_type, times=True)
    ),
    "speech-similarity": _similarity,
    "speech-trigrams": _without(
        "speech-trigrams", SpeechReward(equal, similarity(trigrams), times=False)
    ),
}
"""By name; each is made from the directory of a sentence encoder, empty where none was given."""
