import math

import pytest
import torch

from postlude.errors import DataError
from postlude.numerics.spectrogram import decibels, spectrogram


def test_a_tone_is_at_its_frequency_and_its_time() -> None:
    rate = 16000
    time = torch.arange(rate) / rate
    sound = torch.sin(2 * math.pi * 1000 * time) * (time > 0.5)
    power = spectrogram(sound, rate)
    assert power.shape == (201, 101)
    assert int(power[:, 75].argmax()) * 40 == 1000
    level = decibels(power)
    assert level.max() == 0 and level.min() == -80
    assert (level[:, :48] == -80).all()


def test_against_a_loop() -> None:
    sound = torch.randn(900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = spectrogram(sound, 8000)
    window = torch.hann_window(200, dtype=torch.float64)
    padded = torch.cat([torch.zeros(100), sound, torch.zeros(100)])
    for at in range(found.shape[1]):
        piece = padded[80 * at : 80 * at + 200] * window
        assert torch.allclose(found[:, at], torch.fft.rfft(piece).abs().square())


def test_silence_and_nothing() -> None:
    assert (decibels(spectrogram(torch.zeros(1000), 8000)) == -80).all()
    with pytest.raises(DataError, match="expected \\[n\\]"):
        spectrogram(torch.zeros(0), 8000)
