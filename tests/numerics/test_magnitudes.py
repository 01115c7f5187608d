from __future__ import annotations

import math

import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.numerics.magnitudes import MagnitudeHistogram


def test_quantiles_agree_with_sorting_over_many_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-20, 1e-3, 1.0, 7e4, 1e20):
        x = scale * torch.randn(50, 41, generator=generator)
        left, right = MagnitudeHistogram(), MagnitudeHistogram()
        left.update(x[:20])
        right.update(x[20:].double())
        left.merge(right)
        resumed = MagnitudeHistogram.from_state(left.state())
        assert resumed.count == x.numel()
        for q in (0.0, 0.25, 0.5, 0.9, 1.0):
            expected = float(x.abs().double().quantile(q))
            # Beside its resolution the histogram does not interpolate between far neighbours.
            neighbours = x.abs().flatten().sort().values
            rank = q * (x.numel() - 1)
            low = float(neighbours[math.floor(rank)])
            assert resumed.quantile(q) == pytest.approx(low, rel=1.1e-3) or resumed.quantile(
                q
            ) == pytest.approx(expected, rel=1.1e-3)


def test_zeros_and_half_precision() -> None:
    histogram = MagnitudeHistogram()
    histogram.update(torch.zeros(11))
    assert histogram.quantile(0.5) == 0
    histogram.update(torch.full((100,), -3.0, dtype=torch.bfloat16))
    assert histogram.quantile(0.5) == pytest.approx(3, rel=1e-3)


def test_misuse_is_refused() -> None:
    with pytest.raises(DataError, match="call update"):
        MagnitudeHistogram().quantile(0.5)
    with pytest.raises(SettingsError, match="0 to 1"):
        MagnitudeHistogram().quantile(1.5)
