"""The libraries that tuning runs on, which are not installed with Postlude itself."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from postlude.errors import MissingDependencyError

__all__ = ["import_library"]


def import_library(name: str, what: str) -> Any:
    """A library of the extra ``tune``.

    Args:
        name: of the library.
        what: needs it, for the message.

    Raises:
        MissingDependencyError: it, or what it needs, is not installed.
    """
    try:
        with warnings.catch_warnings():
            # Not ours to change: what the libraries below it say of each other while they are imported.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what}, which cannot be imported ({error}): pip install 'postlude[tune]'"
        ) from error
