"""Power iterations against dense singular value decompositions."""

from __future__ import annotations

import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.numerics.factorize import truncated_svd
from postlude.numerics.power_iteration import (
    batched_power_iteration,
    block_power_iteration,
    randomized_svd,
    streamed_svd,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def decaying(rows: int, columns: int, rate: float = 0.5, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values 1, rate, rate^2, ..."""
    size = min(rows, columns)
    u = torch.linalg.qr(normal(rows, size, seed=seed)).Q
    v = torch.linalg.qr(normal(columns, size, seed=seed + 1)).Q
    return (u * rate ** torch.arange(size, dtype=torch.float64)) @ v.T


def test_randomized_svd_is_exact_for_a_low_rank() -> None:
    m = normal(40, 5) @ normal(5, 30, seed=1)
    got = randomized_svd(m, 5, generator=torch.Generator().manual_seed(0))
    for one, other in zip(got, truncated_svd(m, 5), strict=True):
        torch.testing.assert_close(one, other)


def test_randomized_svd_is_near_optimal_and_repeatable() -> None:
    m = decaying(60, 50, rate=0.9)
    one = randomized_svd(m, 8, generator=torch.Generator().manual_seed(0))
    two = randomized_svd(m, 8, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    best = float(torch.linalg.svdvals(m)[8:].square().sum())
    assert best <= float((m - (one.u * one.s) @ one.vh).square().sum()) <= 1.02 * best
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(one.u.T @ one.u, identity)
    torch.testing.assert_close(one.vh @ one.vh.T, identity)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (3, 30), (30, 3)])
def test_block_power_iteration_converges(shape: tuple[int, int]) -> None:
    m = decaying(*shape)
    got = block_power_iteration(
        lambda x: m @ x, lambda y: m.T @ y, shape[1], 3, generator=torch.Generator().manual_seed(1)
    )
    for one, other in zip(got, truncated_svd(m, 3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_block_power_iteration_refuses_more_than_it_has() -> None:
    m = normal(4, 3)
    with pytest.raises(SettingsError, match="rank"):
        block_power_iteration(lambda x: m @ x, lambda y: m.T @ y, 3, 5)


def test_block_power_iteration_stops_when_settled() -> None:
    m = decaying(30, 20, rate=0.1)
    calls = 0

    def matvec(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return m @ x

    block_power_iteration(matvec, lambda y: m.T @ y, 20, 2, iterations=50)
    assert calls < 6


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize(("rank", "iterations"), [(1, 8), (2, 16), (4, 16)])
def test_batched_power_iteration_keeps_the_energy_that_an_svd_keeps(
    shape: tuple[int, int], rank: int, iterations: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    m = torch.stack([decaying(*shape, seed=seed) for seed in range(0, 10, 2)]).float()
    start = torch.randn(shape[1], rank, generator=generator)
    u, v = batched_power_iteration(m, start, iterations)
    assert u.shape == (5, shape[0], rank)
    gram = v.mT @ v
    torch.testing.assert_close(gram, torch.eye(rank).expand_as(gram), atol=1e-5, rtol=0)
    best = torch.linalg.svdvals(m)[:, :rank].square().sum(-1)
    kept = u.square().sum((1, 2))
    assert float((1 - kept / best).max()) < 2e-3
    alone = batched_power_iteration(m[2:3], start, iterations)
    torch.testing.assert_close((alone[0] @ alone[1].mT)[0], (u @ v.mT)[2], atol=1e-5, rtol=1e-5)


def test_batched_power_iteration_at_full_rank_and_of_zeros() -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in ((6, 4), (4, 6)):
        m = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        m[1] = m[1, :, :1] @ m[1, :1]  # rank 1
        m[2] = 0
        for rank in (1, 4):
            u, v = batched_power_iteration(m, torch.randn(shape[1], rank, generator=generator), 8)
            assert bool(u.isfinite().all() and v.isfinite().all())
            assert not u[2].any()
            torch.testing.assert_close((u @ v.mT)[1], m[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(u @ v.mT, m, rtol=1e-9, atol=1e-9)
    with pytest.raises(SettingsError, match="1 to 4"):
        batched_power_iteration(m, torch.zeros(6, 5), 8)
    with pytest.raises(SettingsError, match="iterations is 0"):
        batched_power_iteration(m, torch.zeros(6, 1), 0)


def test_streamed_svd_is_the_svd_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(80, 50, generator=generator) * 0.95 ** torch.arange(50)
    found = streamed_svd(
        lambda: iter(m.split(17)), 50, 32, rows=80, oversample=10, generator=generator
    )
    expected = torch.linalg.svd(m.double(), full_matrices=False)
    assert float((found.values / expected.S[:32] - 1).abs().max()) < 0.013
    assert found.energy == pytest.approx(float(m.double().square().sum()), rel=5e-8)
    assert found.sketch_values.shape == (42,)
    gram = found.vectors.T @ found.vectors
    torch.testing.assert_close(gram, torch.eye(32), atol=1e-5, rtol=0)
    # The leading directions, not only their lengths.
    overlap = (expected.Vh[:8] @ found.vectors.double()).square().sum(1)
    assert float(overlap.min()) > 0.999


@pytest.mark.parametrize("rows", [30, 5])
def test_streamed_svd_of_every_direction_is_exact(rows: int) -> None:
    m = torch.randn(rows, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = streamed_svd(lambda: [m], 12, 50, rows=rows, dtype=torch.float64)
    rank = min(rows, 12)
    assert found.vectors.shape == (12, rank)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(m), rtol=1e-7, atol=1e-9)
    h = found.vectors @ torch.diag(found.values**2) @ found.vectors.T
    torch.testing.assert_close(h, m.T @ m, rtol=1e-9, atol=1e-9)


def test_streamed_svd_refuses() -> None:
    with pytest.raises(SettingsError, match="float32 or float64"):
        streamed_svd(lambda: [], 4, 2, rows=3, dtype=torch.float16)
    with pytest.raises(SettingsError, match="rank 0"):
        streamed_svd(lambda: [], 4, 0, rows=3)
    with pytest.raises(DataError, match="NaN"):
        streamed_svd(lambda: [torch.full((3, 4), torch.nan)], 4, 2, rows=3)
