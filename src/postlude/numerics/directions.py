"""Directions of a vector space: angles without sign, leading singular directions, linear approximations.

Angles are in degrees and *acute*: a direction and its negative are the same, so ``acute = 90 - |angle - 90|``
lies in [0, 90]. Everything is computed in float64 (singular defects, arXiv:2502.07004).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = [
    "EigenPair",
    "SingularDirections",
    "acute_angle",
    "gaussian_linearisation",
    "leading_singular_directions",
    "mean_pairwise_acute_angle",
    "nearest_eigenpair",
    "project_out",
    "unit",
]


class SingularDirections(NamedTuple):
    """Leading singular directions of a matrix ``[rows, columns]``.

    Attributes:
        left: ``[rows, count]``, unit columns.
        values: ``[count]``, descending.
        right: ``[columns, count]``, unit columns; ``matrix @ right = left * values``.
    """

    left: Tensor
    values: Tensor
    right: Tensor


class EigenPair(NamedTuple):
    """One eigenvalue of a matrix and the direction it acts on.

    Attributes:
        value: real part of the eigenvalue.
        angle: acute angle between the direction asked for and the eigenvector, in degrees.
        vector: ``[D]``, unit real part of the eigenvector.
    """

    value: float
    angle: float
    vector: Tensor


def unit(vectors: Tensor) -> Tensor:
    """Scale the last axis to Euclidean norm 1, in float64.

    Raises:
        DataError: a vector is zero or not finite, so it has no direction.
    """
    vectors = vectors.double()
    # Dividing by the largest entry first keeps the squares of very large and very small vectors in range.
    largest = vectors.abs().amax(-1, keepdim=True)
    if not bool((torch.isfinite(largest) & (largest > 0)).all()):
        raise DataError(
            "A vector that is zero, NaN or infinite has no direction. "
            "Check the tensor it was taken from (a dead layer, an overflow)."
        )
    scaled = vectors / largest
    return scaled.div(scaled.norm(dim=-1, keepdim=True))


def acute_angle(first: Tensor, second: Tensor) -> Tensor:
    """Acute angles in degrees between vectors ``[..., D]``; leading axes broadcast.

    Raises:
        DataError: a vector has no direction.
    """
    first, second = unit(first), unit(second)
    # acos loses half of the digits near 0 and 180 degrees; this form of the angle (Kahan) does not.
    difference, total = (first - second).norm(dim=-1), (first + second).norm(dim=-1)
    return torch.rad2deg(
        2 * torch.atan2(torch.minimum(difference, total), torch.maximum(difference, total))
    )


def mean_pairwise_acute_angle(vectors: Tensor, chunk: int = 1024) -> float:
    """Mean acute angle in degrees over the pairs of the rows of ``vectors`` ``[n, D]``; 0 for one row.

    Raises:
        DataError: no rows, or a row without a direction.
    """
    rows = unit(vectors)
    count = len(rows)
    if count < 1:
        raise DataError("The mean angle of no vectors is not defined; at least one is needed.")
    if count == 1:
        return 0.0
    total = 0.0
    for start in range(0, count, chunk):
        cosine = (rows[start : start + chunk] @ rows.T).abs().clamp(max=1.0)
        angles = torch.rad2deg(torch.acos(cosine))
        total += float(angles.triu(start + 1).sum())
    return total / (count * (count - 1) / 2)


def leading_singular_directions(matrix: Tensor, count: int | None = None) -> SingularDirections:
    """The ``count`` leading singular directions of ``matrix`` ``[rows, columns]``; all by default.

    The sign of a pair is fixed by making the largest entry of the left direction positive.

    Raises:
        DataError: the matrix is not finite.
        SettingsError: more directions than the smaller side are asked for.
    """
    limit = min(matrix.shape)
    count = limit if count is None else count
    if not 1 <= count <= limit:
        raise SettingsError(
            f"{count} singular directions of a {tuple(matrix.shape)} matrix: between 1 and {limit} exist."
        )
    if not bool(torch.isfinite(matrix).all()):
        raise DataError(
            f"A {tuple(matrix.shape)} matrix holds NaN or infinity; it has no singular directions."
        )
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    left, values, right = left[:, :count], values[:count], right[:count].T
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return SingularDirections(left * sign, values, right * sign)


def nearest_eigenpair(matrix: Tensor, direction: Tensor) -> EigenPair:
    """The eigenpair of a square ``matrix`` whose eigenvector lies nearest to ``direction`` ``[D]``.

    Eigenvectors of a real matrix can be complex; their real parts are compared (arXiv:2502.07004, code).
    """
    values, vectors = torch.linalg.eig(matrix.double())
    real = vectors.real.T
    # A purely imaginary eigenvector has no real direction to compare.
    usable = real.norm(dim=1) > 1e-12
    angles = torch.full((len(real),), 90.0, dtype=torch.float64, device=matrix.device)
    angles[usable] = acute_angle(real[usable], direction)
    best = int(angles.argmin())
    return EigenPair(float(values.real[best]), float(angles[best]), unit(real[best]))


def gaussian_linearisation(
    function: Callable[[Tensor], Tensor],
    width: int,
    samples: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int = 4096,
) -> Tensor:
    """Least-squares matrix ``B`` ``[out, width]`` of ``function(x) ~ B x`` for ``x ~ N(0, I)``, no intercept.

    The normal equations are summed over chunks in float64, so memory does not grow with ``samples``; the
    function sees ``dtype`` on the generator's device. The error of an entry falls with ``1/sqrt(samples)``.

    Args:
        function: maps rows ``[n, width]`` to rows ``[n, out]``.
        width: number of inputs.
        samples: number of Gaussian rows.
        generator: source of the rows.
        dtype: precision in which ``function`` is evaluated.
        chunk: rows held at a time.

    Raises:
        SettingsError: fewer samples than inputs, which leaves the matrix undetermined.
    """
    if samples < width:
        raise SettingsError(
            f"{samples} Gaussian samples do not determine a linear map of {width} inputs. "
            f"Use at least {width}; {20 * width} or more give a usable estimate."
        )
    gram = torch.zeros(width, width, dtype=torch.float64, device=generator.device)
    cross: Tensor | None = None
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        x = torch.randn(rows, width, generator=generator, dtype=dtype, device=generator.device)
        y = function(x)
        gram += (x.T @ x).double()
        product = (x.T @ y).double()
        cross = product if cross is None else cross + product
    if cross is None:
        raise SettingsError("A linear approximation needs at least one input.")
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).T


def project_out(x: Tensor, direction: Tensor) -> Tensor:
    """``x - (x . v) v`` along the last axis for the unit vector ``v`` along ``direction``, in ``x``'s dtype."""
    along = unit(direction).to(dtype=x.dtype, device=x.device)
    return x - (x @ along)[..., None] * along
