"""What is done to speech: every function takes samples ``[n]`` at 16 kHz, fp64, and leaves them as they are.

Steps of severity are those of the table :data:`STEPS`, from 1 (slight) to 4 (severe).
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from postlude.errors import DataError, MissingDependencyError, SettingsError
from postlude.zoo.degraded_speech.columns import RATE

__all__ = [
    "STEPS",
    "add_clicks",
    "add_noise",
    "band_limit",
    "bit_crush",
    "clip",
    "drop_packets",
    "gsm",
    "insert_silence",
    "low_pass",
    "noise",
    "power",
    "stretch",
]

Array = NDArray[np.float64]

STEPS: dict[str, tuple[float, float, float, float]] = {
    # dB of speech above the noise, both over the noisy interval
    "white": (25, 15, 8, 2),
    "pink": (25, 15, 8, 2),
    "hum": (25, 15, 8, 2),
    "babble": (25, 15, 8, 2),
    # clicks per second
    "click": (2, 5, 10, 20),
    # share of the interval's peak that is left
    "clip": (0.6, 0.35, 0.2, 0.1),
    # bits for the range between the interval's negative and positive peak
    "crush": (6, 5, 4, 3),
    # Hz; voices end at 3500
    "band": (2400, 1800, 1200, 800),
    # passes through the codec
    "codec": (1, 2, 3, 4),
    # share of packets that are lost
    "packets": (0.05, 0.1, 0.2, 0.4),
}
"""What each kind of damage is asked for at severity 1, 2, 3, 4; the last two and clicks are our choice."""

_TAPS = 301
_FADE = RATE // 200  # 5 ms
_PULSE = RATE // 500  # 2 ms
_PACKETS = (0.02, 0.04, 0.06)  # seconds


def power(samples: Array) -> float:
    """Mean square."""
    return float(np.mean(np.square(samples))) if len(samples) else 0.0


# ----------------------------------------------------------------------------------------------------- noise


def noise(
    kind: str, count: int, random: np.random.Generator, others: Sequence[Array] = ()
) -> Array:
    """``count`` samples of noise of any level.

    Args:
        kind: ``white``, ``pink`` (power falls with frequency, from 20 Hz), ``hum`` (50 or 100 Hz and five overtones),
            or ``babble`` (the sum of four recordings, each from a place of its own and repeated).
        count: samples.
        random: of every draw.
        others: recordings for babble, four or more.
    """
    return _NOISES[kind](count, random, others)


def _white(count: int, random: np.random.Generator, others: Sequence[Array]) -> Array:
    return random.standard_normal(count)


def _pink(count: int, random: np.random.Generator, others: Sequence[Array]) -> Array:
    spectrum = np.fft.rfft(random.standard_normal(count))
    frequencies = np.fft.rfftfreq(count, 1 / RATE)
    return np.fft.irfft(
        spectrum * (frequencies >= 20) / np.sqrt(np.maximum(frequencies, 20)), count
    )


def _hum(count: int, random: np.random.Generator, others: Sequence[Array]) -> Array:
    mains = float(random.choice((50.0, 100.0)))
    times = np.arange(count) / RATE
    phases = random.uniform(0, 2 * np.pi, 6)
    waves = [np.sin(2 * np.pi * mains * k * times + phases[k - 1]) / k for k in range(1, 7)]
    return np.sum(waves, axis=0)


def _babble(count: int, random: np.random.Generator, others: Sequence[Array]) -> Array:
    if len(others) < 4:
        raise SettingsError(f"babble is the sum of 4 recordings; {len(others)} are given")
    total = np.zeros(count)
    for index in random.choice(len(others), 4, replace=False):
        voice = others[int(index)]
        start = int(random.integers(len(voice)))
        total += np.resize(np.roll(voice, -start), count) / np.sqrt(power(voice))
    return total


_NOISES = {"white": _white, "pink": _pink, "hum": _hum, "babble": _babble}


def add_noise(samples: Array, added: Array, start: int, snr: float) -> Array:
    """Add noise ``[m]`` from a sample on, so loud that the speech under it has ``snr`` dB more power.

    Raises:
        DataError: speech or noise is silent there.
    """
    under = samples[start : start + len(added)]
    if not power(under) or not power(added):
        raise DataError("there is no speech or no noise in the interval, so no ratio of the two")
    scale = np.sqrt(power(under) / power(added) / 10 ** (snr / 10))
    out = samples.copy()
    out[start : start + len(added)] += scale * added
    return out


def add_clicks(
    samples: Array, start: int, end: int, per_second: float, random: np.random.Generator
) -> Array:
    """Add pulses that die out within 2 ms, 0.4 to 0.8 times as high as the speech's peak, one at the least."""
    out = samples.copy()
    count = max(1, round(per_second * (end - start) / RATE))
    places = random.choice(np.arange(start, end - _PULSE), min(count, end - start - _PULSE), False)
    heights = random.uniform(0.4, 0.8, len(places)) * random.choice((-1, 1), len(places))
    pulse = np.exp(-np.arange(_PULSE) / (_PULSE / 5))
    for place, height in zip(places, heights * np.abs(samples).max(), strict=True):
        out[place : place + _PULSE] += height * pulse
    return out


# ------------------------------------------------------------------------------------------------ distortions


def clip(samples: Array, start: int, end: int, share: float) -> Array:
    """Cut off what is beyond a share of the interval's peak."""
    out = samples.copy()
    limit = share * np.abs(out[start:end]).max()
    out[start:end] = np.clip(out[start:end], -limit, limit)
    return out


def bit_crush(samples: Array, start: int, end: int, bits: float) -> Array:
    """Round to ``2**bits`` levels between the interval's peak and its negative."""
    out = samples.copy()
    peak = np.abs(out[start:end]).max()
    levels = 2 ** int(bits) - 1
    if peak:
        out[start:end] = (
            np.round((out[start:end] / peak + 1) / 2 * levels) / levels * 2 * peak - peak
        )
    return out


def low_pass(samples: Array, cutoff: float) -> Array:
    """Remove what is above a frequency in Hz, by a symmetric filter of 301 taps; 60 dB down 120 Hz above it."""
    steps = np.arange(_TAPS) - _TAPS // 2
    taps = 2 * cutoff / RATE * np.sinc(2 * cutoff / RATE * steps) * np.kaiser(_TAPS, 5.65)
    length = len(samples) + _TAPS - 1
    size = 1 << (length - 1).bit_length()
    spectrum = np.fft.rfft(samples, size) * np.fft.rfft(taps / taps.sum(), size)
    return np.fft.irfft(spectrum, size)[_TAPS // 2 : _TAPS // 2 + len(samples)]


def band_limit(samples: Array, start: int, end: int, cutoff: float) -> Array:
    """Remove what is above a frequency in Hz between two samples."""
    return _blend(samples, low_pass(samples, cutoff), start, end)


def gsm(samples: Array, start: int, end: int, passes: float) -> Array:
    """Send an interval through GSM 06.10 at 8 kHz, so many times, with sox.

    Raises:
        MissingDependencyError: there is no sox.
    """
    peak = np.abs(samples).max()
    raw = ("-t", "raw", "-e", "signed", "-b", "16", "-c", "1", "-r", str(RATE))
    coded = ("-t", "gsm", "-r", "8000", "-c", "1")
    data = np.round(samples / peak * 16384).astype("<i2").tobytes()
    try:
        for _ in range(int(passes)):
            # -D: without dither, which is drawn anew each time; -R: nothing else is.
            for given, wanted in ((raw, coded), (coded, raw)):
                command = ["sox", "-D", "-R", *given, "-", *wanted, "-"]
                data = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise MissingDependencyError(
            "codecs need sox: apt-get install sox, or leave --codecs out"
        ) from error
    except subprocess.CalledProcessError as error:
        raise DataError(f"sox failed: {error.stderr.decode(errors='replace').strip()}") from error
    out = np.frombuffer(data, "<i2")[: len(samples)] / 16384 * peak
    return _blend(samples, np.pad(out, (0, len(samples) - len(out))), start, end)


def _blend(samples: Array, other: Array, start: int, end: int) -> Array:
    """``other`` between two samples, faded in and out within them except at the ends of the clip."""
    share = np.zeros(len(samples))
    share[start:end] = 1
    ramp = np.linspace(0, 1, min(_FADE, (end - start) // 2))
    if start > 0:
        share[start : start + len(ramp)] = ramp
    if end < len(samples):
        share[end - len(ramp) : end] = ramp[::-1]
    return samples + share * (other - samples)


# ------------------------------------------------------------------------------------------------------- time


def drop_packets(
    samples: Array, start: int, end: int, share: float, random: np.random.Generator
) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """Zero a share of the packets between two samples, of 20, 40 or 60 ms each; at least one.

    Packets that sound are lost first, since nobody hears that silence is lost.

    Returns:
        samples, and the silent intervals, neighbours joined.
    """
    length = round(float(random.choice(_PACKETS)) * RATE)
    slots = np.arange(start, end - length + 1, length)
    lost = max(1, round(share * len(slots)))
    loud = np.array([power(samples[slot : slot + length]) for slot in slots])
    quiet = loud < 0.05 * loud.mean()
    order = random.permutation(len(slots))
    order = order[np.argsort(quiet[order], kind="stable")]
    out = samples.copy()
    parts: list[tuple[int, int]] = []
    for slot in sorted(int(s) for s in slots[order[:lost]]):
        out[slot : slot + length] = 0
        if parts and parts[-1][1] == slot:
            parts[-1] = (parts[-1][0], slot + length)
        else:
            parts.append((slot, slot + length))
    return out, tuple(parts)


def insert_silence(samples: Array, place: int, count: int) -> Array:
    """Insert ``count`` zeros; the speech fades out and in over 2 ms on both sides, so that nothing clicks."""
    before, after = samples[:place].copy(), samples[place:].copy()
    ramp = np.linspace(0, 1, _PULSE)
    before[max(0, place - _PULSE) :] *= ramp[::-1][: min(_PULSE, place)]
    after[:_PULSE] *= ramp[: len(after[:_PULSE])]
    return np.concatenate([before, np.zeros(count), after])


def stretch(samples: Array, tempo: float) -> Array:
    """Speak ``tempo`` times as fast at the same pitch: WSOLA, overlap-add of similar frames (Verhelst, Roelands 1993).

    Returns:
        ``[round(n / tempo)]``; time ``t`` becomes ``t / tempo``.
    """
    if tempo == 1:
        return samples.copy()
    frame, hop, reach = 512, 256, 128
    count = round(len(samples) / tempo)
    window = np.hanning(frame + 1)[:frame]
    padded = np.pad(samples, (frame + reach, 2 * frame + reach))
    out, weight = np.zeros(count + 2 * frame), np.zeros(count + 2 * frame)
    follow = None
    for place in range(0, count + frame, hop):
        # Frames are centred on the times that they stand for.
        centre = min(round((place - hop) * tempo), len(samples)) + frame + reach
        start = centre
        if follow is not None:
            region = padded[centre - reach : centre + reach + frame]
            target = padded[follow : follow + frame]
            start = centre - reach + int(np.argmax(np.correlate(region, target, "valid")))
        out[place : place + frame] += window * padded[start : start + frame]
        weight[place : place + frame] += window
        follow = min(start + hop, len(padded) - frame)
    return (out / np.maximum(weight, 1e-3))[hop : hop + count]
