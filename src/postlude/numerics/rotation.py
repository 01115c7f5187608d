"""Orthogonal matrices for rotating activations and weights, and the groups of channels that they mix.

Row vectors throughout: a rotation ``A`` acts as ``x @ A`` on the last axis. Hadamard matrices are in
:mod:`postlude.numerics.hadamard`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import LongTensor, Tensor

from postlude.errors import SettingsError
from postlude.numerics.hadamard import hadamard, is_hadamard_order

__all__ = [
    "block_diagonal",
    "constant_first_row",
    "group_sizes",
    "outlier_grouping",
    "random_orthogonal",
]


def constant_first_row(n: int, generator: torch.Generator | None = None) -> Tensor:
    """A random orthogonal fp64 matrix ``[n, n]`` whose first row is ``1 / sqrt(n)`` (arXiv:2606.07116).

    ``diag(1, s_2, ..., s_n) @ hadamard(n) / sqrt(n)`` with random signs where ``n`` is a Hadamard order, else the
    orthonormal DCT-II basis (row ``k`` is frequency ``k``) with random signs of the rows after the first. For
    ``x @ A``, channel 0 of ``x`` becomes the same offset on all channels.

    Args:
        n: size, at least 1.
        generator: CPU generator for the signs; None leaves all signs positive (no randomness).
    """
    if n < 1:
        raise SettingsError(
            f"An orthogonal matrix of size {n} does not exist; the size must be at least 1."
        )
    if is_hadamard_order(n):
        matrix = hadamard(n) / math.sqrt(n)
    else:
        column = torch.arange(n, dtype=torch.float64)
        matrix = torch.cos(math.pi / n * column[:, None] * (column[None, :] + 0.5)) * math.sqrt(
            2 / n
        )
        matrix[0] = 1 / math.sqrt(n)
    if generator is not None:
        signs = 2.0 * torch.randint(0, 2, (n,), generator=generator, dtype=torch.float64) - 1.0
        signs[0] = 1.0
        matrix = signs[:, None] * matrix
    return matrix


def random_orthogonal(n: int, generator: torch.Generator | None = None) -> Tensor:
    """A Haar-distributed orthogonal fp64 matrix ``[n, n]``.

    QR of a Gaussian matrix with the diagonal of ``R`` made positive (arXiv:math-ph/0609050); without that sign fix
    the distribution is not uniform. ``generator`` is a CPU one; None draws from the global one of torch.
    """
    if n < 1:
        raise SettingsError(
            f"An orthogonal matrix of size {n} does not exist; the size must be at least 1."
        )
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(torch.float64)
    matrix: Tensor = q * signs[None, :]
    return matrix


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The matrix with ``blocks`` (each square ``[n_k, n_k]``) on the diagonal, ``[sum n_k, sum n_k]``."""
    if not blocks:
        raise SettingsError("block_diagonal needs at least one block; got none.")
    for block in blocks:
        if block.ndim != 2 or block.shape[0] != block.shape[1]:
            raise SettingsError(
                f"block_diagonal needs square blocks; got shape {tuple(block.shape)}."
            )
    total = sum(len(block) for block in blocks)
    matrix = blocks[0].new_zeros(total, total)
    start = 0
    for block in blocks:
        stop = start + len(block)
        matrix[start:stop, start:stop] = block
        start = stop
    return matrix


def group_sizes(width: int, group: int) -> list[int]:
    """Sizes of the groups of ``width`` channels: ``group`` each, the last one smaller where it does not divide."""
    if width < 1 or group < 1:
        raise SettingsError(
            f"Width and group size must be at least 1; got width {width}, group {group}."
        )
    full, rest = divmod(width, group)
    return [group] * full + ([rest] if rest else [])


def outlier_grouping(order: Tensor, sizes: Sequence[int]) -> LongTensor:
    """One outlier channel at the head of each group, the others dealt in contiguous runs (arXiv:2606.07116).

    The first slot of group ``k`` gets the channel of rank ``k``. The remaining channels, smallest first, fill the
    groups one after the other, so channels of like magnitude share a group.

    Args:
        order: ``[width]`` channel indices, most outlying first; a permutation.
        sizes: group sizes, each at least 1, with sum ``width``; they may differ.

    Returns:
        ``[width]`` index ``idx`` such that ``x[..., idx]`` holds the groups side by side.

    Example:
        channel values ``[1, 2, 3, 4, 50, 60]``, sizes ``[3, 3]``: the result selects ``[60, 1, 2 | 50, 3, 4]``.
    """
    width = order.numel()
    if order.ndim != 1 or any(size < 1 for size in sizes) or sum(sizes) != width:
        raise SettingsError(
            f"The ranking has shape {tuple(order.shape)} and the group sizes {list(sizes)} sum to {sum(sizes)}. "
            "Expected a one-dimensional ranking and sizes of at least 1 that sum to its length."
        )
    index = order.to(torch.int64)
    if not torch.equal(index.sort().values, torch.arange(width, device=index.device)):
        raise SettingsError(
            f"The ranking is not a permutation of 0..{width - 1}. Pass the result of an argsort."
        )
    lead, rest = index[: len(sizes)], index[len(sizes) :].flip(0)
    parts: list[Tensor] = []
    start = 0
    for k, size in enumerate(sizes):
        parts += [lead[k : k + 1], rest[start : start + size - 1]]
        start += size - 1
    return cast(LongTensor, torch.cat(parts))
