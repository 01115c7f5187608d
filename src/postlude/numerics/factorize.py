"""Low-rank factorisations: truncated, metric-weighted and randomised SVD, block power iteration, uncentred PCA.

All arithmetic is fp64 on the device of the input, and results are fp64: cast once, at the end. Signs are fixed
(the entry of largest magnitude in each left singular vector or eigenvector is positive), so equal input gives
equal output.

Row vectors: a linear map is ``y = x @ M`` with ``M [in_features, out_features]``, the transpose of ``Linear.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = [
    "SVD",
    "StreamedSVD",
    "batched_power_iteration",
    "block_power_iteration",
    "error_reconstruction",
    "randomized_svd",
    "streamed_svd",
    "truncated_svd",
    "uncentred_pca",
    "weighted_svd",
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

    Costs a full SVD; see ``randomized_svd`` for a small rank of a large matrix.
    """
    m = _matrix(m, "The matrix")
    _check_rank(rank, m)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return _signed(u[:, :rank], s[:rank], vh[:rank])


def weighted_svd(
    m: Tensor, rank: int, left: Tensor | None = None, right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors ``A, B`` that minimise ``tr(left @ E @ right @ E.T)`` over ``E = m - A @ B`` of this rank.

    With ``left = S.T @ S``, ``right = R @ R.T`` and ``U, s, V = svd(S @ m @ R)`` cut at the rank, ``A = S^-1 U`` and
    ``B = diag(s) V R^-1``. ``S`` and ``R`` are Cholesky factors, and triangular systems are solved, not inverted; for
    a metric that is singular to ``1e-10`` they are eigenvector roots, with the smallest eigenvalues lifted to ``1e-10``
    of the largest. ``A @ B`` does not depend on which root it is. A metric of zeros (an input that was never active)
    counts as the identity.

    Args:
        m: ``[rows, columns]``.
        rank: at least 1, at most the smaller side.
        left: metric of the rows, symmetric positive semi-definite ``[rows, rows]``, for example ``E[x^T x]``, or its
            diagonal ``[rows]``; None is the identity.
        right: metric of the columns, ``[columns, columns]`` or ``[columns]``.

    Returns:
        ``A [rows, rank]`` and ``B [rank, columns]``, fp64.
    """
    m = _matrix(m, "The matrix")
    _check_rank(rank, m)
    s_root = _Root(left, m.shape[0], "left")
    r_root = _Root(right, m.shape[1], "right")
    u, s, vh = truncated_svd(r_root.times(s_root.times(m).T).T, rank)
    return s_root.solve(u), r_root.solve((s[:, None] * vh).T).T


def error_reconstruction(
    error: Tensor, rank: int, moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The low-rank correction ``A @ B`` of a quantization error, in closed form (QERA, arXiv:2410.06040).

    For ``error = W - W_q`` the corrected map is ``y = x @ (W_q + A @ B)``. The settings of the published systems:

    * LoRC (arXiv:2303.08302): ``moment=None``, minimises the error of the weight;
    * LQER (arXiv:2402.02446): ``moment=s**2`` with ``s`` the mean magnitude of each channel;
    * QERA-approx: ``moment=E[x^2]``, a vector;
    * QERA-exact: ``moment=E[x^T x]``, a matrix: minimises the expected output error ``E ||x (error - A B)||^2``.

    Lower output error comes with higher weight error: do not judge by the latter.

    Args:
        error: ``[in_features, out_features]``.
        rank: of the correction.
        moment: uncentred second moment of the inputs, ``[in, in]`` or its diagonal ``[in]``.

    Returns:
        ``A [in_features, rank]`` and ``B [rank, out_features]``, fp64.
    """
    return weighted_svd(error, rank, left=moment)


def block_power_iteration(
    matvec: Callable[[Tensor], Tensor],
    rmatvec: Callable[[Tensor], Tensor],
    columns: int,
    rank: int,
    *,
    oversample: int = 8,
    iterations: int = 20,
    tolerance: float = 1e-9,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> SVD:
    """Leading singular triplets of an operator known by its products alone: ``M @ X`` and ``M.T @ Y``.

    Subspace iteration with an orthonormal basis at every step, then an SVD within the subspace (arXiv:0909.4061,
    algorithms 4.4 and 5.1). The error of a triplet falls by ``(s_{rank + oversample + 1} / s_k)^2`` per iteration.

    Args:
        matvec: ``[columns, block] -> [rows, block]``, fp64 in; any floating dtype out.
        rmatvec: ``[rows, block] -> [columns, block]``.
        columns: number of columns of the operator.
        rank: triplets to return.
        oversample: additional directions carried along.
        iterations: at most this many, each one ``matvec`` and one ``rmatvec``; one more pair goes into start and end.
        tolerance: stop once no wanted singular value changes by more than this share of the largest; 0 runs all.
        generator: for the Gaussian start, on the CPU; None draws from the global one of torch.
        device: where the basis lives.
    """
    if not 1 <= rank <= columns or oversample < 0 or iterations < 0:
        raise SettingsError(
            f"Got rank {rank}, oversample {oversample}, iterations {iterations} for {columns} columns; "
            "expected a rank of 1 to the number of columns, the others not negative."
        )
    block = min(rank + oversample, columns)
    start = torch.randn(columns, block, generator=generator, dtype=torch.float64).to(device)
    image = _finite(matvec(start))
    if image.shape[0] < rank:
        raise SettingsError(f"Rank {rank} exceeds the {image.shape[0]} rows of the operator.")
    basis = torch.linalg.qr(image).Q
    previous: Tensor | None = None
    for _ in range(iterations):
        co_basis, triangle = torch.linalg.qr(_finite(rmatvec(basis)))
        current = torch.linalg.svdvals(triangle)[:rank]
        if (
            previous is not None
            and bool(((current - previous).abs() <= tolerance * current[0]).all())
            and tolerance
        ):
            break
        previous = current
        basis = torch.linalg.qr(_finite(matvec(co_basis))).Q
    u, s, vh = torch.linalg.svd(_finite(rmatvec(basis)).T, full_matrices=False)
    return _signed(basis @ u[:, :rank], s[:rank], vh[:rank])


def randomized_svd(
    m: Tensor,
    rank: int,
    oversample: int = 8,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> SVD:
    """An approximate ``truncated_svd`` in ``O(rows * columns * (rank + oversample))`` (arXiv:0909.4061).

    Close to optimal already after two iterations; exact where the rank of ``m`` is at most ``rank + oversample``.
    """
    m = _matrix(m, "The matrix")
    _check_rank(rank, m)
    return block_power_iteration(
        lambda x: m @ x,
        lambda y: m.T @ y,
        m.shape[1],
        rank,
        oversample=oversample,
        iterations=iterations,
        tolerance=0.0,
        generator=generator,
        device=m.device,
    )


def batched_power_iteration(m: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors ``U, V`` with ``M ~ U @ V.T`` of many small matrices at once (LoRIF, arXiv:2601.21929, section 4).

        V <- orth(start);  repeat: U <- orth(M V), V <- orth(M^T U);  U <- M V

    ``V`` has orthonormal columns (or columns of zeros, where a matrix has less rank), ``U`` holds the singular
    values. 8 iterations for one column and 16 for more lose no more than a few permille above the SVD's optimum.

    Args:
        m: ``[..., rows, columns]``, fp32 or fp64, which is also the precision of the work.
        start: ``[columns, rank]``, shared by all matrices: random, of a seed that depends on nothing else.
        iterations: at least 1.

    Returns:
        ``U [..., rows, rank]`` and ``V [..., columns, rank]`` in the type of ``m``.
    """
    rows, columns = m.shape[-2:]
    rank = start.shape[-1]
    if start.shape[0] != columns or not 1 <= rank <= min(rows, columns):
        raise SettingsError(
            f"A start of shape {tuple(start.shape)} does not fit matrices of {rows} by {columns}; expected "
            f"({columns}, rank) with a rank of 1 to {min(rows, columns)}."
        )
    if iterations < 1:
        raise SettingsError(f"iterations is {iterations}; expected at least 1")
    # The smaller of the two Gram matrices is iterated: one product a step instead of two.
    gram = m @ m.mT if columns > rows else m.mT @ m
    first = m @ start.to(m) if columns > rows else start.to(m).expand(*m.shape[:-2], -1, -1)
    steps = iterations - 1 if columns > rows else iterations
    basis = _leading_vector(gram, first, steps) if rank == 1 else _subspace(gram, first, steps)
    v = _orthonormal(m.mT @ basis) if columns > rows else basis
    return m @ v, v


def _orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis with the span of the columns of ``[..., n, k]``; one column of zeros stays zero."""
    basis: Tensor
    if x.shape[-1] > 1:
        basis = torch.linalg.qr(x).Q
    else:
        basis = x / x.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return basis


def _subspace(gram: Tensor, first: Tensor, steps: int) -> Tensor:
    basis = _orthonormal(first)
    for _ in range(steps):
        basis = _orthonormal(gram @ basis)
    return basis


def _leading_vector(gram: Tensor, first: Tensor, steps: int) -> Tensor:
    """Power iteration of ``[..., n, n]`` from ``[..., n, 1]``; ``[..., n, 1]`` of length 1."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    # With eigenvalues of 1 / n to 1 a few steps cannot leave the range of fp32, so not every step is scaled.
    gram = gram / trace[..., None, None]
    row = _orthonormal(first).mT
    for step in range(1, steps + 1):
        row = (
            (gram * row).sum(-1).unsqueeze(-2)
        )  # a product with a vector, in one pass over the matrices
        if step % 4 == 0:
            row = _orthonormal(row.mT).mT
    return _orthonormal(row.mT)


class StreamedSVD(NamedTuple):
    """Leading right singular vectors of a matrix that was seen in batches of rows.

    Attributes:
        values: ``[rank]`` descending singular values.
        vectors: ``[columns, rank]``.
        sketch_values: ``[rank + oversample]``, all that the sketch found, descending.
        energy: ``sum_i |row_i|^2``, which is the sum of all squared singular values.
    """

    values: Tensor
    vectors: Tensor
    sketch_values: Tensor
    energy: float


def streamed_svd(
    batches: Callable[[], Iterable[Tensor]],
    columns: int,
    rank: int,
    *,
    rows: int,
    oversample: int = 10,
    iterations: int = 3,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StreamedSVD:
    """Right singular vectors of a matrix of many rows that never exists as a whole (LoRIF, arXiv:2601.21929).

    Subspace iteration with the Gram matrix, ``iterations + 1`` passes over the rows with one QR each, and a last
    pass for the Rayleigh-Ritz step (arXiv:0909.4061). Unlike :func:`block_power_iteration` it needs one product per
    pass, since ``M`` and ``M.T`` are applied to a batch while it is there.

    Args:
        batches: called once per pass; yields ``[n, columns]``, the same rows every time.
        columns: of the matrix.
        rank: triplets wanted; fewer come back where the matrix is smaller.
        rows: of the matrix, in all batches together.
        oversample: additional directions carried along.
        iterations: power iterations after the first product.
        generator: for the Gaussian start, on the CPU; None draws from the global one of torch.
        dtype: fp32 or fp64, of all products; the small eigenproblem is fp64 in any case.
        device: where the basis lives.
    """
    if rank < 1 or oversample < 0 or iterations < 0 or rows < 1 or columns < 1:
        raise SettingsError(
            f"Got rank {rank}, oversample {oversample}, iterations {iterations} for {rows} by {columns}; expected "
            "a rank from 1 and the others not negative."
        )
    if dtype not in (torch.float32, torch.float64):
        raise SettingsError(f"a streamed SVD is computed in float32 or float64; got {dtype}")
    width = min(rank + oversample, columns, rows)
    rank = min(rank, width)
    basis = torch.randn(columns, width, generator=generator, dtype=dtype).to(device)
    for _ in range(iterations + 1):
        image = torch.zeros_like(basis)
        for batch in batches():
            image.addmm_(batch.mT, batch @ basis)
        basis = torch.linalg.qr(_checked(image)).Q
    small = torch.zeros(width, width, dtype=torch.float64, device=device)
    energy = 0.0
    for batch in batches():
        image = batch @ basis
        small += (image.mT @ image).double()
        energy += float(batch.double().square().sum())
    values, vectors = torch.linalg.eigh((_checked(small) + small.mT) / 2)
    values = values.flip(0).clamp_(min=0).sqrt()
    vectors = vectors.flip(1)[:, :rank]
    return StreamedSVD(values[:rank], basis @ vectors.to(dtype), values, energy)


def _checked(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise DataError(
            "The rows of a streamed SVD hold NaN or infinity; check the gradients or the index."
        )
    return x


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
        rows = _matrix(rows, "The rows")
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
            values = _finite(metric)
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


def _signed(u: Tensor, s: Tensor, vh: Tensor) -> SVD:
    signs = _column_signs(u)
    return SVD(u * signs, s, signs[:, None] * vh)


def _column_signs(vectors: Tensor) -> Tensor:
    """+-1 per column, such that the entry of largest magnitude becomes positive."""
    top = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(top < 0, -1.0, 1.0).to(vectors.dtype)


def _finite(x: Tensor, name: str = "The input") -> Tensor:
    x = x.detach().to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise DataError(
            f"{name} of a factorisation holds NaN or infinity; check the weights and the statistics."
        )
    return x


def _matrix(m: Tensor, name: str) -> Tensor:
    if m.ndim != 2 or 0 in m.shape:
        raise DataError(
            f"{name} of a factorisation has shape {tuple(m.shape)}; expected a matrix that is not empty."
        )
    return _finite(m, name)


def _symmetric(metric: Tensor, size: int | None, name: str) -> Tensor:
    if metric.ndim != 2 or metric.shape[0] != metric.shape[1] or size not in (None, len(metric)):
        expected = "square" if size is None else f"{size} by {size}"
        raise DataError(
            f"The {name} metric has shape {tuple(metric.shape)}; expected a {expected} matrix."
        )
    metric = _finite(metric, f"The {name} metric")
    if bool((metric - metric.T).abs().max() > 1e-5 * metric.abs().max()):
        raise DataError(
            f"The {name} metric is not symmetric; expected a second moment such as E[x^T x]."
        )
    return (metric + metric.T) / 2


def _check_rank(rank: int, m: Tensor) -> None:
    if not 1 <= rank <= min(m.shape):
        raise SettingsError(
            f"Rank {rank} is not possible for a matrix of shape {tuple(m.shape)}; use 1 to {min(m.shape)}."
        )
