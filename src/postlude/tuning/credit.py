"""Which tokens of an answer are credited with which dimension of its reward.

A token belongs to the dimensions whose characters it holds. One that speaks of nothing (separators, the end) belongs to
the format and to the dimensions that the answer leaves out, so a missing part is blamed on the tokens that should have
led to it. The last is our choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from postlude.tuning.rewards import Dimensioned

__all__ = ["token_dimensions"]


def token_dimensions(
    tokenizer: Any, ids: Sequence[Sequence[int]], said: Sequence[str], reward: Dimensioned
) -> Tensor:
    """Which dimensions each token of answers speaks of.

    Args:
        tokenizer: that decodes them.
        ids: tokens of each answer, ends included.
        said: the answers as text.
        reward: that knows which characters speak of what.

    Returns:
        ``bool [N, T, D]``. A token that speaks of nothing belongs to the format, and to every dimension that the answer
        leaves out.
    """
    names = reward.dimensions
    found = torch.zeros(len(ids), max(map(len, ids)), len(names), dtype=torch.bool)
    for row, (tokens, text) in enumerate(zip(ids, said, strict=True)):
        places = reward.segments(text)
        for at, (start, end) in enumerate(_characters(tokenizer, tokens)):
            for number, name in enumerate(names):
                place = places.get(name)
                if place is not None and start < place[1] and place[0] < end:
                    found[row, at, number] = True
        outside = ~found[row].any(1)
        outside[len(tokens) :] = False
        for number, name in enumerate(names):
            if name not in places:
                found[row, outside, number] = True
    return found


def _characters(tokenizer: Any, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Characters ``[start, end)`` of the decoded text that each token adds."""
    start = 0
    for count in range(1, len(tokens) + 1):
        # Decoded from the first on, since what a token adds may depend on those before it.
        end = len(tokenizer.decode(tokens[:count], skip_special_tokens=True))
        yield start, end
        start = max(start, end)
