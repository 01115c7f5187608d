"""Postlude's checkpoint format in the tables of transformers."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Add the format to transformers' quantizer tables; calling it again changes nothing."""
