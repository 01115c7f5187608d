"""A tensor store: rows of named tensors in shards that are added, checked and mapped, and never changed.

    manifest.json                        what the store holds and how its rows are cut into shards
    shards/00003@SHA256.safetensors      one finished shard under the hash of its bytes
    shards.json                          written last: every shard with its hash, size and rows, and the hash of
                                         the manifest

A shard appears by a rename after it was flushed to the disk, so it is there whole or not at all; a killed
build looks at what is there and goes on with the rest. Shards do not depend on who writes them, so any number of
processes may fill one store as long as no two write the same shard at a time. Every tensor of a shard is
contiguous in its file and is read through a memory map: a pass over one tensor reads that tensor's bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from postlude.errors import NoSpaceError, StoreError
from postlude.runs.atomic import atomic_write, is_full, is_partial, sync_directory
from postlude.runs.checksums import hash_file
from postlude.runs.directory import differences

__all__ = ["Damage", "Shard", "TensorStore"]

VERSION = 1
_FORMAT = "postlude tensor store"
_MANIFEST, _LIST, _SHARDS = "manifest.json", "shards.json", "shards"
_FILE = re.compile(r"(\d{5,})@([0-9a-f]{64})\.safetensors")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is wrong with one shard."""

    shard: int
    file: str
    reason: str


class Shard:
    """A finished shard, mapped when its first tensor is asked for.

    Attributes:
        number: from 0.
        start, stop: rows of the store.
        file, sha256, bytes: of its file.
    """

    def __init__(
        self, number: int, start: int, stop: int, file: Path, sha256: str, size: int
    ) -> None:
        self.number, self.start, self.stop = number, start, stop
        self.file, self.sha256, self.bytes = file, sha256, size
        self._map: Any = None

    def __len__(self) -> int:
        return self.stop - self.start

    def names(self) -> list[str]:
        """The names of its tensors, sorted."""
        return sorted(self._open().keys())

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file, ``[rows, ...]``; not to be written to.

        Raises:
            StoreError: no tensor of that name, or a file that is not what was written.
        """
        try:
            found: Tensor = self._open().get_tensor(name)
        except SafetensorError as error:
            raise StoreError(
                f"{self.file} cannot give {name!r}: {error}; verify the store"
            ) from error
        if len(found) != len(self):
            raise StoreError(
                f"{self.file} holds {len(found)} rows of {name!r}, expected {len(self)}: it is damaged; "
                "run the same build command again, which makes this shard alone anew"
            )
        return found

    def damage(self) -> Damage | None:
        """Read the whole file and compare its hash."""
        if not self.file.is_file():
            return Damage(self.number, self.file.name, "the file is missing")
        size = self.file.stat().st_size
        if size != self.bytes:
            reason = f"the file has {size} bytes, expected {self.bytes}"
            return Damage(self.number, self.file.name, reason)
        found = hash_file(self.file)
        if found == self.sha256:
            return None
        reason = f"its SHA-256 is {found[:12]}..., expected {self.sha256[:12]}..."
        return Damage(self.number, self.file.name, reason)

    def _open(self) -> Any:
        if self._map is None:
            try:
                self._map = safe_open(self.file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise StoreError(
                    f"{self.file} cannot be read ({error}): it is damaged or missing; run the same build "
                    "command again, which makes this shard alone anew"
                ) from error
        return self._map


class TensorStore:
    """The directory of one store.

    :meth:`create` starts or resumes one, :meth:`open` reads a finished one.

    Attributes:
        path: the directory.
        manifest: what the store holds, as it was given.
        rows: number of rows of each shard.
        complete: whether every shard is there and the list is written.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], rows: list[int], kind: str) -> None:
        self.path, self.manifest, self.rows, self.kind = path, manifest, rows, kind
        self._folder = path / _SHARDS
        self._starts = list(itertools.accumulate(rows, initial=0))
        self._shards: list[Shard] | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        rows: Sequence[int],
        *,
        kind: str = "tensors",
        overwrite: bool = False,
    ) -> Self:
        """Start a store, or go on with one of the same manifest.

        Args:
            path: the directory; absent, empty, or this very store.
            manifest: everything that decides the content, as plain JSON values.
            rows: of each shard.
            kind: what such a store is called in messages.
            overwrite: start afresh where another store is; only what a store consists of is removed.

        Raises:
            StoreError: the directory holds something else, or another store (every differing key is named).
        """
        directory = Path(os.path.realpath(path))
        body = _body(manifest, rows, kind)
        file = directory / _MANIFEST
        if directory.exists() and not directory.is_dir():
            raise StoreError(f"{directory} is a file; expected a directory for the {kind}.")
        if file.is_file():
            found = _read_json(file, kind)
            different = differences(found, body)
            if different and not overwrite:
                shown = different[:12]
                raise StoreError(
                    f"{directory} holds another {kind}:\n"
                    + "\n".join(f"  {line}" for line in shown)
                    + (f"\n  and {len(different) - 12} more" if len(different) > 12 else "")
                    + "\nStart it afresh with --overwrite (overwrite=True), or choose another output (-o)."
                )
            if different or overwrite:
                _remove(directory)
            # Also where it says the same in other bytes: the list knows it by its hash.
            if file.read_bytes() != _as_bytes(body):
                _write_json(file, body)
        elif directory.is_dir() and any(not is_partial(one) for one in directory.iterdir()):
            raise StoreError(
                f"{directory} is not empty and holds no {_MANIFEST}, so it is no {kind}. "
                "Choose another output (-o)."
            )
        else:
            # The manifest comes first: a kill must not leave shards of which nobody can tell whose they are.
            directory.mkdir(parents=True, exist_ok=True)
            _write_json(file, body)
        (directory / _SHARDS).mkdir(exist_ok=True)
        return cls(directory, body["content"], list(body["rows"]), kind)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, kind: str = "tensors") -> Self:
        """A finished store. The manifest, and sizes and names of the shards, are checked; :meth:`verify` reads them.

        Raises:
            StoreError: not a store of this kind, of another version, unfinished, damaged, or with a manifest that was
                changed after the build.
        """
        directory = Path(os.path.realpath(path))
        file = directory / _MANIFEST
        if not file.is_file():
            raise StoreError(f"{path} holds no {kind}: there is no {_MANIFEST} in it.")
        body = _read_json(file, kind)
        if body.get("format") != _FORMAT or body.get("kind") != kind:
            raise StoreError(
                f"{file} describes {body.get('kind') or body.get('format') or 'something else'!r}; "
                f"expected {kind!r}, written by Postlude."
            )
        if body.get("version") != VERSION:
            raise StoreError(
                f"{directory} has {kind} version {body.get('version')}, this installation reads version "
                f"{VERSION}: install a matching version of Postlude, or build it again."
            )
        try:
            store = cls(directory, dict(body["content"]), [int(n) for n in body["rows"]], kind)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{file} lacks or garbles a part ({error!r}): it is damaged."
            ) from error
        store._shards = store._listed()
        return store

    @property
    def complete(self) -> bool:
        return (self.path / _LIST).is_file()

    @property
    def shards(self) -> list[Shard]:
        """Every shard, in order; of a finished store."""
        if self._shards is None:
            self._shards = self._listed()
        return self._shards

    def __len__(self) -> int:
        return sum(self.rows)

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of a shard and the row after its last."""
        return self._starts[number], self._starts[number + 1]

    def missing(self) -> list[int]:
        """Numbers of the shards still to be made. Shards that are there are read and checked.

        A damaged shard is removed, with a warning, and counts as missing.
        """
        found: set[int] = set()
        for number, file, expected in self._files():
            if number in found or number >= len(self.rows) or hash_file(file) != expected:
                _log.warning(
                    "%s is damaged or not part of the %s: it is made again.", file, self.kind
                )
                file.unlink()
                continue
            found.add(number)
        missing = [number for number in range(len(self.rows)) if number not in found]
        if missing:
            # A list of shards that are not all there would call an unfinished store finished.
            (self.path / _LIST).unlink(missing_ok=True)
        return missing

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Add one shard.

        Args:
            number: of the shard.
            tensors: each ``[rows, ...]``; stored on the CPU.

        Raises:
            StoreError: rows that do not fit.
            NoSpaceError: what was there before is untouched.
        """
        wrong = {name: len(x) for name, x in tensors.items() if len(x) != self.rows[number]}
        if wrong:
            raise StoreError(f"shard {number} has {self.rows[number]} rows, got {wrong}")
        plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        fresh = self._folder / f"{number:05d}.new"
        try:
            with atomic_write(fresh) as temporary:
                save_file(plain, temporary)
            os.replace(fresh, self._folder / f"{number:05d}@{hash_file(fresh)}.safetensors")
            sync_directory(self._folder)
        except (OSError, SafetensorError) as error:
            fresh.unlink(missing_ok=True)
            raise _full(error, number, self) from error

    def finish(self) -> None:
        """Write the list of shards; the store is complete from then on. Calling it again changes nothing.

        Raises:
            StoreError: a shard is missing.
            NoSpaceError: there is no room for the list.
        """
        files = {number: (file, sha) for number, file, sha in self._files()}
        missing = [number for number in range(len(self.rows)) if number not in files]
        if missing:
            raise StoreError(f"{self.path} lacks shards {missing[:8]}: it is not finished.")
        listing = []
        for number, rows in enumerate(self.rows):
            file, sha = files[number]
            size = file.stat().st_size
            listing.append({"file": file.name, "sha256": sha, "bytes": size, "rows": rows})
        body = {"manifest": hash_file(self.path / _MANIFEST), "shards": listing}
        if self.complete and (self.path / _LIST).read_bytes() == _as_bytes(body):
            return
        try:
            _write_json(self.path / _LIST, body)
        except OSError as error:
            raise _full(error, None, self) from error

    def verify(self) -> Iterator[Damage | None]:
        """Read every shard and compare its hash; yields one result per shard, None where it is whole."""
        for shard in self.shards:
            yield shard.damage()

    def hash(self) -> str:
        """SHA-256 over manifest and list of a finished store: equal exactly if every byte of the store is."""
        digest = hashlib.sha256()
        for name in (_MANIFEST, _LIST):
            digest.update((self.path / name).read_bytes())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Bytes of the shards of a finished store."""
        return sum(shard.bytes for shard in self.shards)

    def _files(self) -> list[tuple[int, Path, str]]:
        found = []
        for file in sorted(self._folder.iterdir()):
            match = _FILE.fullmatch(file.name)
            if match:
                found.append((int(match[1]), file, match[2]))
        return found

    def _listed(self) -> list[Shard]:
        file = self.path / _LIST
        if not file.is_file():
            have = len(self._files()) if self._folder.is_dir() else 0
            raise StoreError(
                f"{self.path} is not finished: {have} of {len(self.rows)} shards are there. "
                "Run the same build command again; it goes on where it stopped."
            )
        body = _read_json(file, self.kind)
        if body.get("manifest") != hash_file(self.path / _MANIFEST):
            raise StoreError(
                f"{self.path / _MANIFEST} was changed after the build, so it no longer says what the shards hold. Put "
                f"the old file back, or build the {self.kind} again (with --overwrite if that says it is another)."
            )
        entries = body.get("shards")
        if not isinstance(entries, list) or len(entries) != len(self.rows):
            raise StoreError(
                f"{file} does not list the {len(self.rows)} shards of the manifest: damaged."
            )
        shards = []
        for number, entry in enumerate(entries):
            try:
                name, sha, size = str(entry["file"]), str(entry["sha256"]), int(entry["bytes"])
            except (KeyError, TypeError, ValueError) as error:
                raise StoreError(
                    f"{file} garbles shard {number} ({error!r}): it is damaged."
                ) from error
            match = _FILE.fullmatch(name)
            path = self._folder / name
            # A name with separators never matches; a link could still lead elsewhere.
            if (
                not match
                or int(match[1]) != number
                or match[2] != sha
                or _escapes(path, self._folder)
            ):
                raise StoreError(
                    f"{file} names {name!r} as shard {number}; expected a file of its own in {self._folder}. "
                    "A list that points elsewhere is not read."
                )
            start, stop = self.bounds(number)
            shard = Shard(number, start, stop, path, sha, size)
            actual = path.stat().st_size if path.is_file() else None
            if actual != size:
                found = "missing" if actual is None else f"{actual} bytes long"
                raise StoreError(
                    f"shard {number} of {self.path} ({name}) is {found}, expected {size} bytes. Run "
                    "the same build command again: it makes this shard alone anew."
                )
            shards.append(shard)
        return shards


def _body(manifest: Mapping[str, Any], rows: Sequence[int], kind: str) -> dict[str, Any]:
    body = {
        "format": _FORMAT,
        "version": VERSION,
        "kind": kind,
        "rows": [int(n) for n in rows],
        "content": manifest,
    }
    # Through JSON and back, so that a tuple equals the list that a later run reads.
    result: dict[str, Any] = json.loads(json.dumps(body, allow_nan=False))
    return result


def _escapes(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).parent != Path(os.path.realpath(folder))


def _remove(directory: Path) -> None:
    # The list goes first: a kill in between leaves an unfinished store, never a finished one without shards.
    (directory / _LIST).unlink(missing_ok=True)
    shutil.rmtree(directory / _SHARDS, ignore_errors=True)
    sync_directory(directory)


def _read_json(file: Path, kind: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{file} is not valid JSON ({error}): the {kind} is damaged. Remove it, or choose another output (-o)."
        ) from error
    if not isinstance(value, dict):
        raise StoreError(f"{file} is not a JSON object: the {kind} is damaged.")
    return value


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    with atomic_write(file) as temporary:
        temporary.write_bytes(_as_bytes(value))


def _as_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _full(error: Exception, number: int | None, store: TensorStore) -> Exception:
    """What to raise where writing failed: an error that says how to go on, if the disk is full."""
    if not is_full(error):
        return error
    what = "the list of shards" if number is None else f"shard {number} of {len(store.rows)}"
    return NoSpaceError(
        f"no space left while writing {what} of {store.path} ({error.__cause__ or error}). The shards before it are "
        "whole: make room and run the same command again; it goes on from there."
    )
