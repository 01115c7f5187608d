"""Factorisations against dense solves, optimality conditions and scipy."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from postlude.errors import DataError, SettingsError
from postlude.numerics.factorize import truncated_svd, uncentred_pca, weighted_svd


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spread_moment(size: int, seed: int = 3, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated activations with unequal channels, and their second moment."""
    x = normal(tokens, size, seed=seed) @ (
        normal(size, size, seed=seed + 1) * torch.logspace(0, 1.5, size)
    )
    return x, x.T @ x / tokens


def output_error(x: torch.Tensor, error: torch.Tensor) -> float:
    return float((x @ error).square().sum() / len(x))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 5)])
def test_truncated_svd(shape: tuple[int, int]) -> None:
    m = normal(*shape)
    full = scipy.linalg.svdvals(m.numpy())
    for rank in (1, 3, 5):
        u, s, vh = truncated_svd(m, rank)
        assert u.shape == (shape[0], rank) and vh.shape == (rank, shape[1])
        torch.testing.assert_close(s, torch.from_numpy(full[:rank].copy()))
        rest = float((m - (u * s) @ vh).square().sum())
        assert rest == pytest.approx(float((full[rank:] ** 2).sum()), abs=1e-12)


def test_signs_are_fixed() -> None:
    m = normal(6, 4)
    u, _, vh = truncated_svd(m, 4)
    top = u.abs().argmax(0)
    assert bool((u[top, torch.arange(4)] > 0).all())
    minus_u, _, minus_vh = truncated_svd(-m, 4)
    torch.testing.assert_close(minus_u, u)
    torch.testing.assert_close(minus_vh, -vh)


def test_low_precision_input_is_computed_in_double() -> None:
    m = normal(6, 4).to(torch.bfloat16)
    assert truncated_svd(m, 2).s.dtype == torch.float64
    torch.testing.assert_close(truncated_svd(m, 2).s, truncated_svd(m.double(), 2).s)


def test_weighted_svd_without_metric_is_the_truncated_svd() -> None:
    m = normal(8, 6)
    a, b = weighted_svd(m, 3)
    u, s, vh = truncated_svd(m, 3)
    torch.testing.assert_close(a @ b, (u * s) @ vh)


def test_weighted_svd_matches_symmetric_roots() -> None:
    m = normal(10, 8)
    _, left = spread_moment(10, 3)
    _, right = spread_moment(8, 5)
    a, b = weighted_svd(m, 3, left, right)
    s, r = (torch.from_numpy(scipy.linalg.sqrtm(metric.numpy()).real) for metric in (left, right))
    u, values, vh = torch.linalg.svd(s @ m @ r)
    kept = (u[:, :3] * values[:3]) @ vh[:3]
    expected = torch.linalg.solve(s, torch.linalg.solve(r, kept.T).T)
    torch.testing.assert_close(a @ b, expected, rtol=1e-8, atol=1e-9)
    error = m - a @ b
    objective = float(torch.trace(left @ error @ right @ error.T))
    assert objective == pytest.approx(float(values[3:].square().sum()), rel=1e-9)


def test_weighted_svd_is_a_minimum() -> None:
    m = normal(7, 5)
    _, left = spread_moment(7)
    a, b = (factor.requires_grad_() for factor in weighted_svd(m, 2, left))
    error = m - a @ b
    torch.trace(left @ error @ error.T).backward()
    assert a.grad is not None and b.grad is not None
    scale = float(torch.trace(left @ m @ m.T))
    assert float(a.grad.abs().max()) < 1e-9 * scale and float(b.grad.abs().max()) < 1e-9 * scale


def test_diagonal_metric_equals_its_matrix() -> None:
    m = normal(6, 5)
    left, right = normal(6, seed=1).square() + 0.1, normal(5, seed=2).square() + 0.1
    a, b = weighted_svd(m, 2, left, right)
    a_full, b_full = weighted_svd(m, 2, left.diag(), right.diag())
    torch.testing.assert_close(a @ b, a_full @ b_full)


def test_full_rank_reconstructs_everything() -> None:
    m = normal(6, 9)
    _, left = spread_moment(6)
    a, b = weighted_svd(m, 6, left)
    torch.testing.assert_close(a @ b, m, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_singular_metric(diagonal: bool) -> None:
    m = normal(8, 6)
    x = normal(40, 8, seed=4)
    x[:, 5:] = 0  # channels that never fire
    moment = x.T @ x / 40
    a, b = weighted_svd(m, 3, moment.diagonal() if diagonal else moment)
    assert bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    # Three of the five directions the data visits: no worse than the plain truncation.
    u, s, vh = truncated_svd(m, 3)
    assert output_error(x, m - a @ b) <= output_error(x, m - (u * s) @ vh)
    if not diagonal:
        discarded = torch.linalg.svdvals(x / 40**0.5 @ m)[3:].square().sum()
        assert output_error(x, m - a @ b) == pytest.approx(float(discarded), rel=1e-6)


def test_zero_metric_is_the_identity() -> None:
    m = normal(5, 4)
    u, s, vh = truncated_svd(m, 2)
    for metric in (torch.zeros(5), torch.zeros(5, 5)):
        a, b = weighted_svd(m, 2, metric)
        torch.testing.assert_close(a @ b, (u * s) @ vh)


def test_the_output_error_of_a_correction_is_the_discarded_energy() -> None:
    error = normal(12, 10) * 0.1
    x, moment = spread_moment(12)
    a, b = weighted_svd(error, 4, moment)
    root = torch.linalg.cholesky(moment).T
    discarded = torch.linalg.svdvals(root @ error)[4:].square().sum()
    assert output_error(x, error - a @ b) == pytest.approx(float(discarded), rel=1e-9)


def test_corrections_by_their_metrics() -> None:
    error = normal(24, 20) * 0.1
    x, moment = spread_moment(24)
    variants = {
        "lorc": weighted_svd(error, 4),
        "approx": weighted_svd(error, 4, moment.diagonal()),
        "exact": weighted_svd(error, 4, moment),
    }
    output = {name: output_error(x, error - a @ b) for name, (a, b) in variants.items()}
    weight = {name: float((error - a @ b).square().sum()) for name, (a, b) in variants.items()}
    assert output["exact"] < output["approx"] < output["lorc"] < output_error(x, error)
    assert weight["lorc"] < weight["approx"] and weight["lorc"] < weight["exact"]


def test_uncentred_pca() -> None:
    rows = normal(50, 6) + 3.0
    values, vectors = uncentred_pca(rows)
    moment = rows.T @ rows / 50
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, moment)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6, dtype=torch.float64))
    assert torch.equal(values, values.sort(descending=True).values)
    for one, other in zip(uncentred_pca(moment=moment), (values, vectors), strict=True):
        torch.testing.assert_close(one, other)
    # Not centred: the mean dominates.
    mean = rows.mean(0) / rows.mean(0).norm()
    assert float((vectors[:, 0] @ mean).abs()) > 0.99


def test_uncentred_pca_with_few_rows_still_gives_a_basis() -> None:
    values, vectors = uncentred_pca(normal(3, 7).to(torch.bfloat16))
    assert values.dtype == torch.float64 and bool((values >= 0).all())
    assert float(values[3:].max()) < 1e-12
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(7, dtype=torch.float64))


def test_wrong_input_is_refused() -> None:
    m = normal(4, 3)
    for rank in (0, 4):
        with pytest.raises(SettingsError, match="1 to 3"):
            truncated_svd(m, rank)
    with pytest.raises(DataError, match="matrix"):
        truncated_svd(m[0], 1)
    with pytest.raises(DataError, match="NaN"):
        truncated_svd(m * torch.nan, 1)
    with pytest.raises(DataError, match="4 by 4"):
        weighted_svd(m, 1, torch.eye(3))
    with pytest.raises(DataError, match="not symmetric"):
        weighted_svd(m, 1, normal(4, 4))
    with pytest.raises(DataError, match="semi-definite"):
        weighted_svd(m, 1, torch.tensor([1.0, 1.0, 1.0, -1.0]).diag())
    with pytest.raises(DataError, match="not negative"):
        weighted_svd(m, 1, -torch.ones(4))
    with pytest.raises(SettingsError, match="either"):
        uncentred_pca()
