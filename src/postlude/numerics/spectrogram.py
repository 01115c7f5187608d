"""Loudness of a sound over time and frequency."""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.errors import DataError

__all__ = ["decibels", "spectrogram"]


def spectrogram(samples: Tensor, rate: int, window: float = 0.025, hop: float = 0.010) -> Tensor:
    """Power of short pieces of a sound, each under a Hann window and centred on its place.

    Args:
        samples: ``[n]``; beyond its ends there is silence.
        rate: samples a second.
        window: seconds of a piece.
        hop: seconds from one piece to the next.

    Returns:
        ``[F, T]``: frequencies ``0 ... rate/2`` in equal steps, pieces at ``0, hop, 2 hop, ...``.

    Raises:
        DataError: no samples.
    """
    if samples.ndim != 1 or not len(samples):
        raise DataError(
            f"samples have shape {list(samples.shape)}; expected [n] with n of 1 or more"
        )
    size = round(window * rate)
    found = torch.stft(
        samples.double(),
        n_fft=size,
        hop_length=round(hop * rate),
        window=torch.hann_window(size, dtype=torch.float64, device=samples.device),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    return found.abs().square()


def decibels(power: Tensor, floor: float = 80.0) -> Tensor:
    """Power relative to the largest, in dB: from ``-floor`` to 0; silence is ``-floor`` everywhere."""
    largest = power.max().clamp(min=torch.finfo(power.dtype).tiny)
    return (10 * (power / largest).clamp(min=torch.finfo(power.dtype).tiny).log10()).clamp(
        -floor, 0
    )
