from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
from numpy.typing import NDArray

from postlude.errors import DataError, MissingDependencyError, SettingsError
from postlude.zoo.degraded_speech import damage
from postlude.zoo.degraded_speech.columns import RATE

RANDOM = np.random.default_rng
SPEECH = damage.low_pass(RANDOM(0).standard_normal(2 * RATE), 3000.0) / 10


def decibels(ratio: float) -> float:
    return float(10 * np.log10(ratio))


@pytest.mark.parametrize("kind", ["white", "pink", "hum", "babble"])
@pytest.mark.parametrize("snr", damage.STEPS["white"])
def test_noise_has_the_ratio_that_was_asked_for_and_stays_in_its_interval(
    kind: str, snr: float
) -> None:
    others = [SPEECH[i * 3000 : i * 3000 + 8000] for i in range(5)]
    found = damage.add_noise(SPEECH, damage.noise(kind, RATE, RANDOM(1), others), 8000, snr)
    added = found - SPEECH
    ratio = damage.power(SPEECH[8000 : 8000 + RATE]) / damage.power(added[8000 : 8000 + RATE])
    assert decibels(ratio) == pytest.approx(snr, abs=1e-9)
    assert not added[:8000].any() and not added[8000 + RATE :].any()


def test_the_colours_of_noise() -> None:
    def share_below(noise: NDArray[np.float64], bound: float) -> float:
        powers = np.abs(np.fft.rfft(noise)) ** 2
        return float(powers[np.fft.rfftfreq(len(noise), 1 / RATE) < bound].sum() / powers.sum())

    assert share_below(damage.noise("white", RATE, RANDOM(0)), 4000) == pytest.approx(0.5, abs=0.02)
    # A pink spectrum has the same power in each octave: 20 to 400 Hz is half of 20 to 8000.
    assert share_below(damage.noise("pink", RATE, RANDOM(0)), 400) == pytest.approx(0.5, abs=0.06)
    hum = np.abs(np.fft.rfft(damage.noise("hum", RATE, RANDOM(0))))
    strong = np.flatnonzero(hum > 0.01 * hum.max())
    assert set(strong) in ({50 * k for k in range(1, 7)}, {100 * k for k in range(1, 7)})


def test_noise_needs_speech_and_babble_needs_four_voices() -> None:
    with pytest.raises(DataError, match="no speech or no noise"):
        damage.add_noise(np.zeros(100), np.ones(50), 0, 3.0)
    with pytest.raises(SettingsError, match="sum of 4 recordings; 1 are given"):
        damage.noise("babble", 10, RANDOM(0), [SPEECH])


def test_clicks_are_short_and_as_many_as_asked() -> None:
    found = damage.add_clicks(SPEECH, 4000, 4000 + RATE, 5, RANDOM(3))
    added = np.abs(found - SPEECH)
    assert not added[:4000].any() and not added[4000 + RATE :].any()
    starts = np.flatnonzero(np.diff(np.concatenate([[0.0], added])) > 0.2 * np.abs(SPEECH).max())
    assert len(starts) == 5
    assert 0 < (added > 0).sum() <= 5 * RATE // 500


@pytest.mark.parametrize("share", damage.STEPS["clip"])
def test_clipping_cuts_at_a_share_of_the_peak(share: float) -> None:
    found = damage.clip(SPEECH, 1000, 9000, share)
    limit = share * np.abs(SPEECH[1000:9000]).max()
    assert np.abs(found[1000:9000]).max() == pytest.approx(limit)
    inside = np.abs(SPEECH[1000:9000]) <= limit
    np.testing.assert_array_equal(found[1000:9000][inside], SPEECH[1000:9000][inside])
    np.testing.assert_array_equal(found[9000:], SPEECH[9000:])


@pytest.mark.parametrize("bits", damage.STEPS["crush"])
def test_crushing_leaves_so_many_levels(bits: float) -> None:
    found = damage.bit_crush(SPEECH, 1000, 30000, bits)
    assert 2 ** int(bits) // 2 < len(np.unique(np.round(found[1000:30000], 9))) <= 2 ** int(bits)
    step = 2 * np.abs(SPEECH[1000:30000]).max() / (2 ** int(bits) - 1)
    assert np.abs(found - SPEECH).max() <= step / 2 + 1e-12
    np.testing.assert_array_equal(found[:1000], SPEECH[:1000])


@pytest.mark.parametrize("cutoff", damage.STEPS["band"])
def test_a_band_limit_by_its_spectrum(cutoff: float) -> None:
    found = damage.band_limit(SPEECH, 8000, 24000, cutoff)
    inner = found[8200:23800]
    powers = np.abs(np.fft.rfft(inner * np.hanning(len(inner)))) ** 2
    frequencies = np.fft.rfftfreq(len(inner), 1 / RATE)
    high = powers[frequencies > cutoff + 150].mean()
    low = powers[(frequencies > 100) & (frequencies < cutoff - 150)].mean()
    assert decibels(high / low) < -50
    np.testing.assert_array_equal(found[:8000], SPEECH[:8000])
    np.testing.assert_array_equal(found[24000:], SPEECH[24000:])


def test_a_low_pass_leaves_what_is_below() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    found = damage.low_pass(tone, 1500.0)
    np.testing.assert_allclose(found[500:-500], tone[500:-500], atol=2e-3)


@pytest.mark.parametrize("share", damage.STEPS["packets"])
def test_lost_packets_are_silent_where_it_is_said_and_only_there(share: float) -> None:
    for seed in range(5):
        found, parts = damage.drop_packets(SPEECH, 3200, 28800, share, RANDOM(seed))
        silent = np.zeros(len(SPEECH), dtype=bool)
        for start, end in parts:
            assert 3200 <= start < end <= 28800
            silent[start:end] = True
        assert not found[silent].any()
        np.testing.assert_array_equal(found[~silent], SPEECH[~silent])
        assert silent.sum() / 25600 == pytest.approx(share, abs=0.03)
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(parts))


def test_packets_that_sound_are_lost_first() -> None:
    speech = SPEECH.copy()
    speech[: RATE + 8000] = 0
    _, parts = damage.drop_packets(speech, 0, len(speech), 0.1, RANDOM(0))
    assert all(start >= RATE + 7000 for start, _ in parts)


def test_inserted_silence_is_silent_and_moves_the_rest() -> None:
    found = damage.insert_silence(SPEECH, 5000, 4800)
    assert len(found) == len(SPEECH) + 4800 and not found[5000:9800].any()
    np.testing.assert_array_equal(found[: 5000 - 32], SPEECH[: 5000 - 32])
    np.testing.assert_array_equal(found[9800 + 32 :], SPEECH[5000 + 32 :])


@pytest.mark.parametrize("tempo", [0.7, 0.85, 1.2, 1.4])
def test_stretching_moves_times_and_keeps_the_pitch(tempo: float) -> None:
    times = np.arange(2 * RATE) / RATE
    tone = np.sin(2 * np.pi * 200 * times) * (times > 0.5) * (times < 1.5)
    found = damage.stretch(tone, tempo)
    assert len(found) == round(2 * RATE / tempo)
    sounds = np.flatnonzero(np.abs(found) > 0.5)
    assert sounds[0] / RATE == pytest.approx(0.5 / tempo, abs=0.02)
    assert sounds[-1] / RATE == pytest.approx(1.5 / tempo, abs=0.02)
    inner = found[sounds[0] + 2000 : sounds[-1] - 2000]
    powers = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    assert np.fft.rfftfreq(len(inner), 1 / RATE)[powers.argmax()] == pytest.approx(200, abs=3)
    np.testing.assert_array_equal(damage.stretch(tone, 1.0), tone)


@pytest.mark.skipif(shutil.which("sox") is None, reason="no sox on this machine")
def test_gsm_changes_an_interval_and_is_the_same_each_time() -> None:
    found = damage.gsm(SPEECH, 8000, 24000, 2)
    np.testing.assert_array_equal(found, damage.gsm(SPEECH, 8000, 24000, 2))
    np.testing.assert_array_equal(found[:8000], SPEECH[:8000])
    inner, was = found[8200:23800], SPEECH[8200:23800]
    assert 0.5 < np.corrcoef(inner, was)[0, 1] < 0.999


def test_gsm_without_sox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match="apt-get install sox"):
        damage.gsm(SPEECH, 0, 8000, 1)
