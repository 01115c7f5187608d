"""``postlude evaluate speech`` and ``postlude explain`` on a tiny model, and every refusal by its message."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postlude.evaluation import speech
from postlude.runs.audio import write_wav
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.listening import Answer
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo.audio_llm import build, build_processor
from postlude.zoo.speech_answers import SCORES

ANSWER = (
    "noi=3 dis=5 con=5 eff=4 nat=4 mos=3 | noise hum 0.1-0.3 0.4-0.5 | dist none | pause 0.2-9.0"
)
COLUMNS = {
    **{one.column: 3 for one in SCORES},
    "Speed": 3,
    "Feeling of voice": "clear",
    "Noise Description": "hum noise 0.1-0.3s",
    "Distortion description": "not distorted",
    "Unnatural pause": "very smooth",
    "Natural language description": "long",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = build_processor()
    model = build(0, processor=processor, width=16, encoder_layers=1, layers=1, heads=2)
    checkpoint = Checkpoint(model, processor.tokenizer, anatomy_of(model), processor=processor)
    return checkpoint.save(tmp_path_factory.mktemp("model") / "ears")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    sound = np.random.default_rng(0).normal(size=9600) * 0.05
    write_wav(tmp_path / "clip.wav", sound.astype("float32"))
    return tmp_path / "clip.wav"


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the model say something."""

    def say(text: str) -> None:
        def answers(checkpoint: Any, clips: Any, prompts: list[str], **_: Any) -> list[Answer]:
            return [Answer(text, (), True) for _ in prompts]

        monkeypatch.setattr(speech, "generate", answers)

    return say


def test_explain(
    postlude_command: Any, model: Path, recording: Path, tmp_path: Path, says: Any
) -> None:
    says(ANSWER)
    picture, page = tmp_path / "a.png", tmp_path / "a.html"
    done = postlude_command(
        "explain", recording, "--model", model, "-o", picture, "--html", page, "--json"
    )
    assert done.code == 0, done.err
    found = done.json
    assert [row["score"] for row in found["scores"]] == [3, 5, 5, 4, 4, 3]
    assert found["artifacts"][0] == {
        "artifact": "Noise", "key": "noise", "present": True, "type": "hum",
        "times": [[0.1, 0.3], [0.4, 0.5]],
    }  # fmt: skip
    assert [row["present"] for row in found["artifacts"]] == [True, False, True]
    assert found["notes"] == [
        "unnatural pause is said to last until 9.0 s, beyond the end of the recording at 0.60 s",
        "drop-outs have no times in this answer; they show in Continuity",
    ]
    assert (found["picture"], found["html"]) == (str(picture), str(page))
    assert found["converted"] == [] and found["exact"] and found["unparsed"] == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.count("<svg") == 2 and "Heard: noise (hum), 0.1 to 0.3 s, 0.4 to 0.5 s;" in text
    assert "frequency (kHz)" in text and "time (s)" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    again = postlude_command("explain", recording, "--model", model, "-o", picture)
    assert again.code == 2 and "already exists" in again.err
    done = postlude_command(
        "explain", recording, "--model", model, "-o", picture, "--html", page, "--overwrite"
    )
    assert f"Picture: {picture}" in done.out and f"Page: {page}" in done.out
    shown = done.out
    assert re.search(r"background noise +3", shown) and "0.1 to 0.3 s, 0.4 to 0.5 s" in shown
    assert re.search(r"distortion +none", shown) and "names no artifact" not in shown
    says(re.sub(r"noise .*", "noise none | dist none | pause none", ANSWER))
    shown = postlude_command("explain", recording, "--model", model).out
    assert "The model names no artifact." in shown and "drop-outs have no times" in shown


def test_explain_says_what_was_converted_and_what_cannot_be_read(
    postlude_command: Any, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "stereo.wav"
    sound = (np.random.default_rng(0).normal(size=(8000, 2)) * 2000).astype("<i2")
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(2)
        opened.setsampwidth(2)
        opened.setframerate(8000)
        opened.writeframes(sound.tobytes())
    done = postlude_command("explain", file, "--model", model)
    assert done.code == 0, done.err
    assert "converted: the mean of 2 channels, 8000 Hz to 16000 Hz" in done.out
    assert "could not be read" in done.out and "the answer was: " in done.out
    assert "tune it on answers.jsonl first (docs/speech.md)" in " ".join(done.out.split())
    short = postlude_command("explain", file, "--model", model, "--questions", "short", "--json")
    assert short.json["artifacts"] == [] and len(short.json["answers"]) == 6


def test_evaluate_speech(postlude_command: Any, model: Path, recording: Path, says: Any) -> None:
    folder = recording.parent
    rows = [{"id": "clip", **COLUMNS}]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    says(ANSWER)
    done = postlude_command("evaluate", "speech", model, "--data", folder, "--json")
    assert done.code == 0, done.err
    assert done.json["clips"] == 1 and done.json["skipped"] == 0
    # Of one clip there is no correlation; JSON says so by null.
    assert done.json["mean_pcc"] is None and done.json["mean_pcc_zero"] == 0
    assert done.json["artifacts"][0]["iou"] == pytest.approx(2 / 3)
    says("I would say from 1 to 5")
    shown = postlude_command("evaluate", "speech", model, "--data", folder).out
    said = " ".join(shown.split())
    assert "9 of 9 scores and artifacts could not be read" in said
    assert "Nothing could be read: the model does not answer this way yet: tune it on" in said
    assert "mean PCC \u2013 over 0 of 6 scores" in said
    assert "no times of distortion to compare" in said
    assert "no correlation of background noise: fewer than two answers could be read" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "none.wav", "--model", "MODEL"], "there is no recording none.wav"),
        (["explain", "TEXT", "--model", "MODEL"], "is not a recording"),
        (["explain", "SILENT", "--model", "MODEL"], "is silent"),
        (
            ["explain", "LONG", "--model", "MODEL"],
            "long.wav lasts 31 s; expected at most 30 s. Cut it: sox long.wav",
        ),
        (["explain", "CLIP", "--model", "zoo:tiny-lm"], "reads no recordings"),
        (
            ["explain", "CLIP", "--model", "MODEL", "-o", "a.svg"],
            "expected a name that ends in .png",
        ),
        (["explain", "CLIP", "--model", "MODEL", "--questions", "all"], "expected long or short"),
        (["evaluate", "speech", "MODEL", "--data", "none"], "there is no folder or file none"),
    ],
)
def test_what_is_refused(
    postlude_command: Any,
    model: Path,
    recording: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "text.wav").write_text("no sound at all")
    write_wav(tmp_path / "silent.wav", np.zeros(8000, "float32"))
    write_wav(tmp_path / "long.wav", np.ones(16000 * 31, "float32") * 0.1)
    places = {
        "MODEL": model,
        "CLIP": recording,
        "TEXT": tmp_path / "text.wav",
        "LONG": tmp_path / "long.wav",
        "SILENT": tmp_path / "silent.wav",
    }
    done = postlude_command(*[places.get(word, word) for word in words])
    assert done.code == 2 and message in done.err, done.err
