from __future__ import annotations

import pytest
import scipy.stats
import torch

from postlude.numerics.kurtosis import ChannelKurtosis, row_kurtosis


def sample() -> torch.Tensor:
    x = torch.randn(7, 11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 1] += 1e6  # a channel with a large mean and a small spread
    x[..., 2] = x[..., 2] ** 3
    return x


def test_rows_agree_with_scipy() -> None:
    x = sample()
    expected = scipy.stats.kurtosis(x.numpy(), axis=-1, fisher=False)
    torch.testing.assert_close(row_kurtosis(x), torch.from_numpy(expected))
    one_hot = torch.zeros(1000)
    one_hot[3] = 1e30
    assert float(row_kurtosis(one_hot)) == pytest.approx(1000, rel=0.01)
    assert bool(row_kurtosis(torch.ones(4)).isnan())


def test_channels_agree_with_scipy_however_they_are_split() -> None:
    x = sample()
    expected = torch.from_numpy(
        scipy.stats.kurtosis(x.reshape(-1, 5).numpy(), axis=0, fisher=False)
    )
    whole, left, right = ChannelKurtosis(5), ChannelKurtosis(5), ChannelKurtosis(5)
    whole.update(x)
    for part in x[:3]:
        left.update(part)
    right.update(x[3:])
    right.update(x[:0])
    left.merge(right)
    resumed = ChannelKurtosis.from_state(left.state())
    resumed.merge(ChannelKurtosis(5))
    for statistics in (whole, left, resumed):
        assert statistics.count == 77
        torch.testing.assert_close(statistics.value(), expected, rtol=1e-6, atol=0)
