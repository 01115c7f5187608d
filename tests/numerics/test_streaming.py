"""What every streaming statistic promises, whichever it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save

from postlude.errors import DataError, SettingsError
from postlude.numerics.kurtosis import ChannelKurtosis
from postlude.numerics.magnitudes import MagnitudeHistogram
from postlude.numerics.moments import AbsMax, MeanVariance, RowSample, SecondMoment, TopToken
from postlude.numerics.streaming import Statistic

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
    lambda: ChannelKurtosis(WIDTH),
    lambda: MagnitudeHistogram(),
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


@pytest.mark.parametrize("make", FACTORIES[:-1])
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
    if not isinstance(statistic, MagnitudeHistogram):
        with pytest.raises(DataError, match="shape"):
            statistic.update(torch.zeros(2, 3, WIDTH + 1))
    if not isinstance(statistic, TopToken | MagnitudeHistogram):
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
        ChannelKurtosis(3).value,
    ):
        with pytest.raises(DataError, match="no data"):
            read()


def test_widths_must_agree() -> None:
    for make in (SecondMoment, AbsMax, MeanVariance, TopToken, ChannelKurtosis):
        with pytest.raises(SettingsError, match="merge"):
            make(3).merge(make(4))
        with pytest.raises(SettingsError, match="at least 1"):
            make(0)


def test_nothing_enters_autograd_and_empty_batches_are_fine() -> None:
    x = batch(0).requires_grad_()
    for make in FACTORIES:
        statistic = make()
        statistic.update(x)
        assert not any(value.requires_grad for value in statistic.state().values())
    for empty in (
        SecondMoment(3),
        AbsMax(3),
        MeanVariance(3),
        ChannelKurtosis(3),
        MagnitudeHistogram(),
    ):
        empty.update(torch.zeros(0, 3))
        assert empty.count == 0
