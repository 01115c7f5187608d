"""What every inspection hands back, and how it is written down."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from postlude.errors import DataError

if TYPE_CHECKING:
    from rich.text import Text

    from postlude.runs.checkpoint import Checkpoint

__all__ = ["Inspection", "checked_tokens", "place", "rounded", "table", "token_text"]

DIGITS = 6


class Inspection(abc.ABC):
    """Result of one inspection; subclasses are frozen dataclasses.

    Attributes:
        method: registered name of the method that made it.
    """

    method: ClassVar[str]

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything found, in the types of JSON; numbers to six significant digits, NaN as null."""

    @abc.abstractmethod
    def summary(self) -> str:
        """The findings for a terminal: a few sentences and tables of plain text."""

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(self.summary())


def rounded(value: object, digits: int = DIGITS) -> Any:
    """``value`` in the types of JSON: floats to significant digits, NaN and infinity as None.

    Raises:
        TypeError: a value that has no such form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return rounded(value.tolist(), digits)
    if isinstance(value, Mapping):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [rounded(item, digits) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns of plain text; numbers to four significant digits and to the right."""

    def cell(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [list(row) for row in rows]
    text = [list(header), *([cell(value) for value in row] for row in body)]
    widths = [max(len(row[column]) for row in text) for column in range(len(header))]
    right = [
        all(isinstance(row[column], int | float | None) for row in body)
        for column in range(len(header))
    ]
    lines = (
        "  ".join(
            word.rjust(width) if to_right else word.ljust(width)
            for word, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in text
    )
    return "\n".join(lines)


def place(layer: int) -> str:
    """A point of the residual stream in words: after which block, or after the embeddings for -1."""
    return "embeddings" if layer < 0 else f"block {layer}"


def token_text(tokenizer: Any, token: int) -> str | None:
    """What a token reads as; None without a tokenizer or for an id that it does not know."""
    if tokenizer is None:
        return None
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:
        return None
    # decode() turns a lone piece into its characters but special tokens and parts of characters into nothing useful.
    text = str(tokenizer.decode([token]))
    return str(name) if token in tokenizer.all_special_ids or not text or "\ufffd" in text else text


def checked_tokens(checkpoint: Checkpoint, tokens: Tensor | None, shortest: int = 1) -> Tensor:
    """``tokens`` as ``[samples, length]`` that the model can read.

    Raises:
        DataError: none given, another shape, too short, too long, or ids outside the vocabulary.
    """
    if tokens is None:
        raise DataError(
            "This inspection runs text through the model and was given none. Pass a text."
        )
    if tokens.dim() != 2 or not tokens.numel() or tokens.dtype not in (torch.int32, torch.int64):
        raise DataError(
            f"Token ids {tuple(tokens.shape)} of type {tokens.dtype}: expected integers [samples, length]."
        )
    length, longest = tokens.shape[1], checkpoint.language.context
    if not shortest <= length <= longest:
        raise DataError(
            f"Sequences of {length} tokens: this inspection of this model takes {shortest} to {longest}. "
            "Cut the text into other windows."
        )
    vocabulary = checkpoint.model.get_submodule(checkpoint.language.embeddings[0]).weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"Token ids from {low} to {high}, and the model has {vocabulary}: "
            "they were made by another model's tokenizer."
        )
    return tokens
