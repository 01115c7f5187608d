"""Which of torchrun's processes this is, by what torchrun says in the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["alone", "rank", "ranks"]

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def ranks() -> int:
    """How many processes there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0. The first writes and prints."""
    return int(os.environ["RANK"]) if ranks() > 1 else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work of this process in which the others have no part: inside it there is one rank."""
    kept = {name: os.environ.pop(name) for name in _ENVIRONMENT if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
