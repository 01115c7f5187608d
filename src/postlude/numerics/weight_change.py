"""What changed from one tensor of weights ``W0`` to another ``W1``: sizes, ranks, new directions, and rounding.

``dW = W1 - W0``. Arithmetic is fp64; where a tensor need not be seen whole, some entries are worked on at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "change_norms",
    "change_spectrum",
    "effective_rank",
    "energy_rank",
    "intruder_cosines",
    "rounding_edge",
    "spacing",
    "stable_rank",
    "stored_dtype",
    "unchanged_shares",
]

# Embeddings are large.
_AT_ONCE = 1 << 22


def change_norms(base: Tensor, tuned: Tensor) -> tuple[float, float, float]:
    """``|dW|_F``, ``|W0|_F`` and ``max |dW|``."""
    square = base_square = largest = 0.0
    for before, after in _pieces(base, tuned):
        change = after - before
        square += float(change.square().sum())
        base_square += float(before.square().sum())
        largest = max(largest, float(change.abs().max()))
    return math.sqrt(square), math.sqrt(base_square), largest


def unchanged_shares(
    base: Tensor, tuned: Tensor, absolute: Sequence[float], relative: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Shares of entries with ``|dW| <= t`` and with ``|dW| <= t |W0|``, one a tolerance, fp64."""
    counts = torch.zeros(len(absolute) + len(relative), dtype=torch.float64)
    for before, after in _pieces(base, tuned):
        change, size = (after - before).abs(), before.abs()
        hits = [change <= t for t in absolute] + [change <= t * size for t in relative]
        counts += torch.stack([hit.sum() for hit in hits]).cpu()
    shares = counts / max(base.numel(), 1)
    return shares[: len(absolute)], shares[len(absolute) :]


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of ``values / sum(values)`` (Roy and Vetterli, 2007); NaN where all are zero.

    Args:
        values: ``[k]`` singular values, not negative.
    """
    total = values.sum()
    if not bool(total > 0):
        return math.nan
    return float(torch.special.entr(values / total).sum().exp())


def stable_rank(values: Tensor) -> float:
    """``sum(values^2) / max(values)^2``; NaN where all are zero."""
    largest = values.max()
    if not bool(largest > 0):
        return math.nan
    return float((values / largest).square().sum())


def energy_rank(values: Tensor, share: float) -> int:
    """The fewest singular values whose squares hold ``share`` of the sum of squares; 0 where all are zero."""
    energy = values.sort(descending=True).values.square().cumsum(0)
    if not bool(energy[-1] > 0):
        return 0
    # A share that is met up to rounding is met.
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1


def change_spectrum(base: Tensor, tuned: Tensor) -> Tensor:
    """Singular values ``[min(rows, columns)]`` of ``tuned - base``, both fp64 ``[rows, columns]``, falling."""
    values: Tensor = torch.linalg.svdvals(_tall(tuned - base))
    return values


def intruder_cosines(base: Tensor, tuned: Tensor, top: int) -> Tensor:
    """Of each of the ``top`` left singular vectors of ``tuned``, the largest |cosine| with one of ``base``.

    One far from all of them is an intruder dimension (arXiv:2410.21228).

    Args:
        base, tuned: ``[rows, columns]``, fp64.
        top: how many; fewer where there are fewer.

    Returns:
        ``[min(top, rows, columns)]``, in the order of the singular values.
    """
    before, after = _left_vectors(base), _left_vectors(tuned)[:, :top]
    return (after.T @ before).abs().amax(1)


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The coarsest of bfloat16, float16, float32 and the tensor's own type that holds every value exactly."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in _parts(tensor)):
            return dtype
    return tensor.dtype


def spacing(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of each value to the next larger magnitude that ``dtype`` has, fp64, same shape."""
    info = torch.finfo(dtype)
    size = torch.exp2(torch.frexp(tensor.double()).exponent.double() - 1)
    return size.where(tensor != 0, 0.0).clamp(min=info.smallest_normal) * info.eps


def rounding_edge(tensor: Tensor, dtype: torch.dtype) -> float:
    """What the largest singular value of the rounding errors of ``tensor``, stored in ``dtype``, does not exceed.

    ``max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij)`` with ``v = spacing^2 / 12``: about what independent errors of
    these variances reach (our choice of bound, after Bandeira and van Handel, arXiv:1408.6185).

    Args:
        tensor: ``[rows, columns]``, fp64.
    """
    variance = spacing(tensor, dtype).square() / 12
    return float(variance.sum(1).max().sqrt() + variance.sum(0).max().sqrt())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _AT_ONCE):
        yield flat[start : start + _AT_ONCE]


def _pieces(base: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in fp64 on one device, some entries at a time."""
    for before, after in zip(_parts(base), _parts(tuned), strict=True):
        yield before.double(), after.to(before.device).double()


def _tall(matrix: Tensor) -> Tensor:
    # LAPACK decomposes a tall matrix many times faster than the same one lying.
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _left_vectors(matrix: Tensor) -> Tensor:
    """Columns, ``[rows, min(rows, columns)]``, by falling singular value."""
    left: Tensor
    left, _, right = torch.linalg.svd(_tall(matrix), full_matrices=False)
    return left if matrix.shape[0] >= matrix.shape[1] else right.mT
