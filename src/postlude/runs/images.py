"""Folders of images as what a vision model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.runs.checkpoint import Checkpoint

__all__ = ["image_files", "pixel_values"]

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def image_files(folder: Path, count: int, seed: int) -> list[Path]:
    """``count`` images of a folder and the folders in it, drawn by the seed, in the order of their names.

    Raises:
        DataError: fewer than that.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with images")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _ENDINGS and f.is_file())
    if len(files) < count:
        raise DataError(
            f"{folder} holds {len(files)} images ({', '.join(_ENDINGS)}), and {count} are asked for; give more, or ask "
            "for fewer (--samples)"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(files), generator=generator)[:count].sort().values
    return [files[int(index)] for index in drawn]


def pixel_values(checkpoint: Checkpoint, files: list[Path]) -> Tensor:
    """Images as a vision model reads them, ``[n, channels, height, width]``, fp32.

    By the checkpoint's image processor; a checkpoint without one is given the range [-1, 1] at the size of its
    configuration, as ViT was trained.

    Raises:
        DataError: a file that is no image; it is named.
    """
    from PIL import Image, UnidentifiedImageError

    config: Any = checkpoint.model.config
    mode = "L" if config.num_channels == 1 else "RGB"
    pictures: list[Any] = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(picture.convert(mode))
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            raise DataError(f"{file} cannot be read as an image: {error}") from error
    if checkpoint.processor is not None:
        processed: Tensor = checkpoint.processor(images=pictures, return_tensors="pt")[
            "pixel_values"
        ]
        return processed
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    parts = []
    for picture in pictures:
        scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
        parts.append(values.reshape(height, width, -1).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(parts)
