"""Text for a checkpoint: documents, and crops of them to calibrate on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from postlude._front_door.opening import Path_
from postlude.errors import DataError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.documents import calibration_windows, read_documents

__all__ = ["CALIBRATION_SAMPLES", "Text", "built_in_text", "calibration_tokens"]

_CALIBRATION_LENGTH, CALIBRATION_SAMPLES = 512, 128


Text = Path_ | Sequence[str]


def _documents(text: Text) -> list[str]:
    if isinstance(text, str | os.PathLike):
        return read_documents(text)
    return list(text)


def built_in_text() -> list[str]:
    """The English help texts that every Python carries (PSF licence)."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def calibration_tokens(
    checkpoint: Checkpoint,
    text: Text,
    samples: int = CALIBRATION_SAMPLES,
    length: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Random crops of a text, ``[samples, length]``; every second one starts as the tokenizer starts a text.

    Raises:
        DataError: no text, too little of it, or a checkpoint without tokenizer.
        SettingsError: a length beyond the model's context.
    """
    if checkpoint.tokenizer is None:
        raise DataError(
            f"{checkpoint.path or 'this checkpoint'} has no tokenizer, so text cannot be read with it; "
            "put its tokenizer files beside the weights"
        )
    chosen = min(_CALIBRATION_LENGTH, checkpoint.context) if length is None else length
    return calibration_windows(
        checkpoint.tokenizer, _documents(text), samples, chosen, seed, checkpoint.context
    )
