"""Moments, extremes and samples against the same of everything at once."""

from __future__ import annotations

import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.numerics import streaming
from postlude.numerics.moments import AbsMax, MeanVariance, RowSample, SecondMoment, TopToken

WIDTH = 12


def batch(seed: int, dtype: torch.dtype = torch.float32, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def test_not_finite_is_reported() -> None:
    bad = torch.full((1, 1, 3), torch.nan)
    for statistic, read in (
        (s := SecondMoment(3), s.value),
        (a := AbsMax(3), a.value),
        (m := MeanVariance(3), m.mean),
        (t := TopToken(3), t.rows),
    ):
        statistic.update(bad)
        with pytest.raises(DataError, match="NaN"):
            read()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_second_moment(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_BLOCK_ENTRIES", 1)  # blocks of 256 tokens
    x = batch(0, dtype, length=200)
    statistic = SecondMoment(WIDTH)
    statistic.update(x)
    rows = x.double().reshape(-1, WIDTH)
    expected = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for row in rows:
        expected += row[:, None] * row[None, :]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        statistic.value(), expected / len(rows), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(statistic.value(), statistic.value().T)
    assert statistic.count == 600 and statistic.value().dtype == torch.float64


def test_second_moment_in_double_is_exact_to_rounding() -> None:
    x = batch(0) * 1e3 + 1e4
    statistic = SecondMoment(WIDTH, torch.float64)
    statistic.update(x)
    rows = x.double().reshape(-1, WIDTH)
    torch.testing.assert_close(statistic.value(), rows.T @ rows / len(rows), rtol=1e-14, atol=0)
    with pytest.raises(SettingsError, match="precision"):
        SecondMoment(3, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_abs_max(dtype: torch.dtype) -> None:
    statistic = AbsMax(WIDTH)
    batches = [batch(seed, dtype) for seed in range(3)]
    for x in batches:
        statistic.update(x)
    expected = torch.cat(batches).abs().reshape(-1, WIDTH).amax(0)
    assert torch.equal(statistic.value().double(), expected.double())


def test_mean_variance_with_a_large_mean() -> None:
    statistic = MeanVariance(WIDTH)
    batches = [batch(seed, torch.float64) + 1e6 for seed in range(5)]
    for x in batches:
        statistic.update(x)
    rows = torch.cat(batches).reshape(-1, WIDTH)
    torch.testing.assert_close(statistic.mean(), rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(statistic.variance(), rows.var(0, correction=0), rtol=1e-9, atol=0)
    torch.testing.assert_close(statistic.mean_square(), rows.square().mean(0))


def test_mean_square_is_the_diagonal_of_the_second_moment() -> None:
    diagonal, full = MeanVariance(WIDTH), SecondMoment(WIDTH, torch.float64)
    for statistic in (diagonal, full):
        statistic.update(batch(0))
    torch.testing.assert_close(diagonal.mean_square(), full.value().diagonal())


def test_top_token_uses_the_largest_entry_not_the_norm() -> None:
    x = torch.zeros(2, 3, 4)
    x[0, 0] = 2.0  # the largest L2 norm
    x[0, 2, 1] = -3.0  # the largest entry, negative
    x[1, 1, 3] = 1.0
    statistic = TopToken(4)
    statistic.update(x)
    assert torch.equal(statistic.rows(), torch.stack([x[0, 2], x[1, 1]]))


def test_top_token_against_a_loop() -> None:
    statistic = TopToken(WIDTH)
    expected = []
    for seed in range(3):
        x = batch(seed, torch.bfloat16)
        statistic.update(x)
        for sequence in x:
            expected.append(max(sequence, key=lambda token: float(token.abs().max())))
    assert statistic.rows().dtype == torch.bfloat16
    assert torch.equal(statistic.rows(), torch.stack(expected)) and statistic.count == 9
    with pytest.raises(DataError, match="batch, length, width"):
        statistic.update(torch.zeros(4, WIDTH))


def test_a_row_sample_is_uniform_over_all_that_was_seen() -> None:
    """Each of 60 tokens, in three batches, is in a third of the samples of 20."""
    seen = torch.zeros(60)
    for seed in range(300):
        sample = RowSample(1, 20, seed)
        for part in torch.arange(60.0)[:, None].split(25):
            sample.update(part)
        rows = sample.rows().flatten().long()
        assert len(rows.unique()) == 20
        seen[rows] += 1
    assert (seen / 300 - 1 / 3).abs().max() < 0.12


def test_a_row_sample_keeps_everything_while_there_is_room() -> None:
    one, other = RowSample(WIDTH, 50), RowSample(WIDTH, 50, seed=1)
    one.update(batch(0))
    other.update(batch(1))
    assert len(one.rows()) == 21
    both = one.merge(other).rows()
    assert both.shape == (42, WIDTH)
    expected = torch.cat([batch(0), batch(1)]).reshape(-1, WIDTH)
    assert torch.equal(both.sum(-1).sort().values, expected.sum(-1).sort().values)
