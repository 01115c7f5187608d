"""A picture into the weights of a small network, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from torch import Tensor

import postlude
from postlude import registry
from postlude._front_door.opening import Path_
from postlude.errors import InputError, SettingsError
from postlude.runs.atomic import atomic_write, check_replaceable, discard
from postlude.runs.directory import RunDirectory, run_beside
from postlude.runs.progress import Progress
from postlude.signals.codec import Coding, encode
from postlude.signals.curve import Point, curve, stored_psnr
from postlude.signals.inr import CONFIG, Stored, open_inr
from postlude.signals.memory import check_memory
from postlude.signals.picture import Picture, evaluate, read_picture, to_image, write_picture
from postlude.signals.picture import fit as _fit
from postlude.signals.picture import render as _render
from postlude.signals.training import Training
from postlude.zoo.smn.networks import build
from postlude.zoo.smn.settings import NetworkSettings

__all__ = ["Fitted", "fit", "render"]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A picture in a network, as it is stored.

    Attributes:
        stored: the file; :meth:`Stored.save` writes it, :meth:`Stored.network` gives the network.
        psnr_float: in dB, of the network before it was rounded.
        psnr: in dB, of what the file shows in 8-bit pixels.
        memory: bytes that the fit was predicted to take.
        notes: what was done to the picture.
        points: of the curve, where one was asked for.
    """

    stored: Stored
    psnr_float: float
    psnr: float
    memory: int
    notes: tuple[str, ...]
    points: tuple[Point, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What the command line prints."""
        settings, made_by = self.stored.settings, self.stored.config["made_by"]
        width, height = self.stored.size
        return {
            "network": settings.name,
            "width": settings.width,
            "numbers": settings.numbers,
            "size": [width, height],
            "channels": settings.out_features,
            "steps": made_by["steps"],
            "psnr_float": self.psnr_float,
            "psnr": self.psnr,
            "bits": self.stored.config["bits"],
            "bytes": self.stored.bytes,
            "bits_per_pixel": 8 * self.stored.bytes / (width * height),
            "predicted_memory": self.memory,
            "notes": list(self.notes),
        }


def fit(
    picture: Path_ | Picture,
    model: str | NetworkSettings = "smn",
    *,
    width: int | None = None,
    training: Training | None = None,
    coding: Coding | None = None,
    seed: int = 0,
    out: Path_ | None = None,
    overwrite: bool = False,
    html: Path_ | None = None,
    command: str = "",
    device: str | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit a network to a picture and store it in few bits.

    Args:
        picture: a file that Pillow reads, or pixels.
        model: a network of ``postlude methods --verb fit``, or its settings.
        width: of its hidden layers; that of the settings (128 for a name) otherwise.
        training: steps, pixels of a step, rate; the network's own rate for 2000 steps otherwise.
        coding: how weights are stored; 8 bits, rounded to nearest, otherwise.
        seed: of weights and pixels drawn.
        out: an ``.inr`` directory to write. Until it is whole, finished steps are kept beside it (``.NAME.run``): the
            same call after a kill resumes from them and ends with the same bits.
        overwrite: replace ``out``, and start a run of something else afresh.
        html: also write a page with the curve of PSNR against bytes here.
        command: to be shown on that page.
        device: to compute on; the CPU otherwise.
        progress: where to show it.

    Raises:
        DataError: no picture, an empty or damaged one, or one of more than 8 bits a channel.
        SettingsError: settings that the network cannot do, or more memory than there is.
        OutputExistsError: ``out`` exists.
        RunDirectoryError: what is kept beside it belongs to another fit.
    """
    settings = _settings(model, width)
    training = training or Training(learning_rate=settings.learning_rate)
    coding = coding or Coding()
    if out is not None:
        check_replaceable(Path(os.path.realpath(out)), overwrite, CONFIG)
    shown = progress or Progress(show=False)
    memory = 0

    def check(across: int, down: int, channels: int) -> None:
        nonlocal memory
        memory = check_memory(_for_channels(settings, channels), across, down, training.batch)
        shown.log(f"{across} x {down} pixels, about {memory / 2**20:.0f} MiB of memory")

    if isinstance(picture, Picture):
        seen = picture
        check(*seen.size, seen.channels)
    else:
        seen = read_picture(picture, check)
    for note in seen.notes:
        shown.log(note)
    network = build(_for_channels(settings, seen.channels), seed).to(device or "cpu")
    kept = (
        None
        if out is None
        else _kept(out, network.settings, training, seen, seed, device, overwrite)
    )
    unit = kept.unit if kept is not None else None
    if kept is not None and kept.finished():
        shown.log(f"resuming: {len(kept.finished())} finished parts in {kept.path}")
    try:
        with shown:
            _fit(network, seen, training, seed=seed, unit=unit, progress=shown)
            made_by = {"postlude": postlude.__version__, "steps": training.steps, "seed": seed}
            stored = encode(network, seen, coding, made_by=made_by, seed=seed, progress=shown)
            points = curve(network, seen, seed=seed, progress=shown) if html is not None else []
            quality = evaluate(network, seen, shown), stored_psnr(stored, seen, shown)
    except InputError:
        # The same call would fail again, and another one is another run.
        if out is not None:
            discard(run_beside(out), out)
        raise
    fitted = Fitted(
        stored,
        *quality,
        memory,
        seen.notes,
        tuple(points),
    )
    if out is not None:
        stored.save(out, overwrite)
    if html is not None:
        _write_page(html, fitted, seen, command)
    if out is not None:
        discard(run_beside(out), out)
    return fitted


def render(
    inr: Path_ | Stored, out: Path_ | None = None, *, scale: float = 1.0, device: str | None = None
) -> Tensor:
    """Draw the picture that an ``.inr`` holds.

    Args:
        inr: a directory, or what :func:`fit` stored.
        out: a file to write; its ending says the format.
        scale: size against that of the fitted picture: 2 computes a pixel between every two.
        device: to compute on; the CPU otherwise.

    Returns:
        ``uint8 [height, width, channels]``.

    Raises:
        CheckpointError: not an ``.inr`` directory, or a damaged one.
        SettingsError: a scale that leaves no pixel.
        DataError: ``out`` has an ending that Pillow cannot write.
    """
    stored = inr if isinstance(inr, Stored) else open_inr(inr)
    if not 0 < scale <= 64:
        raise SettingsError(f"scale is {scale:g}; expected above 0 and at most 64")
    width, height = (max(1, round(side * scale)) for side in stored.size)
    pixels = _render(stored.network().to(device or "cpu"), width, height)
    if out is not None:
        write_picture(pixels, out)
    return pixels


def _settings(model: str | NetworkSettings, width: int | None) -> NetworkSettings:
    settings = model
    if isinstance(settings, str):
        settings = registry.find("fit", settings).settings(width=128 if width is None else width)
    if not isinstance(settings, NetworkSettings):
        raise SettingsError(
            f"fit takes the name or the settings of a network, got {type(model).__name__}"
        )
    return settings if width is None else dataclasses.replace(settings, width=width)


def _for_channels(settings: NetworkSettings, channels: int) -> NetworkSettings:
    if settings.in_features != 2:
        raise SettingsError(
            f"a picture has 2 coordinates, and these settings of {settings.name} have {settings.in_features}"
        )
    return dataclasses.replace(settings, out_features=channels)


def _kept(
    out: Path_,
    settings: Any,
    training: Training,
    picture: Picture,
    seed: int,
    device: str | None,
    overwrite: bool,
) -> RunDirectory:
    """Beside the output: everything that decides the fitted weights. Their coding is quick and comes after."""
    manifest = {
        "postlude": postlude.__version__,
        "verb": "fit",
        "network": settings.name,
        "settings": dataclasses.asdict(settings),
        "training": dataclasses.asdict(training),
        "picture": hashlib.sha256(picture.pixels.numpy().tobytes()).hexdigest(),
        "device": device or "cpu",
        "seed": seed,
    }
    return RunDirectory(run_beside(out), manifest, overwrite=overwrite)


def _write_page(html: Path_, fitted: Fitted, picture: Picture, command: str) -> None:
    from postlude.report.signals import render as page

    shown = {
        "the picture": picture.pixels,
        f"the network in {fitted.stored.bytes:,} bytes": render(fitted.stored),
    }
    pictures = {}
    for name, pixels in shown.items():
        buffer = io.BytesIO()
        to_image(pixels).save(buffer, format="PNG")
        pictures[name] = buffer.getvalue()
    points = [dataclasses.asdict(point) for point in fitted.points]
    with atomic_write(html) as temporary:
        temporary.write_text(page(fitted.to_dict(), points, pictures, command), encoding="utf-8")
