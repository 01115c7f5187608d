"""Images as training data and queries: a folder of PNG files, or one file of numbers.

* A folder holds ``.png`` files and, if the model is told classes, ``labels.jsonl``: a line ``{"file": "0001.png",
  "label": 3, "id": "..."}`` for each, in any order; the id may be left out. Without ``labels.jsonl`` the images are
  without a class, in the order of their names.
* A ``.npz`` or ``.safetensors`` file holds ``images [n, channels, height, width]`` (or ``[n, height, width]`` for one
  channel) and perhaps ``labels [n]``: bytes 0 to 255, or floats, which are taken as they are (in [-1, 1] for pixels).
  For a model of latents, that is where encoded images go.
* One ``.png`` is one image, of the class that a ``labels.jsonl`` beside it gives, or without one.

Pixels 0 to 255 become -1 to 1. All images of a set have one size, which must be the model's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from torch import Tensor

from postlude.attribution.data import Data
from postlude.attribution.examples import Collection
from postlude.errors import DataError
from postlude.runs.checkpoint import Checkpoint

__all__ = ["ImageBatch", "ImageExample", "Images"]

_LABELS = "labels.jsonl"
_EXPECTED = "expected a folder of .png files, a .png, .npz or .safetensors file"


@dataclasses.dataclass(frozen=True)
class ImageExample:
    """An image as a denoiser is run on it.

    Attributes:
        id: as given, or its number.
        pixels: ``[channels, height, width]``.
        label: its class; None where it has none.
        count: patches of the model.
        draws: noised versions that a loss is averaged over.
        cut: always 0.
    """

    id: int | str
    pixels: Tensor
    label: int | None
    count: int
    draws: int = 1
    cut: int = 0

    @staticmethod
    def batched(items: Sequence[ImageExample], tokens_per_batch: int) -> list[ImageBatch]:
        """In order; all images have the same size."""
        each = max(1, tokens_per_batch // (items[0].count * items[0].draws))
        found = []
        for start in range(0, len(items), each):
            rows = list(range(start, min(start + each, len(items))))
            labels = [-1 if items[row].label is None else items[row].label for row in rows]
            pixels = torch.stack([items[row].pixels for row in rows])
            found.append(ImageBatch(rows, pixels, torch.tensor(labels), items[0].count))
        return found


@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """Images of one size.

    Attributes:
        rows: position of every image in the list that was batched.
        pixels: fp32 ``[rows, channels, height, width]``.
        labels: ``int64 [rows]``; -1 for no class.
        count: patches of each.
    """

    rows: list[int]
    pixels: Tensor
    labels: Tensor
    count: int

    def __len__(self) -> int:
        return len(self.rows)


class Images(Data):
    """Images and their labels.

    Args:
        source: see the top of this file; or ``(images, labels)`` in memory, floats ``[n, channels, height, width]`` and
            classes ``[n]`` or None.

    Raises:
        DataError: nothing there, an image that cannot be read or differs in size, labels that do not fit.
    """

    kind = "images"

    def __init__(self, source: Any) -> None:
        self.path: Path | None = None
        self._files: list[Path] = []
        self._pixels: Tensor | None = None
        self._ids: list[int | str] | None = None
        self._labels: list[int | None] = []
        if isinstance(source, str | os.PathLike):
            self.path = Path(source)
            self._read(self.path)
        else:
            self._take(source, "the images")
        digest = hashlib.sha256()
        for number in range(len(self)):
            digest.update(json.dumps([self.id(number), self._labels[number]]).encode())
            pixels = self.pixels(number)
            if not bool(pixels.isfinite().all()):
                raise DataError(f"{self.where(number)} holds numbers that are not finite.")
            if tuple(pixels.shape) != self.size:
                raise DataError(
                    f"{self.where(number)} is {_size(tuple(pixels.shape))} and the first image is "
                    f"{_size(self.size)}: expected images of one size. Crop or scale them to it."
                )
            digest.update(pixels.contiguous().numpy().tobytes())
        digest.update(json.dumps(self.size).encode())
        self.hash = digest.hexdigest()

    @classmethod
    def open(cls, source: Any, name: str = "") -> Self:
        return cls(source)

    def __len__(self) -> int:
        return len(self._labels)

    @functools.cached_property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels(0).shape
        return int(channels), int(height), int(width)

    def where(self, number: int) -> str:
        """An image's place, for messages."""
        if self._files:
            return str(self._files[number])
        return f"image {number}" if self.path is None else f"{self.path} image {number}"

    def id(self, number: int) -> int | str:
        return number if self._ids is None else self._ids[number]

    def text(self, number: int) -> str:
        label = self._labels[number]
        words = [] if label is None else [f"label {label}"]
        if self._files:
            words.append(self._files[number].name)
        return ", ".join(words) or f"image {number}"

    def label(self, number: int) -> int | None:
        """The class of an image; None where it has none."""
        return self._labels[number]

    def pixels(self, number: int) -> Tensor:
        """fp32 ``[channels, height, width]``."""
        return (
            _decode(self._files[number]) if self._pixels is None else self._pixels[number].float()
        )

    def picture(self, number: int) -> Tensor | None:
        found = self.pixels(number)
        return found if len(found) in (1, 3) else None

    def check(self, checkpoint: Checkpoint, collection: Collection) -> None:
        config = checkpoint.model.config
        side = config.sample_size
        height, width = side if isinstance(side, Sequence) else (side, side)
        wanted = (int(config.in_channels), int(height), int(width))
        if self.size != wanted:
            channels, height, width = self.size
            advice = "Scale them to that size"
            if channels != wanted[0]:
                advice = (
                    "Make them grey" if (channels, wanted[0]) == (3, 1)
                    else "Give images with as many channels; for a model of latents, encode them with its autoencoder "
                    "and give a .safetensors file"
                )  # fmt: skip
            raise DataError(
                f"{self.path or 'The images'}: images are {_size(self.size)}, and the model takes {_size(wanted)} "
                f"(channels x height x width). {advice}."
            )
        classes = int(getattr(config, "num_embeds_ada_norm", 0) or 0)
        for number, label in enumerate(self._labels):
            if label is not None and not 0 <= label < classes:
                raise DataError(
                    f"{self.where(number)} has the label {label}; the model knows "
                    f"{f'0 to {classes - 1}' if classes else 'no classes'}."
                )

    def examples(
        self,
        checkpoint: Checkpoint,
        collection: Collection,
        start: int = 0,
        stop: int | None = None,
    ) -> list[ImageExample]:
        patch = int(getattr(checkpoint.model.config, "patch_size", 1) or 1)
        _, height, width = self.size
        count = (height // patch) * (width // patch)
        return [
            ImageExample(
                self.id(number), self.pixels(number), self._labels[number], count, collection.draws
            )
            for number in range(start, len(self) if stop is None else stop)
        ]

    def _read(self, path: Path) -> None:
        readers = {".png": self._one, ".npz": self._arrays, ".safetensors": self._arrays}
        if path.is_dir():
            self._folder(path)
        elif not path.is_file():
            raise DataError(f"There is no {path}; {_EXPECTED}.")
        elif path.suffix in readers:
            readers[path.suffix](path)
        else:
            raise DataError(f"{path} holds no images that can be read here; {_EXPECTED}.")

    def _one(self, path: Path) -> None:
        listed = path.parent / _LABELS
        lines = _lines(listed) if listed.is_file() else []
        known = [line.get("label") for line in lines if line["file"] == path.name]
        self._files, self._labels, self._ids = [path], known[:1] or [None], [path.stem]

    def _folder(self, path: Path) -> None:
        found = sorted(path.glob("*.png"))
        if not found:
            raise DataError(f"{path} holds no .png file; {_EXPECTED}.")
        listed = path / _LABELS
        if not listed.is_file():
            self._files, self._labels = found, [None] * len(found)
            self._ids = [one.stem for one in found]
            return
        lines = _lines(listed)
        missing = sorted({one.name for one in found} - {line["file"] for line in lines})
        if missing:
            raise DataError(
                f"{listed} does not list {len(missing)} of {len(found)} files, for example {missing[0]}: list "
                "every image, or take it out of the folder."
            )
        self._files = [path / line["file"] for line in lines]
        self._labels = [line.get("label") for line in lines]
        self._ids = [line.get("id", Path(line["file"]).stem) for line in lines]
        seen: set[int | str] = set()
        for one in self._ids:
            if one in seen:
                raise DataError(f"{listed} gives {one!r} to two images: give each its own id.")
            seen.add(one)

    def _arrays(self, path: Path) -> None:
        try:
            if path.suffix == ".npz":
                with numpy.load(path, allow_pickle=False) as file:
                    arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            else:
                from safetensors.torch import load_file

                arrays = load_file(path)
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
        if "images" not in arrays:
            raise DataError(f"{path} holds {sorted(arrays)}; expected images and perhaps labels.")
        self._take((arrays["images"], arrays.get("labels")), str(path))

    def _take(self, source: Any, name: str) -> None:
        pixels, labels = source if isinstance(source, tuple) else (source, None)
        if not isinstance(pixels, Tensor) or pixels.ndim not in (3, 4) or 0 in pixels.shape:
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise DataError(
                f"{name}: images are {shape}; expected [n, channels, height, width], or [n, height, width]."
            )
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels
        if not pixels.is_floating_point():
            pixels = _spread(pixels)
        self._pixels = pixels
        if labels is None:
            self._labels = [None] * len(pixels)
            return
        labels = torch.as_tensor(labels)
        if tuple(labels.shape) != (len(pixels),) or labels.is_floating_point():
            raise DataError(
                f"{name}: labels are {tuple(labels.shape)} {labels.dtype}; expected {len(pixels)} whole numbers."
            )
        # As in a batch, -1 is no class.
        self._labels = [None if one == -1 else int(one) for one in labels.tolist()]


def _lines(path: Path) -> list[Mapping[str, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not valid JSON: {error}.") from error
        name = record.get("file") if isinstance(record, dict) else None
        plain = isinstance(name, str) and name == Path(name).name
        if not plain or not (path.parent / str(name)).is_file():
            raise DataError(
                f'{path} line {number} names no image: expected "file", a file of this folder, got {name!r}.'
            )
        label = record.get("label")
        if label is not None and (not isinstance(label, int) or isinstance(label, bool)):
            raise DataError(
                f"{path} line {number} has the label {label!r}; expected a class number, or none."
            )
        if not isinstance(record.get("id", ""), int | str):
            raise DataError(
                f"{path} line {number} has the id {record['id']!r}; expected a string or a whole number."
            )
        found.append(record)
    if not found:
        raise DataError(f"{path} lists no image.")
    return found


def _decode(path: Path) -> Tensor:
    # Pillow comes with the libraries that read images; text alone does not need it.
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "RGB", "1", "P"):
                raise DataError(
                    f"{path} has the mode {image.mode}; expected grey or RGB without transparency, 8 bits each."
                )
            wanted = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
            array = numpy.array(image.convert(wanted))
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{path} cannot be read as an image: {error}.") from error
    pixels = torch.from_numpy(array)
    return _spread(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))


def _spread(pixels: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
