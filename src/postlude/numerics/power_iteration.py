"""Leading singular vectors by products alone: of an operator, of many small matrices, of one that is streamed.

* :func:`block_power_iteration` knows a matrix by ``M @ X`` and ``M.T @ Y``; :func:`randomized_svd` is that for one at
  hand.
* :func:`batched_power_iteration` factors many small matrices at once.
* :func:`streamed_svd` sees a matrix of many rows in batches, once per pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.numerics.factorize import SVD, as_matrix, check_rank, finite, with_signs

__all__ = [
    "StreamedSVD",
    "batched_power_iteration",
    "block_power_iteration",
    "randomized_svd",
    "streamed_svd",
]


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
    image = finite(matvec(start))
    if image.shape[0] < rank:
        raise SettingsError(f"Rank {rank} exceeds the {image.shape[0]} rows of the operator.")
    basis = torch.linalg.qr(image).Q
    previous: Tensor | None = None
    for _ in range(iterations):
        co_basis, triangle = torch.linalg.qr(finite(rmatvec(basis)))
        current = torch.linalg.svdvals(triangle)[:rank]
        if (
            previous is not None
            and bool(((current - previous).abs() <= tolerance * current[0]).all())
            and tolerance
        ):
            break
        previous = current
        basis = torch.linalg.qr(finite(matvec(co_basis))).Q
    u, s, vh = torch.linalg.svd(finite(rmatvec(basis)).T, full_matrices=False)
    return with_signs(basis @ u[:, :rank], s[:rank], vh[:rank])


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
    m = as_matrix(m, "The matrix")
    check_rank(rank, m)
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
