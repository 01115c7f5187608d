"""Demonstrations from a .jsonl file, as tokens and which of them are the response.

How a line becomes tokens is told in :mod:`postlude.tuning.tokenization`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.runs.progress import Progress
from postlude.tuning.recordings import Recordings
from postlude.tuning.rows import Row, read_rows
from postlude.tuning.tokenization import Tokenized, tokenize

__all__ = ["Examples", "check_tokens", "read_examples"]

_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Examples:
    """Sequences of tokens and which tokens are the response.

    Attributes:
        tokens: ``int64 [N]``, one sequence after the other.
        response: bool ``[N]``.
        starts: ``int64 [n + 1]``, where each sequence starts in them.
        truncated: sequences that lost their end.
        lost_tokens: how many tokens they lost.
        retokenized: sequences whose prompt and completion had to be tokenized apart.
        recordings: what is heard before them, of an audio language model.
    """

    tokens: Tensor
    response: Tensor
    starts: Tensor
    truncated: int = 0
    lost_tokens: int = 0
    retokenized: int = 0
    recordings: Recordings | None = None

    def __post_init__(self) -> None:
        # The first token of a sequence is never predicted.
        targets = self.response.clone()
        targets[self.starts[:-1]] = False
        counts = torch.zeros(len(self.tokens) + 1, dtype=torch.int64)
        counts[1:] = targets.cumsum(0)
        object.__setattr__(self, "_targets", targets)
        object.__setattr__(self, "_target_starts", counts[self.starts])
        object.__setattr__(self, "_starts", self.starts.tolist())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def ids(self, index: int) -> Tensor:
        """``int64 [length]``: the tokens of a sequence."""
        starts: list[int] = self._starts  # type: ignore[attr-defined]
        return self.tokens[starts[index] : starts[index + 1]]

    def targets(self, index: int) -> Tensor:
        """bool ``[length]``: which tokens of a sequence are learned."""
        starts: list[int] = self._starts  # type: ignore[attr-defined]
        chosen: Tensor = self._targets[starts[index] : starts[index + 1]]  # type: ignore[attr-defined]
        return chosen

    @property
    def target_starts(self) -> Tensor:
        """``int64 [n + 1]``: where the learned tokens of each sequence start among all learned tokens."""
        starts: Tensor = self._target_starts  # type: ignore[attr-defined]
        return starts

    @property
    def lengths(self) -> Tensor:
        """``int64 [n]``: tokens of each sequence."""
        return self.starts[1:] - self.starts[:-1]

    def digest(self) -> str:
        """A SHA-256 over tokens, bounds, which are learned and recordings, in hexadecimal."""
        found = hashlib.sha256()
        for tensor in (self.tokens, self.starts, self.response.to(torch.uint8)):
            found.update(tensor.contiguous().numpy().tobytes())
        if self.recordings is not None:
            found.update(self.recordings.digest().encode())
        return found.hexdigest()

    def counts(self) -> dict[str, Any]:
        """What was read, in numbers."""
        return {
            "sequences": len(self),
            "tokens": len(self.tokens),
            "response_tokens": int(self.target_starts[-1]),
            "truncated": self.truncated,
            "lost_tokens": self.lost_tokens,
            "retokenized": self.retokenized,
            **({} if self.recordings is None else self.recordings.counts()),
        }


def read_examples(
    path: str | os.PathLike[str],
    tokenizer: Any,
    max_length: int,
    progress: Progress | None = None,
    recordings: Recordings | None = None,
) -> Examples:
    """Read and tokenize demonstrations.

    Args:
        path: a .jsonl file, or a directory of them.
        tokenizer: of the model.
        max_length: sequences beyond it lose their end.
        progress: where to show a bar.
        recordings: of an audio language model, what reads those that lines name; it is filled.

    Raises:
        DataError: names file and line: not one of the forms, a completion that is empty or that truncation
            leaves nothing of, messages that the template refuses, a recording that cannot be read, or one for a model
            that hears nothing.
        SettingsError: ``max_length`` below 2.
    """
    if max_length < 2:
        raise SettingsError(f"max_length is {max_length}; expected at least 2 tokens")
    rows = read_rows(path)
    if tokenizer is None:
        raise DataError(
            "The checkpoint has no tokenizer, so demonstrations cannot be read with it: add its "
            "tokenizer.json and tokenizer_config.json to the checkpoint directory."
        )
    read: list[Tokenized] = []
    for row in rows if progress is None else progress.iterate(rows, "read data"):
        read.append(tokenize(tokenizer, row, recordings))
        if recordings is not None:
            recordings.note(row)
    _refuse([row for row, one in zip(rows, read, strict=True) if not any(one.content)], "is empty")
    kept = [one.cut(max_length) for one in read]
    _refuse(
        [row for row, one in zip(rows, kept, strict=True) if not any(one.response[1:])],
        f"has no token left within max_length {max_length}, which the prompt takes whole",
    )
    lengths = [len(one.ids) for one in kept]
    return Examples(
        tokens=torch.tensor([token for one in kept for token in one.ids], dtype=torch.int64),
        response=torch.tensor([mark for one in kept for mark in one.response], dtype=torch.bool),
        starts=torch.tensor([0, *lengths]).cumsum(0),
        truncated=sum(len(one.ids) > max_length for one in read),
        lost_tokens=sum(len(one.ids) for one in read) - sum(lengths),
        retokenized=sum(one.retokenized for one in read),
        recordings=recordings if recordings is not None and recordings.features else None,
    )


def check_tokens(examples: Examples, model: Any) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        DataError: names the token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = int(examples.tokens.max())
    if largest >= rows:
        raise DataError(
            f"The tokenizer gives token {largest}, but the model has {rows} embeddings: the tokenizer is not the one "
            "of this model."
        )


def _refuse(rows: Sequence[Row], what: str) -> None:
    if not rows:
        return
    lines = ", ".join(str(row.line) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    many = "s" if len(rows) > 1 else ""
    raise DataError(
        f"{rows[0].file} line{many} {lines}{more}: the response {what}, so there is nothing to learn. "
        "Remove such lines, or give their responses more room."
    )
