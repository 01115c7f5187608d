"""Low-rank factorisations of a matrix at hand: truncated and metric-weighted SVD, uncentred PCA.

All arithmetic is fp64 on the device of the input, and results are fp64: cast once, at the end. Signs are fixed
(the entry of largest magnitude in each left singular vector or eigenvector is positive), so equal input gives
equal output.

Those by products alone, for large, many or streamed matrices, are in :mod:`postlude.numerics.power_iteration`.

Row vectors: a linear map is ``y = x @ M`` with ``M [in_features, out_features]``, the transpose of ``Linear.weight``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = [
    "SVD",
    "as_matrix",
    "check_rank",
    "finite",
    "truncated_svd",
    "uncentred_pca",
    "weighted_svd",
    "with_signs",
]

# Eigenvalues of a metric below this share of the largest are lifted to it: directions that the calibration data never
# visited keep a little weight, and the solve stays bounded.
_FLOOR = 1e-10


class SVD(NamedTuple):
    """``(u * s) @ vh``: ``u [m, rank]``, ``s [rank]`` descending, ``vh [rank, n]``; fp64."""

    u: Tensor
    s: Tensor
    vh: Tensor


def truncated_svd(m: Tensor, rank: int) -> SVD:
    """The best approximation of ``m [rows, columns]`` of this rank in the Frobenius norm (Eckart-Young).

    Costs a full SVD; see :func:`~postlude.numerics.power_iteration.randomized_svd` for a small rank of a large matrix.
    """
    m = as_matrix(m, "The matrix")
    check_rank(rank, m)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return with_signs(u[:, :rank], s[:rank], vh[:rank])


def weighted_svd(
    m: Tensor, rank: int, left: Tensor | None = None, right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors ``A, B`` that minimise ``tr(left @ E @ right @ E.T)`` over ``E = m - A @ B`` of this rank.

    With ``left = S.T @ S``, ``right = R @ R.T`` and ``U, s, V = svd(S @ m @ R)`` cut at the rank, ``A = S^-1 U`` and
    ``B = diag(s) V R^-1``. ``S`` and ``R`` are Cholesky factors, and triangular systems are solved, not inverted; for
    a metric that is singular to ``1e-10`` they are eigenvector roots, with the smallest eigenvalues lifted to ``1e-10``
    of the largest. ``A @ B`` does not depend on which root it is. A metric of zeros (an input that was never active)
    counts as the identity.

    Of a quantization error ``m = W - W_q`` this is the correction ``y = x @ (W_q + A @ B)`` in closed form (QERA,
    arXiv:2410.06040): without a metric it minimises the error of the weight (LoRC, arXiv:2303.08302), with
    ``left = E[x^T x]`` the expected error of the output ``E ||x (m - A @ B)||^2`` (QERA-exact), with its diagonal
    something in between (QERA-approx; LQER, arXiv:2402.02446, squares the mean magnitude of each channel instead).
    Lower output error comes with higher weight error: do not judge by the latter.

    Args:
        m: ``[rows, columns]``.
        rank: at least 1, at most the smaller side.
        left: metric of the rows, symmetric positive semi-definite ``[rows, rows]``, for example ``E[x^T x]``, or its
            diagonal ``[rows]``; None is the identity.
        right: metric of the columns, ``[columns, columns]`` or ``[columns]``.

    Returns:
        ``A [rows, rank]`` and ``B [rank, columns]``, fp64.
    """
    m = as_matrix(m, "The matrix")
    check_rank(rank, m)
    s_root = _Root(left, m.shape[0], "left")
    r_root = _Root(right, m.shape[1], "right")
    u, s, vh = truncated_svd(r_root.times(s_root.times(m).T).T, rank)
    return s_root.solve(u), r_root.solve((s[:, None] * vh).T).T


def uncentred_pca(
    rows: Tensor | None = None, *, moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors (columns) of ``C = X^T X / N``, the mean not subtracted.

    ``x @ eigenvectors`` puts the direction of largest energy in channel 0 (arXiv:2606.07116). With fewer rows than
    channels the last eigenvalues are 0 and their vectors an arbitrary basis of the rest.

    Args:
        rows: ``X [N, width]``, or
        moment: ``C [width, width]``; give exactly one of the two.

    Returns:
        ``[width]`` and ``[width, width]``, fp64; negative rounding of eigenvalues is cut to 0.
    """
    if rows is not None and moment is None:
        rows = as_matrix(rows, "The rows")
        moment = rows.T @ rows / len(rows)
    elif moment is not None and rows is None:
        moment = _symmetric(moment, None, "moment")
    else:
        raise SettingsError("uncentred_pca needs either rows or moment=; got both or none.")
    values, vectors = torch.linalg.eigh(moment)
    vectors = vectors.flip(1)
    return values.flip(0).clamp_(min=0), vectors * _column_signs(vectors)


class _Root:
    """``S`` with ``S.T @ S = metric``: products ``S @ x`` and solves ``S^-1 @ x``."""

    def __init__(self, metric: Tensor | None, size: int, name: str) -> None:
        self._diagonal: Tensor | None = None
        self._lower: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None
        if metric is None:
            return
        if metric.ndim == 1:
            values = finite(metric)
            if len(values) != size or bool((values < 0).any()):
                raise DataError(
                    f"The {name} metric is a vector of {len(values)} entries, the least {float(values.min()):.3g}; "
                    f"expected {size} entries that are not negative."
                )
            self._diagonal = _lifted(values).sqrt()
            return
        metric = _symmetric(metric, size, name)
        lower, failed = torch.linalg.cholesky_ex(metric)
        diagonal = lower.diagonal()
        if not bool(failed) and bool(diagonal.min() ** 2 > _FLOOR * diagonal.max() ** 2):
            self._lower = lower
            return
        values, vectors = torch.linalg.eigh(metric)
        if bool(values[0] < -1e-6 * values[-1].abs()):
            raise DataError(
                f"The {name} metric has the eigenvalue {float(values[0]):.3g} (largest {float(values[-1]):.3g}); "
                "expected a positive semi-definite matrix such as E[x^T x]."
            )
        self._eigen = _lifted(values).sqrt(), vectors

    def times(self, x: Tensor) -> Tensor:
        if self._diagonal is not None:
            return self._diagonal[:, None] * x
        if self._lower is not None:
            return self._lower.T @ x
        if self._eigen is not None:
            root, vectors = self._eigen
            return root[:, None] * (vectors.T @ x)
        return x

    def solve(self, x: Tensor) -> Tensor:
        if self._diagonal is not None:
            return x / self._diagonal[:, None]
        if self._lower is not None:
            solution: Tensor = torch.linalg.solve_triangular(self._lower.T, x, upper=True)
            return solution
        if self._eigen is not None:
            root, vectors = self._eigen
            return vectors @ (x / root[:, None])
        return x


def _lifted(values: Tensor) -> Tensor:
    largest = values.max()
    return (
        values.clamp(min=float(_FLOOR * largest)) if bool(largest > 0) else torch.ones_like(values)
    )


def with_signs(u: Tensor, s: Tensor, vh: Tensor) -> SVD:
    """The triplets with their signs fixed, see the module."""
    signs = _column_signs(u)
    return SVD(u * signs, s, signs[:, None] * vh)


def _column_signs(vectors: Tensor) -> Tensor:
    """+-1 per column, such that the entry of largest magnitude becomes positive."""
    top = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(top < 0, -1.0, 1.0).to(vectors.dtype)


def finite(x: Tensor, name: str = "The input") -> Tensor:
    """``x`` in fp64, apart from autograd.

    Raises:
        DataError: NaN or infinity.
    """
    x = x.detach().to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise DataError(
            f"{name} of a factorisation holds NaN or infinity; check the weights and the statistics."
        )
    return x


def as_matrix(m: Tensor, name: str) -> Tensor:
    """``m`` in fp64.

    Raises:
        DataError: no matrix, an empty one, NaN or infinity.
    """
    if m.ndim != 2 or 0 in m.shape:
        raise DataError(
            f"{name} of a factorisation has shape {tuple(m.shape)}; expected a matrix that is not empty."
        )
    return finite(m, name)


def _symmetric(metric: Tensor, size: int | None, name: str) -> Tensor:
    if metric.ndim != 2 or metric.shape[0] != metric.shape[1] or size not in (None, len(metric)):
        expected = "square" if size is None else f"{size} by {size}"
        raise DataError(
            f"The {name} metric has shape {tuple(metric.shape)}; expected a {expected} matrix."
        )
    metric = finite(metric, f"The {name} metric")
    if bool((metric - metric.T).abs().max() > 1e-5 * metric.abs().max()):
        raise DataError(
            f"The {name} metric is not symmetric; expected a second moment such as E[x^T x]."
        )
    return (metric + metric.T) / 2


def check_rank(rank: int, m: Tensor) -> None:
    """Refuse a rank that a matrix cannot have.

    Raises:
        SettingsError: it is below 1, or above the smaller side.
    """
    if not 1 <= rank <= min(m.shape):
        raise SettingsError(
            f"Rank {rank} is not possible for a matrix of shape {tuple(m.shape)}; use 1 to {min(m.shape)}."
        )
