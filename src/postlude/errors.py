"""Every error that Postlude raises on purpose.

    PostludeError
    |-- InputError                  something the caller gave cannot be used; the command line exits with 2
    |   |-- CheckpointError         not a checkpoint, a damaged one, or one in a refused format
    |   |   `-- NonFiniteError      a tensor holds NaN or infinity
    |   |-- ArchitectureError       no anatomy describes this model
    |   |-- SettingsError           a hyper-parameter, or a combination of them, that a method cannot do
    |   |-- UnknownNameError        a name that is not registered; carries the nearest ones
    |   |-- DataError               text or data that is empty, too short or malformed
    |   |-- OutputExistsError       the output is already there and overwriting was not asked for
    |   |-- RunDirectoryError       a run directory that belongs to another model, method or data
    |   |-- StageError              a stage of a recipe failed; carries why
    |   `-- StoreError              a tensor store or index: damaged, unfinished, of another version, model or data
    |-- NoSpaceError                the disk is full; what was there before is untouched
    |-- MissingDependencyError      an optional library is needed; names the extra to install
    |-- RankError                   another process of torchrun raised something or was lost
    `-- VerificationError           what was written, read again, does not compute what it was made from

A message says what was found, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ArchitectureError",
    "CheckpointError",
    "DataError",
    "InputError",
    "MissingDependencyError",
    "NoSpaceError",
    "NonFiniteError",
    "OutputExistsError",
    "PostludeError",
    "RankError",
    "RunDirectoryError",
    "SettingsError",
    "StageError",
    "UnknownNameError",
    "VerificationError",
    "did_you_mean",
    "nearest_names",
]


class PostludeError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class InputError(PostludeError, ValueError):
    """Something the caller gave cannot be used."""

    exit_code = 2


class CheckpointError(InputError):
    """A path that is not a usable checkpoint."""


class NonFiniteError(CheckpointError):
    """A tensor of a checkpoint holds NaN or infinity."""


class ArchitectureError(InputError):
    """A model that no registered anatomy describes."""


class SettingsError(InputError):
    """Hyper-parameters that a method cannot do."""


class DataError(InputError):
    """Text or data that is empty, too short or malformed."""


class OutputExistsError(InputError):
    """An output that already exists."""


class RunDirectoryError(InputError):
    """A run directory that belongs to another run."""


class StoreError(InputError):
    """A tensor store or index that cannot be used as it is."""


class NoSpaceError(PostludeError, OSError):
    """A file that could not be written because the disk, or a quota, is full."""


class MissingDependencyError(PostludeError, ImportError):
    """An optional library that is not installed."""

    exit_code = 2


class RankError(PostludeError):
    """Another process of the same run raised something, or was lost.

    Args:
        message: what happened to which rank.
        told: whether that rank is there to say it itself.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class VerificationError(PostludeError):
    """An output that, read again by a fresh process, does not compute what it was made from."""


class StageError(InputError):
    """A stage of a recipe failed.

    Args:
        stage: its name.
        line: where it begins in the recipe.
        cause: what its command refused.
    """

    def __init__(self, stage: str, line: int, cause: PostludeError) -> None:
        self.exit_code = cause.exit_code
        super().__init__(
            f"stage {stage!r} (line {line}): {cause} Finished stages are kept: mend this and run the recipe again."
        )


class UnknownNameError(InputError):
    """A name that is not known, with the nearest known ones.

    Args:
        kind: what was looked up, for example ``"quantize method"``.
        name: the name that was not found.
        known: every name that would have been accepted.
        advice: how to see all names.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], advice: str = "") -> None:
        names = sorted(known)
        self.nearest = nearest_names(name, names)
        hint = did_you_mean(self.nearest)
        listing = "" if self.nearest and advice else f" Known: {', '.join(names) or 'none'}."
        super().__init__(
            f"No {kind} named {name!r}.{hint}{listing}{' ' + advice if advice else ''}"
        )


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that are much like one, the nearest first."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)


def did_you_mean(names: Sequence[str]) -> str:
    """The end of a message about a name, after a blank; nothing where no name is near."""
    return f" Did you mean {' or '.join(map(repr, names))}?" if names else ""
