from __future__ import annotations

import numpy as np
import pytest
import torch

from postlude.errors import SettingsError
from postlude.numerics.resampling import resample


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 16001])
def test_tones_stay_where_they_are(rate: int) -> None:
    times = np.arange(rate // 2) / rate
    fade = np.hanning(len(times))
    found = resample(torch.from_numpy(np.sin(2 * np.pi * 1700 * times) * fade), rate, 16000).numpy()
    at = np.arange(len(found)) / 16000
    expected = np.sin(2 * np.pi * 1700 * at) * np.interp(at, times, fade)
    assert len(found) == -(-len(times) * 16000 // rate)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_what_the_lower_rate_cannot_hold_is_removed() -> None:
    times = torch.arange(24000, dtype=torch.float64) / 48000
    found = resample(torch.sin(2 * torch.pi * 11000 * times), 48000, 16000)
    assert found[500:-500].abs().max() < 1e-4


def test_against_scipy() -> None:
    signal = pytest.importorskip("scipy.signal")
    noise = np.cumsum(np.random.default_rng(0).standard_normal(4000)) / 50  # little above 3 kHz
    noise *= np.hanning(len(noise))
    expected = signal.resample_poly(noise, 2, 1, window=("kaiser", 12.0))
    found = resample(torch.from_numpy(noise), 8000, 16000).numpy()
    assert np.abs(found - expected)[100:-100].max() < 0.02 * np.abs(noise).max()


def test_edges() -> None:
    signal = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(resample(signal, 7, 7), signal.double())
    assert len(resample(signal[:0], 8000, 16000)) == 0
    with pytest.raises(SettingsError, match="expected samples per second"):
        resample(signal, 0, 16000)
