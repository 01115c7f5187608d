"""Judge and ask an audio language model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.evaluation.speech import evaluate_speech as _evaluate_speech
from postlude.runs.audio import Clip
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = ["evaluate_speech"]


def evaluate_speech(
    checkpoint: Path_ | Checkpoint,
    data: Path_ | Sequence[Clip],
    *,
    questions: str = "long",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare what an audio language model says of clips with their labels.

    Args:
        checkpoint: loaded, or its directory; float or quantized, with or without an adapter.
        data: a folder that ``python -m postlude.zoo.degraded_speech data`` wrote, or one in the layout of QualiSpeech.
        questions: ``long`` asks for everything in one answer; ``short`` for each score in one digit.
        limit: this many clips, from the first one.
        batch_size: questions at a time.
        seed: taken for uniformity; the model takes its most probable tokens.
        progress: where to show bars.

    Returns:
        See :func:`postlude.evaluation.speech.evaluate_speech`; ``seconds`` is added.

    Raises:
        ArchitectureError: the model hears nothing.
        DataError: labels or recordings that cannot be used.
        SettingsError: other questions.
    """
    started = time.perf_counter()
    found = _evaluate_speech(
        open_checkpoint(checkpoint),
        data,
        questions=questions,
        limit=limit,
        batch_size=batch_size,
        progress=progress,
    )
    return {**found, "seconds": time.perf_counter() - started}
