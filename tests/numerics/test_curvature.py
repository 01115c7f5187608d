from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.numerics.curvature import (
    DenseInverse,
    GramInverse,
    SpectralInverse,
    trace_damping,
)
from postlude.numerics.power_iteration import StreamedSVD, streamed_svd

SIZE, COUNT = 12, 30
GENERATOR = torch.Generator().manual_seed(5)
ROWS = torch.randn(COUNT, SIZE, generator=GENERATOR, dtype=torch.float64)
QUERIES = torch.randn(4, SIZE, generator=GENERATOR, dtype=torch.float64)
LAM = 3.0


def solved(rows: Tensor = ROWS, lam: float = LAM) -> Tensor:
    """``(H + lam)^-1 g_q`` by a dense solve."""
    h = rows.T @ rows + lam * torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.linalg.solve(h, QUERIES.T).T


def svd(rank: int, rows: Tensor = ROWS) -> StreamedSVD:
    return streamed_svd(
        lambda: rows.split(7), SIZE, rank, rows=len(rows), dtype=torch.float64, oversample=SIZE
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_cholesky_is_the_dense_solve() -> None:
    inverse = DenseInverse.of(ROWS.T @ ROWS, LAM)
    assert relative(inverse.apply(QUERIES), solved()) < 1e-12
    shaped = inverse.apply(QUERIES.float().view(2, 2, SIZE))
    assert shaped.dtype == torch.float32
    assert relative(shaped.double().view(4, SIZE), solved()) < 1e-6


@pytest.mark.parametrize("corrected", [True, False])
def test_every_direction_gives_the_dense_solve(corrected: bool) -> None:
    inverse = SpectralInverse.of(svd(SIZE), LAM, corrected=corrected)
    assert inverse.tail == 0
    assert relative(inverse.apply(QUERIES), solved()) < 1e-12


@pytest.mark.parametrize("corrected", [True, False])
def test_split_form_is_woodburys_identity(corrected: bool) -> None:
    found = svd(5)
    inverse = SpectralInverse.of(found, LAM, corrected=corrected)
    psi, s2, lam = found.vectors, found.values**2, LAM
    if corrected:
        expected_tail = (ROWS.square().sum() - s2.sum()) / (SIZE - 5)
        assert inverse.tail == pytest.approx(float(expected_tail))
        # A tail is damping outside and part of the spectrum inside.
        lam, s2 = lam + inverse.tail, s2 - inverse.tail
    inner = torch.linalg.inv(torch.diag(1 / s2) + torch.eye(5, dtype=torch.float64) / lam)
    eye = torch.eye(SIZE, dtype=torch.float64)
    woodbury = (eye - psi @ inner @ psi.T / lam) / lam
    assert relative(inverse.apply(QUERIES), QUERIES @ woodbury) < 1e-12
    a, b = inverse.coefficients(QUERIES), inverse.coefficients(ROWS)
    scores = inverse.bilinear(QUERIES @ ROWS.T, a, b)
    assert relative(scores, QUERIES @ woodbury @ ROWS.T) < 1e-12


def test_low_precision_does_not_cancel() -> None:
    huge = torch.cat([ROWS, 1e3 * ROWS[:1]])
    found = svd(5, huge)
    inverse = SpectralInverse.of(found, LAM, corrected=False)
    along = found.vectors[:, :1].T
    exact = float((along @ inverse.apply(along).T).item())
    single = inverse.apply(along.float())
    assert float((along.float() @ single.T).item()) == pytest.approx(exact, rel=1e-2)
    s2, lam = inverse.squares[:1].float(), torch.tensor(LAM)
    textbook = 1 / lam - s2 / (lam * (lam + s2))
    assert float(textbook) != pytest.approx(exact, rel=5e-2)


def test_no_direction_divides_by_the_damping() -> None:
    found = svd(5)
    plain = SpectralInverse.of(found, LAM, corrected=False, rank=0)
    assert relative(plain.apply(QUERIES), QUERIES / LAM) < 1e-15
    corrected = SpectralInverse.of(found, LAM, rank=0)
    mean = float(ROWS.square().sum()) / SIZE
    assert relative(corrected.apply(QUERIES), QUERIES / (LAM + mean)) < 1e-14


@pytest.mark.parametrize("count", [COUNT, 4])
def test_inner_products_give_the_dense_solve(count: int) -> None:
    rows = ROWS[:count]
    inverse = GramInverse.of(rows @ rows.T, LAM)
    assert relative(inverse.scores(QUERIES @ rows.T), solved(rows) @ rows.T) < 1e-12


def test_leverages_are_the_quadratic_forms_of_a_dense_solve() -> None:
    for rows in (ROWS, ROWS[:7]):
        h = rows.T @ rows + LAM * torch.eye(SIZE, dtype=torch.float64)
        expected = torch.stack([one @ torch.linalg.solve(h, one) for one in rows])
        found = GramInverse.of(rows @ rows.T, LAM).leverages()
        assert relative(found, expected) < 1e-13
        assert float(found.min()) > 0 and float(found.max()) < 1


def test_leverage_makes_the_score_exact_leave_one_out() -> None:
    """Least squares with the signed residual: each prediction without one example, against fitting again without it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(10, generator=generator, dtype=torch.float64)
    y = y + torch.randn(200, generator=generator, dtype=torch.float64)
    asked = torch.randn(5, 10, generator=generator, dtype=torch.float64)
    theta = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    residuals = y - x @ theta
    # Next to no damping: the Gram matrix of more rows than dimensions has no inverse without.
    tiny = 1e-9
    kernel = DenseInverse.of(x.T @ x, tiny).apply(asked) @ x.T
    leverages = (DenseInverse.of(x.T @ x, tiny).apply(x) * x).sum(1)
    changes = residuals * kernel / (1 - leverages)
    exact = torch.empty_like(changes)
    for left in range(200):
        others = torch.arange(200) != left
        without = torch.linalg.lstsq(x[others], y[others, None]).solution[:, 0]
        exact[:, left] = asked @ (theta - without)
    assert float((changes - exact).abs().max()) < 1e-9
    # Without the leverage it is only an approximation.
    assert float((residuals * kernel - exact).abs().max()) > 1e-3
    gram = GramInverse.of(x @ x.T, 1e-6)
    assert float((gram.leverages() - leverages).abs().max()) < 1e-6


def test_refusals() -> None:
    assert trace_damping(10.0, 4, 0.5) == 1.25
    with pytest.raises(DataError, match="all gradients of a layer zero"):
        trace_damping(0.0, 4, 0.5)
    with pytest.raises(DataError, match="positive"):
        trace_damping(float("nan"), 4, 0.5)
    with pytest.raises(SettingsError, match="raise the damping"):
        DenseInverse.of(-torch.eye(3), 0.5)
