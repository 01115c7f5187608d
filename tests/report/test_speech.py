"""The page and the picture of what a model says of a recording."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from postlude.report import speech
from postlude.runs.audio import Recording

RESULT: dict[str, Any] = {
    "recording": "a.wav",
    "model": "ears",
    "duration": 1.5,
    "converted": ["8000 Hz to 16000 Hz"],
    "questions": "long",
    "scores": [
        {"dimension": "Distortion", "key": "dis", "score": 4},
        {"dimension": "Continuity", "key": "con", "score": None},
    ],
    "artifacts": [
        {"artifact": "Noise", "key": "noise", "present": True, "type": "<hum>", "times": [[0.2, 0.6], [0.8, 1.4]]},
        {"artifact": "Distortion", "key": "dist", "present": False, "type": "", "times": []},
        {"artifact": "Unnatural pause", "key": "pause", "present": None, "type": "", "times": []},
    ],
    "notes": ["what was said of con, pause could not be read"],
    "answers": [{"question": "Assess?", "answer": "dis=4 | noise <hum>"}],
    "exact": False,
    "unparsed": ["con", "pause"],
}  # fmt: skip


@pytest.fixture
def recording() -> Recording:
    sound = np.random.default_rng(0).normal(size=24000) * 0.1
    return Recording(sound.astype("float32"), 16000, ("8000 Hz to 16000 Hz",))


def test_the_page(recording: Recording) -> None:
    page = speech.render(RESULT, recording, "postlude explain a.wav --model ears --html a.html")
    assert "Heard: noise (&lt;hum&gt;), 0.2 to 0.6 s, 0.8 to 1.4 s." in page
    assert "This is what the model says, and no better than the model is" in page
    assert page.count("Drop-outs have no times in this answer; they show in Continuity.") == 1
    assert "What was said of Unnatural pause could not be read." in page
    assert "Converted before it was heard: 8000 Hz to 16000 Hz." in page
    assert "<td>could not be read</td>" in page and "<hum>" not in page
    assert page.count("<svg") == 2 and "<script" not in page


def test_the_picture_marks_the_intervals(recording: Recording) -> None:
    from PIL import Image

    drawn = Image.open(io.BytesIO(speech.draw(RESULT, recording))).convert("L")
    assert drawn.size == (1400, 860)
    without = {
        **RESULT,
        "artifacts": [{**row, "present": False, "times": []} for row in RESULT["artifacts"]],
    }
    other = Image.open(io.BytesIO(speech.draw(without, recording))).convert("L")
    assert np.abs(np.asarray(drawn, float) - np.asarray(other, float)).max() > 100
    # The same recording and answer give the same bytes.
    assert speech.draw(RESULT, recording) == speech.draw(RESULT, recording)


def test_a_long_recording_is_drawn_as_well() -> None:
    sound = np.random.default_rng(0).normal(size=16000 * 30).astype("float32") * 0.1
    result = {**RESULT, "duration": 30.0, "artifacts": []}
    assert speech.draw(result, Recording(sound)).startswith(b"\x89PNG")
    assert speech.spoken(result) == "Asked for scores only."
    nothing = [{**row, "present": False, "times": []} for row in RESULT["artifacts"]]
    assert speech.spoken({**RESULT, "artifacts": nothing}) == "The model names no artifact."
