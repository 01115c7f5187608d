"""Calibration data for a model of any kind."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor

from postlude._front_door.text import CALIBRATION_SAMPLES, Text, calibration_tokens
from postlude.errors import DataError
from postlude.quantization.engine import Unit
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.images import image_files, pixel_values
from postlude.runs.progress import Progress
from postlude.runs.weights import read_header
from postlude.surgery.batches import Batch, Calibration, in_batches, joined

__all__ = ["Calibrating", "Data"]

# Text, a folder of images, a file of inputs, or batches of keyword arguments of the model's forward.
Data = Text | Sequence[Batch]
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Calibrating:
    """Where calibration data comes from.

    Attributes:
        checkpoint: the float model.
        data: as given; None for a denoiser that samples its own inputs.
        samples: how many sequences, inputs or images.
        length: of a sequence.
        spread: over timesteps, of the inputs that a denoiser samples: ``uniform`` or ``skewed``.
        seed: of every random choice.
    """

    checkpoint: Checkpoint
    data: Data | None = None
    samples: int = CALIBRATION_SAMPLES
    length: int | None = None
    spread: str = "uniform"
    seed: int = 0

    def read(self, unit: Unit, progress: Progress | None = None) -> Calibration | None:
        """The data; None where there is none to be had.

        Args:
            unit: keeps what the model had to compute, see :class:`postlude.runs.directory.RunDirectory`.
            progress: where to show it.

        Raises:
            DataError: data that does not suit the model.
        """
        if self.data is not None:
            return self._given
        return self._own(unit, progress) if self.checkpoint.kind == "diffusion" else None

    def manifest(self) -> Any:
        """What decides the data, for a run directory."""
        if self.data is None:
            own = {"own": True, "samples": self.samples, "spread": self.spread}
            return own if self.checkpoint.kind == "diffusion" else None
        digest = hashlib.sha256()
        for tensor in _tensors(self._given):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _given(self) -> Calibration:
        checkpoint, data = self.checkpoint, self.data
        batches = _batches(data)
        if checkpoint.reads_tokens:
            if batches:
                raise DataError("a language model is calibrated on text; batches are for others")
            text = cast(Text, data)
            return calibration_tokens(checkpoint, text, self.samples, self.length, self.seed)
        if batches:
            return batches
        if not isinstance(data, str | os.PathLike):
            raise DataError(
                f"a {checkpoint.kind} model is calibrated on a path, or on a list of its forward's keyword arguments; "
                f"got a {type(data).__name__}"
            )
        path = Path(data)
        if path.suffix == ".safetensors" and path.is_file():
            return self._stored(path)
        if checkpoint.kind == "vision":
            return self._images(path)
        raise DataError(
            f"{path} is no calibration data of a denoiser: expected a .safetensors file with its inputs (one row "
            "each), or nothing, for inputs that the model samples itself"
        )

    def _stored(self, path: Path) -> list[Batch]:
        read_header(path)
        tensors = load_file(path)
        model = self.checkpoint.model
        known = inspect.signature(model.forward).parameters
        unknown = sorted(tensors.keys() - known.keys())
        if unknown or not tensors:
            raise DataError(
                f"{path} holds {', '.join(unknown) or 'nothing'}; expected arguments of a "
                f"{type(model).__name__}: {', '.join(known)}"
            )
        return in_batches(tensors, _BATCH)

    def _images(self, path: Path) -> list[Batch]:
        if isinstance(getattr(self.checkpoint.model.config, "pose", None), dict):
            from postlude.zoo.fastpose_vit.data import holds_poses
            from postlude.zoo.fastpose_vit.training import calibration_crops

            # A pose network sees crops, which a set with labels has.
            if holds_poses(path):
                crops = calibration_crops(self.checkpoint.model, path, self.samples, self.seed)
                return in_batches({"pixel_values": crops}, _BATCH)
        files = image_files(path, self.samples, self.seed)
        return in_batches({"pixel_values": pixel_values(self.checkpoint, files)}, _BATCH)

    def _own(self, unit: Unit, progress: Progress | None) -> list[Batch]:
        checkpoint = self.checkpoint
        if "encoder_hidden_states" in inspect.signature(checkpoint.model.forward).parameters:
            raise DataError(
                f"a {type(checkpoint.model).__name__} draws what a text describes, so it cannot sample its own "
                "calibration data: give inputs that were recorded while it ran in its pipeline (--calibration "
                "FILE.safetensors, one row of each argument of its forward per input)"
            )
        from postlude.sampling.denoiser_inputs import denoiser_inputs

        def compute() -> Mapping[str, Tensor]:
            inputs = denoiser_inputs(
                checkpoint, self.samples, spread=self.spread, seed=self.seed, progress=progress
            )
            return joined(inputs)

        return in_batches(unit("calibration", compute), _BATCH)


def _batches(data: Data | None) -> list[Batch]:
    if isinstance(data, str | os.PathLike) or data is None:
        return []
    return [batch for batch in data if isinstance(batch, Mapping)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for key in sorted(value) for tensor in _tensors(value[key])]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
