"""Massive activations, told from the norms of hidden states alone.

Norms come as ``[layers + 1, tokens]``: row 0 is the residual stream after the embeddings, row ``l + 1`` the one
after block ``l``. The last row must be the input of the final norm, not its output, or the decay of a model whose
last block cancels the massive activations cannot be seen.

A hidden state is *massive* if its norm is above 10 times the median norm of its layer and above a tenth of the
largest norm for which that holds. The first condition compares a token with its neighbours, so the growth of the
whole stream over depth does not count; the second leaves out the states on the way to a much larger one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = ["Massive", "decay_layer", "explosion_layer", "find_massive"]


class Massive(NamedTuple):
    """Which hidden states are massive.

    Attributes:
        mask: ``[layers + 1, tokens]`` bool.
        threshold: norm above which a state can be massive; infinity when none is.
    """

    mask: Tensor
    threshold: float

    @property
    def any(self) -> bool:
        """Whether there is one at all."""
        return bool(self.mask.any())


def _check(norms: Tensor) -> None:
    if norms.dim() != 2 or norms.shape[0] < 2 or norms.shape[1] < 1:
        raise DataError(
            f"Norms of shape {tuple(norms.shape)}: expected [layers + 1, tokens] with at least one of each."
        )


def find_massive(norms: Tensor, threshold: float | None = None, ratio: float = 10.0) -> Massive:
    """Mark the massive states among ``norms`` ``[layers + 1, tokens]``.

    Args:
        norms: Euclidean norms of hidden states.
        threshold: an absolute norm that replaces the automatic rule.
        ratio: both factors of the automatic rule.

    Raises:
        DataError: ``norms`` has another shape.
        SettingsError: a threshold or ratio that is not positive.
    """
    _check(norms)
    if threshold is not None:
        if not threshold > 0:
            raise SettingsError(
                f"A norm threshold of {threshold} selects everything; give a positive norm."
            )
        return Massive(norms > threshold, threshold)
    if not ratio > 1:
        raise SettingsError(
            f"A ratio of {ratio} calls half of all tokens massive; give one above 1."
        )
    candidates = norms > ratio * norms.median(dim=1, keepdim=True).values
    if not bool(candidates.any()):
        return Massive(candidates, float("inf"))
    floor = float(norms[candidates].max()) / ratio
    return Massive(candidates & (norms > floor), floor)


def explosion_layer(norms: Tensor, mask: Tensor, jump: float = 10.0) -> int | None:
    """First block after which the largest norm is over ``jump`` times what it was, and massive; from 0, or None.

    Asking for a massive state as well excludes the first block of a model with small embeddings, which lifts the
    norm of every token alike.
    """
    _check(norms)
    largest, massive = norms.amax(1), mask.any(1)
    found = torch.nonzero((largest[1:] > jump * largest[:-1]) & massive[1:]).flatten()
    return int(found[0]) if len(found) else None


def decay_layer(norms: Tensor, mask: Tensor, jump: float = 10.0) -> int | None:
    """Last block after which the largest norm is under 1 / ``jump`` of a massive one before; from 0, or None."""
    _check(norms)
    largest, massive = norms.amax(1), mask.any(1)
    found = torch.nonzero((largest[1:] * jump < largest[:-1]) & massive[:-1]).flatten()
    return int(found[-1]) if len(found) else None
