"""Change the sampling rate of a signal: band-limited interpolation with a windowed sinc.

    y[m] = sum_k x[k] * c * sinc(c * (t - k)) * window((t - k) / half),    t = m * rate / target

``c`` is the cut-off as a share of the old Nyquist frequency, a little below the lower of the two; the window is
Kaiser's. Weights depend on the fraction of ``t`` only, so each fraction that occurs is computed once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from postlude.errors import SettingsError

__all__ = ["resample"]

_ZEROS = 32  # zero crossings of the sinc on each side
_BETA = 9.0  # of the window: side lobes 90 dB down
_ROLL_OFF = 0.945  # cut-off as a share of the lower Nyquist frequency
_CHUNK = 1 << 14


def resample(signal: Tensor, rate: int, target: int) -> Tensor:
    """A signal at another rate, fp64.

    Args:
        signal: ``[n]``, real.
        rate: its samples per second.
        target: samples per second wanted.

    Returns:
        ``[ceil(n * target / rate)]``; the first sample stays at time 0. What lies outside counts as 0.

    Raises:
        SettingsError: a rate below 1.
    """
    if rate < 1 or target < 1:
        raise SettingsError(
            f"rates are {rate} and {target}; expected samples per second, 1 or more"
        )
    signal = signal.double()
    if rate == target or not len(signal):
        return signal.clone()
    common = math.gcd(rate, target)
    up, down = target // common, rate // common
    cutoff = _ROLL_OFF * min(1.0, target / rate)
    half = _ZEROS / cutoff
    reach = math.ceil(half)
    count = -(-len(signal) * up // down)
    places = torch.arange(count, dtype=torch.int64, device=signal.device) * down
    fractions, which = torch.unique(places % up, return_inverse=True)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64, device=signal.device)
    distance = fractions[:, None] / up - offsets
    inside = (1 - (distance / half) ** 2).clamp(min=0)
    window = torch.special.i0(_BETA * inside.sqrt()) / torch.special.i0(distance.new_tensor(_BETA))
    weights = cutoff * torch.sinc(cutoff * distance) * window * (distance.abs() < half)
    windows = torch.nn.functional.pad(signal, (reach, reach + 1)).unfold(0, 2 * reach + 1, 1)
    first = places // up
    parts = [
        (windows[first[i : i + _CHUNK]] * weights[which[i : i + _CHUNK]]).sum(-1)
        for i in range(0, count, _CHUNK)
    ]
    return torch.cat(parts)
