"""The checksums of files, and the list of them that lies beside the weights that Postlude writes."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from postlude.errors import CheckpointError

__all__ = [
    "SUMS",
    "check_sums",
    "finish_weights",
    "hash_file",
    "listed_sums",
    "refuse_damaged",
    "write_sums",
]

SUMS = "SHA256SUMS"
"""Beside the weights that Postlude writes: their checksums, as ``sha256sum -c`` reads them."""

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def hash_file(file: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(directory: Path, pattern: str = "*.safetensors") -> None:
    """Write the checksums of the weights of a directory, or of other files in it, beside them."""
    files = sorted(directory.glob(pattern))
    lines = [f"{hash_file(file)}  {file.name}\n" for file in files]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def finish_weights(directory: Path, like: str, pattern: str = "*.safetensors") -> None:
    """Give weights that a library wrote for their owner alone the permissions of another file, and write their sums."""
    for file in directory.glob(pattern):
        shutil.copymode(directory / like, file)
    write_sums(directory, pattern)


def listed_sums(files: list[Path]) -> dict[Path, str]:
    """The checksums that the lists beside some files give for them."""
    listed: dict[Path, str] = {}
    for folder in {file.parent for file in files}:
        try:
            text = (folder / SUMS).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            continue
        found = filter(None, map(_LINE.fullmatch, text.splitlines()))
        listed |= {folder / match[2]: match[1] for match in found}
    return {file: listed[file] for file in files if file in listed}


def check_sums(files: list[Path]) -> None:
    """Compare files with the checksums beside them; those without one are taken as they are.

    Time is one read of the files.

    Raises:
        CheckpointError: a file is not what was written.
    """
    for file, expected in listed_sums(files).items():
        refuse_damaged(file, expected, hash_file(file))


def refuse_damaged(file: Path, expected: str, found: str) -> None:
    """Refuse a file whose checksum is not the listed one.

    Raises:
        CheckpointError: names the file and both.
    """
    if found != expected:
        raise CheckpointError(
            f"{file} is damaged: its SHA-256 is {found[:12]}..., {SUMS} beside it says {expected[:12]}"
            f"... Copy or download it again. If it was changed on purpose, remove {SUMS}."
        )
