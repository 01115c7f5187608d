"""A model together with what is needed to work on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postlude.surgery.anatomy import Anatomy

__all__ = ["Checkpoint"]


@dataclass
class Checkpoint:
    """A loaded model, its tokenizer and its anatomy.

    Attributes:
        model: a transformers causal language model.
        tokenizer: None where the checkpoint has none; then nothing that needs text can be done.
        anatomy: where the parts of ``model`` are.
        path: the directory it was loaded from or saved to; None while ``model`` exists only in
            memory.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    path: Path | None = None

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return self.anatomy.context
