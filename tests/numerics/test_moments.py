"""Streaming statistics against the same statistic of everything at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save

from postlude.errors import DataError, SettingsError
from postlude.numerics import moments
from postlude.numerics.moments import (
    AbsMax,
    MeanVariance,
    Quantiles,
    RowSample,
    SecondMoment,
    Statistic,
    TopToken,
)

WIDTH = 12


def batch(seed: int, dtype: torch.dtype = torch.float32, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


FACTORIES: list[Callable[[], Statistic]] = [
    lambda: SecondMoment(WIDTH),
    lambda: SecondMoment(WIDTH, torch.float64),
    lambda: AbsMax(WIDTH),
    lambda: MeanVariance(WIDTH),
    lambda: TopToken(WIDTH),
    lambda: Quantiles(),
    lambda: Quantiles(resolution=20, exact=100),
    lambda: RowSample(WIDTH, 9),
]


def assert_same_state(a: Statistic, b: Statistic, tolerance: float = 0.0) -> None:
    left, right = a.state(), b.state()
    assert left.keys() == right.keys() and a.count == b.count
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", FACTORIES)
def test_state_survives_safetensors_and_continues(make: Callable[[], Statistic]) -> None:
    through, resumed = make(), make()
    through.update(batch(0))
    resumed.update(batch(0))
    resumed = type(resumed).from_state(load(save(resumed.state())))
    for statistic in (through, resumed):
        statistic.update(batch(1))
    assert_same_state(through, resumed)


@pytest.mark.parametrize("make", FACTORIES)
def test_state_is_a_copy(make: Callable[[], Statistic]) -> None:
    statistic = make()
    statistic.update(batch(0))
    expected = {key: value.clone() for key, value in statistic.state().items()}
    for value in statistic.state().values():
        value.zero_()
    for key, value in statistic.state().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("make", FACTORIES[:6])
def test_merge_equals_feeding_one(make: Callable[[], Statistic]) -> None:
    one, left, right = make(), make(), make()
    for seed in range(4):
        one.update(batch(seed))
        (left if seed < 2 else right).update(batch(seed))
    assert left.merge(right) is left
    assert_same_state(one, left, 1e-12)


@pytest.mark.parametrize("make", FACTORIES)
def test_merge_with_an_empty_one_changes_nothing(make: Callable[[], Statistic]) -> None:
    statistic, other = make(), make()
    statistic.update(batch(0))
    assert_same_state(type(statistic).from_state(statistic.state()).merge(make()), statistic)
    assert_same_state(other.merge(statistic), statistic)


@pytest.mark.parametrize("make", FACTORIES)
def test_merge_leaves_the_other_alone(make: Callable[[], Statistic]) -> None:
    statistic, other = make(), make()
    other.update(batch(0))
    statistic.merge(other)
    before = other.state()
    statistic.update(batch(1))
    for key, value in other.state().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("make", FACTORIES)
def test_wrong_input_is_refused(make: Callable[[], Statistic]) -> None:
    statistic = make()
    if not isinstance(statistic, Quantiles):
        with pytest.raises(DataError, match="shape"):
            statistic.update(torch.zeros(2, 3, WIDTH + 1))
    if not isinstance(statistic, TopToken):
        with pytest.raises(DataError, match="floating-point"):
            statistic.update(torch.zeros(2, 3, WIDTH, dtype=torch.int64))
    with pytest.raises(DataError, match="another statistic"):
        type(statistic).from_state({"nonsense": torch.zeros(1)})


def test_reading_before_data_is_refused() -> None:
    for read in (
        SecondMoment(3).value,
        AbsMax(3).value,
        MeanVariance(3).mean,
        MeanVariance(3).variance,
        TopToken(3).rows,
        lambda: Quantiles().value(0.5),
    ):
        with pytest.raises(DataError, match="no data"):
            read()


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
    with pytest.raises(DataError, match="NaN"):
        Quantiles().update(bad)


def test_widths_must_agree() -> None:
    for make in (SecondMoment, AbsMax, MeanVariance, TopToken):
        with pytest.raises(SettingsError, match="merge"):
            make(3).merge(make(4))
        with pytest.raises(SettingsError, match="at least 1"):
            make(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_second_moment(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_BLOCK_ENTRIES", 1)  # blocks of 256 tokens
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


SHARES = [0.0, 0.001, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0]


def test_quantiles_are_exact_when_few() -> None:
    statistic = Quantiles()
    batches = [batch(seed) for seed in range(3)]
    for x in batches:
        statistic.update(x)
    assert statistic.is_exact
    flat = torch.cat(batches).double().reshape(-1)
    expected = torch.quantile(flat, torch.tensor(SHARES, dtype=torch.float64))
    torch.testing.assert_close(statistic.value(SHARES), expected)
    assert statistic.value(0.5).shape == ()
    single = Quantiles()
    single.update(torch.tensor([3.0]))
    assert single.value(0.2).item() == 3.0


@pytest.mark.parametrize("arrival", ["shuffled", "sorted", "reversed"])
def test_quantiles_of_many_values(arrival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_BLOCK_ENTRIES", 3000)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(60_000, generator=generator).exp() ** 2  # heavy upper tail
    ordered = flat.double().sort().values
    if arrival != "shuffled":
        flat = flat.sort(descending=arrival == "reversed").values
    statistic, other = Quantiles(resolution=500, exact=1000), Quantiles(resolution=500, exact=1000)
    for k, part in enumerate(flat.split(7001)):
        (statistic if k % 2 else other).update(part)
    statistic.merge(other)
    assert not statistic.is_exact and statistic.count == 60_000
    assert len(statistic.state()["values"]) <= 1000
    for share in SHARES:
        rank = torch.searchsorted(ordered, statistic.value(share)).item() / 60_000
        assert abs(rank - share) <= 4 * (share * (1 - share)) ** 0.5 / 500 + 2 / 60_000, share
    assert statistic.value([0.0, 1.0]).tolist() == [ordered[0].item(), ordered[-1].item()]


def test_quantiles_refuse_shares_outside() -> None:
    statistic = Quantiles()
    statistic.update(torch.arange(3.0))
    with pytest.raises(SettingsError, match="between 0 and 1"):
        statistic.value([0.5, 1.5])
    with pytest.raises(SettingsError, match="resolution"):
        Quantiles(resolution=0)


def test_nothing_enters_autograd_and_empty_batches_are_fine() -> None:
    x = batch(0).requires_grad_()
    for make in FACTORIES:
        statistic = make()
        statistic.update(x)
        assert not any(value.requires_grad for value in statistic.state().values())
    for empty in (SecondMoment(3), AbsMax(3), MeanVariance(3), Quantiles()):
        empty.update(torch.zeros(0, 3))
        assert empty.count == 0


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
