"""Judge an audio language model, and ask it about a recording."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.errors import SettingsError
from postlude.evaluation.speech import UNREAD, Heard, ask
from postlude.evaluation.speech import evaluate_speech as _evaluate_speech
from postlude.runs.atomic import atomic_write, check_replaceable_file
from postlude.runs.audio import LONGEST, Recording, read_wav
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.clips import Clip
from postlude.runs.listening import Listener
from postlude.runs.progress import Progress
from postlude.zoo.speech_answers import LONG_QUESTION, PARTS, SCORES, question

__all__ = ["evaluate_speech", "explain"]

_NO_TIMES = "drop-outs have no times in this answer; they show in Continuity"


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


def explain(
    recording: Path_,
    checkpoint: Path_ | Checkpoint,
    *,
    questions: str = "long",
    picture: Path_ | None = None,
    html: Path_ | None = None,
    overwrite: bool = False,
    seed: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Ask an audio language model what is wrong with a recording.

    Args:
        recording: a .wav file; other rates, channels and widths are converted, and that is said.
        checkpoint: loaded, or its directory.
        questions: ``long`` asks for everything in one answer; ``short`` for each score in one digit, and no artifacts.
        picture: a .png file to draw: the spectrogram with the artifacts and their times.
        html: a page to write.
        overwrite: replace files that are there.
        seed: taken for uniformity; the model takes its most probable tokens.
        command: to be shown on the page.

    Returns:
        ``scores`` (a row a dimension; ``score`` None where it could not be read), ``artifacts`` (``present`` None
        likewise; ``type``, ``times`` in seconds), ``unparsed`` keys, ``exact``, ``answers``, ``notes``, ``converted``,
        ``duration``, ``recording``, ``model``, ``questions``, ``picture`` and ``html`` (what was written, or None),
        ``seconds``.

    Raises:
        ArchitectureError: the model hears nothing.
        DataError: the recording cannot be read, is silent or is longer than the model can hear.
        OutputExistsError: a file is there.
        SettingsError: other questions, or a picture that is no .png.
    """
    started = time.perf_counter()
    for file in (picture, html):
        if file is not None:
            check_replaceable_file(Path(file), overwrite)
    if picture is not None and Path(picture).suffix.lower() != ".png":
        raise SettingsError(
            f"the picture is {os.fspath(picture)}; expected a name that ends in .png"
        )
    opened = open_checkpoint(checkpoint)
    sound = read_wav(recording, min(LONGEST, Listener(opened).longest))
    (heard,) = ask(opened, [sound], questions)
    name = opened.path.name if opened.path is not None else type(opened.model).__name__
    result = {
        **_explained(heard, sound, questions),
        "recording": Path(recording).name,
        "model": name,
        "picture": None if picture is None else os.fspath(picture),
        "html": None if html is None else os.fspath(html),
        "seconds": time.perf_counter() - started,
    }
    if picture is not None or html is not None:
        from postlude.report import speech

        if picture is not None:
            with atomic_write(picture) as path:
                path.write_bytes(speech.draw(result, sound))
        if html is not None:
            with atomic_write(html) as path:
                path.write_text(speech.render(result, sound, command), encoding="utf-8")
    return result


def _explained(heard: Heard, sound: Recording, questions: str) -> dict[str, Any]:
    parsed = heard.parsed
    scores = [
        {"dimension": one.column, "key": one.key, "score": parsed.scores[one.key]} for one in SCORES
    ]
    artifacts: list[dict[str, Any]] = []
    notes: list[str] = []
    for part in PARTS if questions == "long" else ():
        found = parsed.findings[part.key]
        times = [] if found is None else [list(one) for one in found.times]
        artifacts.append(
            {
                "artifact": part.column.removesuffix(" Description").removesuffix(" description"),
                "key": part.key,
                "present": None if found is None else found.present,
                "type": "" if found is None else found.type,
                "times": times,
            }
        )
        if times and times[-1][1] > sound.duration + 0.05:
            notes.append(
                f"{artifacts[-1]['artifact'].lower()} is said to last until {times[-1][1]:.1f} s, beyond the end of "
                f"the recording at {sound.duration:.2f} s"
            )
    if artifacts:
        notes.append(_NO_TIMES)
    if parsed.unparsed:
        notes.append(f"what was said of {', '.join(parsed.unparsed)} could not be read")
    if len(parsed.unparsed) == len(scores) + len(artifacts):
        notes.append(UNREAD[questions])
    if not heard.ended:
        notes.append("an answer was cut off")
    asked = [LONG_QUESTION] if questions == "long" else [question(one) for one in SCORES]
    return {
        "questions": questions,
        "duration": sound.duration,
        "converted": list(sound.converted),
        "scores": scores,
        "artifacts": artifacts,
        "unparsed": list(parsed.unparsed),
        "exact": parsed.exact,
        "notes": notes,
        "answers": [
            {"question": text, "answer": answer}
            for text, answer in zip(asked, heard.texts, strict=True)
        ],
    }
