"""A run directory: every finished unit of work is on disk, so a killed run resumes where it stopped.

    manifest.json                   what the run is: model, method, settings, data, seed
    units/NAME@SHA256.safetensors   one finished unit, under the hash of its bytes

A unit's file appears by a rename after it was flushed to the disk, so it is there whole or not at
all; its hash is checked when it is used again. What :meth:`RunDirectory.unit` returns always comes
from the file, so a resumed run computes with the same bits as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from postlude.errors import RunDirectoryError
from postlude.runs.atomic import atomic_write, is_partial, sync_directory
from postlude.runs.checksums import hash_file
from postlude.runs.weights import weight_files

__all__ = ["RunDirectory", "differences", "fingerprint", "run_beside"]

_MANIFEST = "manifest.json"
_UNITS = "units"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")

_log = logging.getLogger(__name__)


class RunDirectory:
    """The directory of one run, made if absent and checked against ``manifest`` if present.

    Args:
        path: the directory.
        manifest: everything that decides the result, as plain JSON values that a person can read:
            the model's :func:`fingerprint`, method, settings, hash of the calibration data, seed,
            version.
        overwrite: start afresh where the directory belongs to another run. Only what a run
            directory consists of is removed.
        elsewhere: what a person gives to take another directory, for messages.

    Raises:
        RunDirectoryError: the directory belongs to another run (every differing key is named), or
            holds something that is no run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        overwrite: bool = False,
        elsewhere: str = "output (-o)",
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self._elsewhere = elsewhere
        # Through JSON and back, so that a tuple equals the list that a later run reads.
        self.manifest: dict[str, Any] = json.loads(json.dumps(manifest, allow_nan=False))
        self._units = self.path / _UNITS
        file = self.path / _MANIFEST
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file; expected a run directory.")
        if file.is_file():
            self._check(file, overwrite)
        elif self.path.is_dir() and any(not is_partial(p) for p in self.path.iterdir()):
            raise RunDirectoryError(
                f"{self.path} is not empty and holds no {_MANIFEST}, so it is not a run directory. "
                f"Choose another {elsewhere}."
            )
        # The manifest comes first: a kill must not leave units of which nobody can tell whose they are.
        self.path.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            self._write_manifest(file)
        self._units.mkdir(exist_ok=True)

    def unit(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a unit of work: read if it is finished, else computed and stored.

        Args:
            name: letters, digits and ``. _ + -``; unique in the run.
            compute: makes the tensors; called at most once, and not at all when the unit is there.

        Returns:
            The stored tensors, on the CPU and contiguous, with exactly the bits of the file.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"unit name {name!r}: expected letters, digits and . _ + -")
        finished = self._finished(name)
        if finished is not None:
            return load_file(finished)
        tensors = _separate(compute())
        with atomic_write(self._units / f"{name}.new") as temporary:
            save_file(tensors, temporary)
        fresh = self._units / f"{name}.new"
        stored = self._units / f"{name}@{hash_file(fresh)}.safetensors"
        os.replace(fresh, stored)
        sync_directory(self._units)
        return load_file(stored)

    def is_finished(self, name: str) -> bool:
        """Whether a whole and undamaged unit of that name is stored."""
        return self._finished(name) is not None

    def finished(self) -> list[str]:
        """The names of the stored units, sorted; their checksums are not verified here."""
        return sorted({f.name.rpartition("@")[0] for f in self._units.glob("*@*.safetensors")})

    def _finished(self, name: str) -> Path | None:
        for file in sorted(self._units.glob(f"{name}@*.safetensors")):
            expected = file.stem.rpartition("@")[2]
            found = hash_file(file)
            if found == expected:
                return file
            _log.warning(
                "%s is damaged (SHA-256 %s..., expected %s...): it is computed again.",
                file,
                found[:12],
                expected[:12],
            )
            file.unlink()
        return None

    def _check(self, file: Path, overwrite: bool) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(
                f"{file} is not valid JSON ({error}): the run directory is damaged. "
                f"Remove it, or choose another {self._elsewhere}."
            ) from error
        here, wanted = _flatten(found), _flatten(self.manifest)
        different = _differing(here, wanted)
        if not different:
            return
        if not overwrite:
            raise RunDirectoryError(
                f"{self.path} belongs to another run:\n"
                + "\n".join(
                    f"  the kept run has {_has(here, key)}, this one {_asks(wanted, key)}"
                    for key in different
                )
                + f"\nStart it afresh with --overwrite (overwrite=True), or choose another {self._elsewhere}."
            )
        # The units go before the manifest changes: a kill in between leaves an older run of which
        # some units are missing, which is still a run directory.
        shutil.rmtree(self._units, ignore_errors=True)
        sync_directory(self.path)
        self._write_manifest(file)

    def _write_manifest(self, file: Path) -> None:
        with atomic_write(file) as temporary:
            text = json.dumps(self.manifest, indent=2, sort_keys=True, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def fingerprint(path: str | os.PathLike[str]) -> str:
    """A SHA-256 over the configuration and the weights of a checkpoint directory, in hexadecimal.

    Two directories have the same fingerprint exactly if those files have the same names and bytes.

    Raises:
        CheckpointError: the weights are absent, incomplete or damaged.
    """
    directory = Path(path)
    digest = hashlib.sha256()
    for file in [directory / "config.json", *weight_files(directory)]:
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as the file format requires."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        if storage in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def run_beside(out: str | os.PathLike[str]) -> Path:
    """Where the finished work of an output is kept until that is written."""
    final = Path(os.path.realpath(out))
    return final.with_name(f".{final.name}.run")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differences(found: Any, expected: Any) -> list[str]:
    """One line per value in which two manifests differ, nested keys joined by dots."""
    here, wanted = _flatten(found), _flatten(expected)
    return [
        f"{key}: found {_show(here, key)}, expected {_show(wanted, key)}"
        for key in _differing(here, wanted)
    ]


def _differing(here: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        key
        for key in sorted(here.keys() | wanted.keys())
        if (key in here) != (key in wanted) or here.get(key) != wanted.get(key)
    ]


def _has(values: dict[str, Any], key: str) -> str:
    return f"{key} {_show(values, key)}" if key in values else f"no {key}"


def _asks(values: dict[str, Any], key: str) -> str:
    return f"asks for {_show(values, key)}" if key in values else "has none"


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"
