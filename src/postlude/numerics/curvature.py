"""Damped inverses of a sum of outer products, and what they do to a gradient.

With rows ``g_i`` in ``R^D`` and ``H = sum_i g_i g_i^T``, influence needs ``(H + lam I)^-1 g``. Three ways, which agree
where all are exact:

* :class:`DenseInverse`: Cholesky of ``H`` itself. Time ``N D^2 + D^3 / 3``, memory ``D^2``.
* :class:`SpectralInverse`: the leading eigenvectors of ``H`` and one number for the rest (Woodbury). Memory ``D r``.
* :class:`GramInverse`: the ``N x N`` matrix of inner products. Time ``N^3 / 3``, memory ``N^2``; nothing of size ``D``.

Row vectors: ``apply(x)`` takes and gives ``[..., D]``. Factorisations are fp64, products in the type of the input.
Kronecker-factored curvature is in :mod:`postlude.numerics.kronecker`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.numerics.power_iteration import StreamedSVD

__all__ = ["DenseInverse", "GramInverse", "SpectralInverse", "trace_damping"]


def trace_damping(trace: float, size: int, multiplier: float) -> float:
    """``lam = multiplier * trace(H) / D``: damping that scales with the gradients (LoRIF, arXiv:2601.21929).

    Raises:
        DataError: all gradients are zero, so there is nothing to damp.
    """
    damping = multiplier * trace / size
    if not 0 < damping < float("inf"):
        raise DataError(
            f"the damping is {damping:.3g} (trace {trace:.3g} of {size} dimensions, multiplier {multiplier:.3g}); "
            "expected a positive number. Are all gradients of a layer zero?"
        )
    return damping


@dataclasses.dataclass(frozen=True)
class DenseInverse:
    """``(H + lam I)^-1`` by a Cholesky factor.

    Attributes:
        lower: ``[D, D]`` fp64.
    """

    lower: Tensor

    @classmethod
    def of(cls, h: Tensor, damping: float) -> DenseInverse:
        """From ``H [D, D]``, symmetric positive semi-definite, of which the lower triangle is read."""
        return cls(_damped_cholesky(h, damping))

    def apply(self, x: Tensor) -> Tensor:
        """``(H + lam I)^-1 x`` of every row of ``[..., D]``."""
        rows = x.reshape(-1, x.shape[-1]).double()
        return torch.cholesky_solve(rows.mT, self.lower).mT.reshape(x.shape).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class SpectralInverse:
    """``(Psi S^2 Psi^T + tail (I - Psi Psi^T) + lam I)^-1`` in its split form.

        apply(x) = (x - Psi a) / (lam + tail) + Psi (a / (lam + s^2)),      a = Psi^T x

    The textbook form ``1/lam - s^2 / (lam (lam + s^2))`` is the same number and cancels to zero in low precision.

    Attributes:
        vectors: ``Psi [D, r]``, orthonormal; ``r`` may be 0.
        squares: ``s^2 [r]`` fp64.
        damping: ``lam``.
        tail: mean squared singular value outside of ``Psi``; 0 for a plain truncation.
    """

    vectors: Tensor
    squares: Tensor
    damping: float
    tail: float = 0.0

    @classmethod
    def of(
        cls,
        svd: StreamedSVD,
        damping: float,
        *,
        corrected: bool = True,
        rank: int | None = None,
        rows: int | None = None,
    ) -> SpectralInverse:
        """From a streamed SVD of the rows.

        Args:
            svd: of the rows.
            damping: ``lam``.
            corrected: set ``tail`` to what the truncation leaves out, ``(energy - sum s^2) / (D - r)``.
            rank: leading directions to use; all by default.
            rows: how many rows there were. Fewer than ``D`` span no more directions than that, and what is left out
                is spread over those, ``min(D, rows) - r``: nothing else is ever multiplied with a row (our choice).
        """
        vectors = svd.vectors if rank is None else svd.vectors[:, :rank]
        squares = svd.values.double().square()[: vectors.shape[1]]
        size, kept = vectors.shape
        spanned = size if rows is None else min(size, rows)
        # With every direction kept the rest is 0 / 0, and rounding must not make it anything else.
        tail = 0.0
        if corrected and kept < spanned:
            tail = max(svd.energy - float(squares.sum()), 0.0) / (spanned - kept)
        return cls(vectors, squares, damping, tail)

    def coefficients(self, x: Tensor) -> Tensor:
        """``a = Psi^T x [..., r]`` of ``[..., D]``."""
        return x @ self.vectors.to(x)

    def apply(self, x: Tensor) -> Tensor:
        """The inverse times every row of ``[..., D]``."""
        outside = 1 / (self.damping + self.tail)
        if not self.vectors.shape[1]:
            return x * outside
        a = self.coefficients(x)
        inside = (1 / (self.damping + self.squares)).to(x)
        psi = self.vectors.to(x)
        return (x - a @ psi.mT) * outside + (a * inside) @ psi.mT

    def bilinear(self, products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``g_q^T (...)^-1 g_t`` from ``products [Q, N]`` and coefficients ``a [Q, r]``, ``b [N, r]``."""
        inside = (1 / (self.damping + self.squares)).to(a)
        return (products - a @ b.mT) / (self.damping + self.tail) + (a * inside) @ b.mT


@dataclasses.dataclass(frozen=True)
class GramInverse:
    """``g_q^T (H + lam I)^-1 g_t`` for all rows ``t`` of ``H``, from inner products alone.

        S = K_q (K + lam I)^-1,     K_ij = g_i . g_j,  K_q = g_q . g_j

    Exact, by ``G (G^T G + lam I)^-1 = (G G^T + lam I)^-1 G``.

    Attributes:
        lower: ``[N, N]`` fp64, Cholesky factor of ``K + lam I``.
        damping: ``lam``.
    """

    lower: Tensor
    damping: float

    @classmethod
    def of(cls, gram: Tensor, damping: float) -> GramInverse:
        """From ``K [N, N]``, of which the lower triangle is read."""
        return cls(_damped_cholesky(gram, damping), damping)

    def scores(self, products: Tensor) -> Tensor:
        """``[Q, N]`` damped scores from the inner products ``[Q, N]`` of queries with all rows."""
        solved = torch.cholesky_solve(products.double().mT, self.lower).mT
        return solved.to(products.dtype)

    def leverages(self) -> Tensor:
        """``h_t = g_t^T (H + lam I)^-1 g_t`` of the rows, fp64 ``[N]``: the diagonal of ``K (K + lam I)^-1``.

        From train-train products: what a row adds to its own prediction. Leaving row ``t`` out of a least-squares fit
        changes the prediction at ``q`` by ``S_qt r_t / (1 - h_t)``, with its residual ``r_t``.
        """
        inverse: Tensor = torch.cholesky_inverse(self.lower)
        return 1 - self.damping * inverse.diagonal()


def _damped_cholesky(matrix: Tensor, damping: float) -> Tensor:
    """Of ``matrix + damping I``, in fp64."""
    matrix = matrix.to(torch.float64, copy=True)
    matrix.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise SettingsError(
            f"the curvature plus a damping of {damping:.3g} is not positive definite in fp64: raise the damping"
        )
    result: Tensor = lower
    return result
