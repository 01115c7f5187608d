"""Write a file or a directory so that a kill leaves the old one whole, or none, and never a half.

Everything is first written beside its final place, flushed to the disk, and then renamed. A rename
inside one file system is atomic; a non-empty directory is swapped with its successor in one system
call where the kernel can (``renameat2`` with ``RENAME_EXCHANGE``), else by two renames, between
which a kill leaves no directory of that name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postlude.errors import NoSpaceError, OutputExistsError

__all__ = [
    "atomic_directory",
    "atomic_write",
    "check_replaceable",
    "check_replaceable_file",
    "discard",
    "is_full",
    "is_partial",
    "sync_directory",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there becomes ``path`` at the end.

    An old file of that name is replaced. If the block raises, the temporary file is removed and
    ``path`` is as before.

    Raises:
        NoSpaceError: the disk is full.
    """
    target = Path(os.path.realpath(path))
    _remove_stale(target)
    temporary = _partial(target)
    try:
        yield temporary
        _sync_file(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _say_if_full(error, target)
        raise
    sync_directory(target.parent)


@contextmanager
def atomic_directory(
    target: str | os.PathLike[str],
    overwrite: bool = False,
    marker: str | tuple[str, ...] | None = None,
) -> Iterator[Path]:
    """Yield a new directory beside ``target`` that takes its place when the block ends well.

    Args:
        target: the directory to make. An empty directory of that name counts as absent.
        overwrite: replace a directory that is already there.
        marker: a file that a directory must hold before it may be replaced (``"config.json"`` for
            a checkpoint), so that a mistyped output path does not delete something else; one of several
            where a tuple is given.

    Raises:
        OutputExistsError: before anything is written, if ``target`` may not be replaced; after the
            block, if it appeared meanwhile.
        NoSpaceError: the disk is full.
    """
    final = Path(os.path.realpath(target))
    check_replaceable(final, overwrite, marker)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(final)
    temporary = _partial(final)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        check_replaceable(final, overwrite, marker)
        _put_in_place(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _say_if_full(error, final)
        raise
    sync_directory(final.parent)
    # After an exchange the temporary name holds the old directory.
    shutil.rmtree(temporary, ignore_errors=True)


def discard(directory: str | os.PathLike[str], beside: str | os.PathLike[str]) -> None:
    """Remove a directory so that a kill leaves all of it or none under its name.

    Args:
        directory: to be removed.
        beside: an output in the same folder. What a kill leaves takes a temporary name of this output, and goes
            when that is written again.
    """
    doomed = _partial(Path(os.path.realpath(beside)))
    os.rename(directory, doomed)
    sync_directory(doomed.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut.

    A no-op where the system cannot.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a file could not be written because a disk, a quota or a limit is full."""
    if isinstance(error, NoSpaceError):
        return True
    # The libraries that write safetensors and tokenizers pass the system's message on, not its number.
    return getattr(error, "errno", None) in _FULL or any(
        os.strerror(code) in str(error) for code in _FULL
    )


def _say_if_full(error: BaseException, target: Path) -> None:
    if is_full(error) and not isinstance(error, NoSpaceError):
        raise NoSpaceError(
            f"No space left to write {target} ({error}). Nothing of it is there, and what was there before is "
            "untouched: make room and run the same command again."
        ) from error


def is_partial(path: Path) -> bool:
    """Whether a name is one of this module's temporary names."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial(target: Path) -> Path:
    # The host and process are in the name so that leftovers of a killed process can be told from a
    # live writer's.
    owner = f"{socket.gethostname().replace('.', '_')}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    return target.parent / f".{target.name}.{owner}.partial"


def _remove_stale(target: Path) -> None:
    """Remove what processes of this host, now dead, left half-written for ``target``."""
    if not target.parent.is_dir():
        return
    host = socket.gethostname().replace(".", "_")
    prefix = f".{target.name}.{host}."
    for candidate in target.parent.iterdir():
        if not (candidate.name.startswith(prefix) and is_partial(candidate)):
            continue
        process = candidate.name.removeprefix(prefix).split(".")[0]
        if not process.isdigit() or _is_alive(int(process)):
            continue
        if candidate.is_dir():
            shutil.rmtree(candidate, ignore_errors=True)
        else:
            candidate.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # signal 0 is not a harmless probe there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_replaceable_file(target: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, an output file that may not be replaced.

    Raises:
        OutputExistsError: says what is in the way.
    """
    if target.is_dir():
        raise OutputExistsError(
            f"{target} is a directory, and the output is a file: choose another output."
        )
    if target.exists() and not overwrite:
        raise OutputExistsError(
            f"{target} already exists. Choose another output, or pass --overwrite (overwrite=True) to replace it."
        )


def check_replaceable(target: Path, overwrite: bool, marker: str | tuple[str, ...] | None) -> None:
    """Refuse, before any work is done, an output directory that may not be replaced.

    Arguments as for :func:`atomic_directory`, with ``target`` resolved.

    Raises:
        OutputExistsError: says what is in the way.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(
            f"{target} is a file, and the output is a directory: choose another output."
        )
    entries = os.listdir(target)
    if not entries:
        return
    if not overwrite:
        raise OutputExistsError(
            f"{target} already exists and holds {len(entries)} entries. "
            "Choose another output, or pass --overwrite (overwrite=True) to replace it."
        )
    working = Path.cwd()
    if target == working or target in working.parents:
        raise OutputExistsError(
            f"{target} is the working directory or holds it, and replacing it would delete "
            "everything in it: choose another output."
        )
    markers = (marker,) if isinstance(marker, str) else marker
    if markers is not None and not any(name in entries for name in markers):
        raise OutputExistsError(
            f"{target} exists but holds no {' or '.join(markers)}, so it is not an earlier output of this "
            "command and is not replaced: choose another output, or remove it yourself."
        )


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists() or not os.listdir(target):
        os.replace(temporary, target)
        return
    if _exchange(temporary, target):
        return
    aside = _partial(target)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one system call; False where the kernel or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(library, "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    return done == 0


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            _sync_file(Path(folder) / name)
        sync_directory(folder)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
