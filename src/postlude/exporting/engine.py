"""What every target shares: refuse early, write whole or not at all, read again before saying it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from postlude import registry
from postlude.errors import SettingsError
from postlude.runs.atomic import (
    atomic_directory,
    atomic_write,
    check_replaceable,
    check_replaceable_file,
)
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.checksums import finish_weights

__all__ = ["Exporter", "export"]


@dataclasses.dataclass(frozen=True)
class Exporter(ABC):
    """Base of the settings of every target.

    Attributes:
        marker: for targets that are directories, a file that every output has; None for a single file.
        weights: of those, which files get checksums beside them.
    """

    marker: ClassVar[str | None] = None
    weights: ClassVar[str] = "*.safetensors"

    # Ending of the output's name, where others would not be known for what they are.
    ending: ClassVar[str | None] = None

    def for_model(self, checkpoint: Checkpoint) -> Exporter:
        """What writes this checkpoint: itself, unless a format has another shape for another kind of model."""
        return self

    @abstractmethod
    def write(self, checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
        """Write to a path that nobody sees yet; returns what is worth reporting.

        Raises:
            SettingsError: the target cannot hold this checkpoint; says why, and what to export instead.
        """

    @abstractmethod
    def check(self, checkpoint: Checkpoint, out: Path) -> dict[str, float]:
        """Read the output in a fresh process, as its users do, and compare logits; returns what is reported.

        Raises:
            VerificationError: it is another model.
        """


def export(
    checkpoint: Checkpoint,
    settings: Exporter,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    check: bool = True,
) -> dict[str, Any]:
    """Write a checkpoint in another library's format.

    Args:
        checkpoint: float or quantized.
        settings: the target.
        out: a directory, or a file where the target is one.
        overwrite: replace an output that is already there.
        check: read the output again before it takes its place.

    Returns:
        ``output``, ``to``, ``bytes``, what the target reports, and with ``check`` ``reload_max_difference``: of
        any logit, see :mod:`postlude.runs.selfcheck`.

    Raises:
        SettingsError: the target cannot hold this checkpoint, or the name of the output does not end as it must.
        OutputExistsError: ``out`` exists.
        VerificationError: the output, read again, is another model; nothing is left of it.
    """
    writer = settings.for_model(checkpoint)
    _refuse_existing(writer, Path(os.path.realpath(out)), overwrite)
    with _place(writer, out, overwrite) as temporary:
        report = writer.write(checkpoint, temporary)
        if check:
            report |= writer.check(checkpoint, temporary)
    return {
        "output": os.fspath(out),
        "to": registry.info_of(settings).name,
        "bytes": _bytes(Path(out)),
        **report,
    }


@contextlib.contextmanager
def _place(settings: Exporter, out: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    if settings.marker is not None:
        with atomic_directory(out, overwrite, settings.marker) as directory:
            yield directory
            finish_weights(directory, settings.marker, settings.weights)
        return
    Path(out).resolve().parent.mkdir(parents=True, exist_ok=True)
    # A reader may go by the ending of the name, so the file is made in a directory of its own.
    with atomic_write(out) as temporary:
        work = temporary.with_name(temporary.name.removesuffix(".partial") + ".d.partial")
        work.mkdir()
        try:
            made = work / Path(out).name
            yield made
            os.replace(made, temporary)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _refuse_existing(settings: Exporter, out: Path, overwrite: bool) -> None:
    if settings.marker is not None:
        check_replaceable(out, overwrite, settings.marker)
    elif settings.ending is not None and out.suffix.lower() != settings.ending:
        raise SettingsError(
            f"the output is one file, and {out.name} does not end in {settings.ending}: name it "
            f"{out.name}{settings.ending} (-o {out.with_name(out.name + settings.ending)})"
        )
    else:
        check_replaceable_file(out, overwrite)


def _bytes(out: Path) -> int:
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
