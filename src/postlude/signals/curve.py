"""The curve of a codec: PSNR against bytes, beside JPEG and WebP at the same bytes."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.runs.progress import Progress
from postlude.signals.codec import Coding, encode
from postlude.signals.inr import Stored
from postlude.signals.picture import Picture, render, to_image

__all__ = ["CODINGS", "Point", "curve", "peers_at", "stored_psnr"]

# What a curve is made of, by the name of its line.
CODINGS: dict[str, tuple[Coding, ...]] = {
    "nearest": tuple(Coding(bits) for bits in (3, 4, 5, 6, 8, 16)),
    "learned": tuple(Coding(bits, rounding="learned") for bits in (3, 4, 5, 6)),
    "mixed": tuple(Coding(bits, mixed=True) for bits in (3.5, 4.5, 5.5, 6.5)),
    "mixed, learned": tuple(
        Coding(bits, mixed=True, rounding="learned") for bits in (3.5, 4.5, 5.5)
    ),
}
# Pillow's names, and what is passed beside the quality.
PEERS: dict[str, dict[str, object]] = {"JPEG": {"optimize": True}, "WEBP": {"method": 6}}
_QUALITIES = (*range(1, 100, 3), 100)


@dataclasses.dataclass(frozen=True)
class Point:
    """A picture in so many bytes.

    Attributes:
        line: what it belongs to: a rounding, ``JPEG`` or ``WEBP``.
        setting: bits of a weight, or the quality.
        bytes: of the file or directory.
        psnr: in dB, of 8-bit pixels.
    """

    line: str
    setting: float
    bytes: int
    psnr: float


def stored_psnr(stored: Stored, picture: Picture, progress: Progress | None = None) -> float:
    """PSNR in dB of what a file shows, rounded to 8 bits as a picture file is."""
    return _psnr(render(stored.network(), *stored.size, progress), picture.pixels)


def curve(
    network: nn.Module,
    picture: Picture,
    *,
    lines: Iterable[str] = tuple(CODINGS),
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Point]:
    """Points of a fitted network in several codings, and of JPEG and WebP at the same bytes.

    Args:
        network: fitted to the picture.
        picture: what it was fitted to.
        lines: names of ``CODINGS``.
        seed: of learned rounding.
        progress: where to show it.
    """
    found = []
    codings = [(line, coding) for line in lines for coding in CODINGS[line]]
    with progress or Progress(show=False) as shown:
        for line, coding in shown.iterate(codings, "codings"):
            try:
                stored = encode(network, picture, coding, seed=seed)
            except SettingsError:
                continue  # fewer bits than the coarsest grid of this network takes: no such point
            found.append(Point(line, coding.bits, stored.bytes, stored_psnr(stored, picture)))
    return found + peers_at(picture, sorted({point.bytes for point in found}))


def peers_at(picture: Picture, sizes: Sequence[int]) -> list[Point]:
    """JPEG and WebP at the best of every third quality that is no larger; where none is, there is no point.

    A picture with opacity has no JPEG.
    """
    found = []
    for name in PEERS:
        if name == "JPEG" and picture.channels in (2, 4):
            continue
        files = [(quality, *_written(picture, name, quality)) for quality in _QUALITIES]
        for size in sizes:
            fitting = [(psnr, quality, count) for quality, count, psnr in files if count <= size]
            if fitting:
                psnr, quality, count = max(fitting)
                found.append(Point(name, quality, count, psnr))
    # Several sizes may have the same best file.
    return sorted(set(found), key=lambda point: (point.line, point.bytes))


def _written(picture: Picture, name: str, quality: int) -> tuple[int, float]:
    """Bytes and PSNR of a file."""
    from PIL import Image

    buffer = io.BytesIO()
    to_image(picture.pixels).save(buffer, format=name, quality=quality, **PEERS[name])
    size = buffer.tell()
    with Image.open(buffer) as image:
        mode = to_image(picture.pixels[:1, :1]).mode
        raw = bytearray(image.convert(mode).tobytes())
    return size, _psnr(torch.frombuffer(raw, dtype=torch.uint8), picture.pixels.flatten())


def _psnr(found: Tensor, expected: Tensor) -> float:
    error = float((found.double() - expected.double()).square().mean()) / 255**2
    return -10 * math.log10(error) if error else math.inf
