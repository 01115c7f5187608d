"""Pictures: read one, fit a network to it, draw it again at any size.

A picture is ``uint8 [height, width, channels]``. Pixels are points of a grid over ``[-1, 1]^2``
(:mod:`postlude.zoo.smn.grid`), values are in ``[0, 1]``. The network sees as many channels as the picture has: one
for grey, a last one for opacity.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from postlude.errors import DataError
from postlude.runs.progress import Progress
from postlude.signals.training import Training, Unit, optimise
from postlude.zoo.smn.grid import points

__all__ = [
    "POINTS",
    "Picture",
    "evaluate",
    "fit",
    "read_picture",
    "render",
    "to_image",
    "write_picture",
]

# Modes of Pillow by channels.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# What other 8-bit modes become; none of them loses anything but what a screen shows as well.
_CONVERSIONS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
# Points that are computed together when nothing is trained.
POINTS = 16_384


@dataclasses.dataclass(frozen=True)
class Picture:
    """Pixels, and what was done to the file's to get them.

    Attributes:
        pixels: ``uint8 [height, width, channels]``, one to four channels.
        notes: sentences for the user, such as that opacity is fitted too.
    """

    pixels: Tensor
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def channels(self) -> int:
        return self.pixels.shape[2]


def read_picture(
    path: str | os.PathLike[str], check: Callable[[int, int, int], None] | None = None
) -> Picture:
    """A picture of any 8-bit format that Pillow reads.

    Args:
        path: the file.
        check: called with width, height and channels before the pixels are decoded; may refuse.

    Raises:
        DataError: no file, no picture, an empty or damaged one, or one of more than 8 bits.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"{file} is {'a directory' if file.is_dir() else 'not there'}; expected a picture."
        )
    if not file.stat().st_size:
        raise DataError(f"{file} is empty (0 bytes); expected a picture.")
    limit = Image.MAX_IMAGE_PIXELS
    try:
        # The size is judged here, by the memory that a fit takes, rather than by Pillow's fixed number.
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(file) as image:
            mode, notes = _mode(image.mode, "transparency" in image.info, file)
            if 0 in image.size:
                raise DataError(
                    f"{file} is a picture of {image.size[0]} x {image.size[1]} pixels: empty."
                )
            if check is not None:
                check(image.width, image.height, len(mode))
            upright = ImageOps.exif_transpose(image)
            if upright.size != image.size:
                notes.append("turned upright as its EXIF data asks")
            raw = bytearray(upright.convert(mode).tobytes())
            width, height = upright.size
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is no picture that Pillow reads: convert it to PNG.") from error
    except (OSError, SyntaxError) as error:
        raise DataError(f"{file} is damaged: {error}. Copy or export it again.") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    pixels = torch.frombuffer(raw, dtype=torch.uint8).reshape(height, width, len(mode))
    return Picture(pixels, tuple(notes))


def _mode(mode: str, transparent: bool, file: Path) -> tuple[str, list[str]]:
    """The mode to fit, and what to say of it."""
    if mode not in MODES.values() and mode not in _CONVERSIONS:
        raise DataError(
            f"{file} has pixels of the kind {mode!r}; expected 8 bits a channel (grey, RGB, with or without "
            "opacity). Convert it first."
        )
    target = _CONVERSIONS.get(mode, mode)
    notes = [f"converted from {mode} to {target}"] if target != mode else []
    if transparent:
        target = {"L": "LA", "RGB": "RGBA"}.get(target, target)
    if len(target) == 1:
        notes.append("one channel: fitted as grey")
    if target.endswith("A"):
        notes.append("opacity (alpha) is fitted as a channel of its own")
    return target, notes


def write_picture(pixels: Tensor, path: str | os.PathLike[str]) -> None:
    """Write ``uint8 [height, width, channels]`` in the format of the path's ending, atomically.

    Raises:
        DataError: Pillow knows no such ending, or the format cannot hold these channels.
    """
    from PIL import Image

    from postlude.runs.atomic import atomic_write

    file = Path(path)
    kind = Image.registered_extensions().get(file.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise DataError(f"{file} has an ending that Pillow cannot write; .png keeps every pixel.")
    file.resolve().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        try:
            to_image(pixels).save(temporary, format=kind)
        except OSError as error:
            raise DataError(
                f"{file} cannot be written: {error}. PNG holds every picture."
            ) from error


def to_image(pixels: Tensor) -> Any:
    """A Pillow image of ``uint8 [height, width, channels]``."""
    from PIL import Image

    height, width, channels = pixels.shape
    return Image.frombytes(MODES[channels], (width, height), bytes(pixels.contiguous().numpy()))


def fit(
    network: nn.Module,
    picture: Picture,
    training: Training,
    *,
    seed: int = 0,
    unit: Unit | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train a network to be a picture, in place; mean squared error of pixels drawn with replacement.

    Args:
        network: ``[n, 2]`` to ``[n, channels]``.
        picture: what to be.
        training: steps, rate, pixels of a step.
        seed: of the pixels drawn.
        unit: keeps finished chunks.
        progress: where to show it.

    Returns:
        The loss of every step.
    """
    device = next(network.parameters()).device
    width, height = picture.size
    flat = picture.pixels.reshape(-1, picture.channels).to(device)
    whole = training.batch >= len(flat)
    grid = points(torch.arange(len(flat)), width, height).to(device) if whole else None

    def loss(step: int, draw: torch.Generator) -> Tensor:
        if grid is not None:
            return functional.mse_loss(network(grid), flat / 255)
        chosen = torch.randint(len(flat), (training.batch,), generator=draw)
        target = flat[chosen.to(device)] / 255
        return functional.mse_loss(network(points(chosen, width, height).to(device)), target)

    return optimise(
        network,
        loss,
        training,
        seed=seed,
        unit=unit,
        progress=progress,
        watch=lambda: f"{evaluate(network, picture):.2f} dB",
    )


def evaluate(network: nn.Module, picture: Picture, progress: Progress | None = None) -> float:
    """PSNR in dB on the pixel grid, before values are rounded to 8 bits; ``progress`` counts parts of the picture."""
    flat = picture.pixels.reshape(-1, picture.channels)
    error = 0.0
    for place, part in _values(network, *picture.size, progress):
        difference = part.double().clamp(0, 1) - flat[place].double() / 255
        error += float(difference.square().sum())
    return -10 * math.log10(error / flat.numel()) if error else math.inf


def render(network: nn.Module, width: int, height: int, progress: Progress | None = None) -> Tensor:
    """The picture that a network is: ``uint8 [height, width, channels]``; ``progress`` counts parts of it."""
    parts = [
        part.clamp(0, 1).mul_(255).round_().to(torch.uint8)
        for _, part in _values(network, width, height, progress)
    ]
    return torch.cat(parts).reshape(height, width, -1)


@torch.no_grad()
def _values(
    network: nn.Module, width: int, height: int, progress: Progress | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """What a network says at every pixel, some at a time: their place, and ``[n, channels]`` on the CPU."""
    device = next(itertools.chain(network.parameters(), network.buffers())).device
    parts: Iterable[int] = range(0, width * height, POINTS)
    if progress is not None:
        parts = progress.iterate(parts, "judge the picture")
    for first in parts:
        place = slice(first, min(first + POINTS, width * height))
        chosen = torch.arange(place.start, place.stop)
        yield place, network(points(chosen, width, height).to(device)).detach().cpu()
