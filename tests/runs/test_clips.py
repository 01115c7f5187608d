from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postlude.errors import DataError
from postlude.runs.audio import RATE, write_wav
from postlude.runs.clips import read_clips
from postlude.zoo.degraded_speech.columns import Artifact

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)

ROW: dict[str, Any] = {
    "id": "one.wav",
    "Speed": 3,
    "Naturalness": 4,
    "Background noise": 2,
    "Distortion": 5,
    "Listening effort": 3,
    "Continuity": 4,
    "Overall quality": 3,
    "Feeling of voice": "calm, a middle-aged woman",
    "Noise Description": "wind-like sound 0-1.7s",
    "Distortion description": "not distorted",
    "Unnatural pause": "3-3.6s",
    "Natural language description": "From 1 to 5, it is a 3.",
}


def folder(tmp_path: Path, *rows: dict[str, Any], inner: str = "wav") -> Path:
    (tmp_path / inner).mkdir(exist_ok=True)
    write_wav(tmp_path / inner / "one.wav", TONE.astype(np.float32))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "labels.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_the_published_layout_as_a_table(tmp_path: Path) -> None:
    folder(tmp_path, inner="wavs")
    (tmp_path / "labels.jsonl").unlink()
    with (tmp_path / "test.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROW))
        writer.writeheader()
        writer.writerow(ROW)
    (clip,) = read_clips(tmp_path)
    assert clip.columns == ROW | {"id": "one.wav"}
    assert clip.artifacts is None and clip.path == tmp_path / "wavs" / "one.wav"
    np.testing.assert_allclose(clip.read().samples, TONE, atol=1e-4)


def test_a_json_list_and_ids_without_an_ending(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "labels.jsonl").unlink()
    (tmp_path / "val.json").write_text(json.dumps([ROW | {"id": "one"}]), encoding="utf-8")
    assert read_clips(tmp_path / "val.json")[0].path.name == "one.wav"


def test_artifacts_and_details(tmp_path: Path) -> None:
    found = {
        "class": "noise",
        "kind": "hum",
        "start": 0.1,
        "end": 0.4,
        "severity": 2,
        "value": 15.0,
    }
    (clip,) = read_clips(folder(tmp_path, ROW | {"artifacts": [found], "voice": "theo"}))
    assert clip.artifacts is not None
    assert clip.artifacts[0] == Artifact("noise", "hum", 0.1, 0.4, 2, 15.0)
    assert clip.details == {"voice": "theo"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Continuity": None}, r"labels\.jsonl row 1 has no 'Continuity'; it has 'id', 'Speed'"),
        ({"Unnatural pause": None}, "row 1 has no 'Unnatural pause'"),
        ({"Distortion": 6}, "row 1: 'Distortion' is 6; expected a score of 1, 2, 3, 4 or 5"),
        ({"Distortion": 2.5}, "'Distortion' is 2.5"),
        ({"Distortion": True}, "'Distortion' is True"),
        ({"Distortion": "good"}, "'Distortion' is 'good'"),
        ({"Noise Description": 3}, "'Noise Description' is 3; expected words"),
        ({"id": "../one"}, "the id '../one' leaves the folder"),
        ({"id": "/etc/one"}, "leaves the folder"),
        ({"id": " "}, "'id' is ' '"),
        ({"id": "two"}, r"there is no recording .*two\.wav"),
        ({"artifacts": 3}, "'artifacts' is a int; expected a list"),
        ({"artifacts": [{"class": "noise"}]}, "cannot be read .KeyError: 'start'"),
        (
            {"artifacts": [{"class": "noise", "start": 2, "end": 1, "severity": 1}]},
            "lasts from 2.0 to 1.0 s",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {name: value for name, value in (ROW | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        read_clips(folder(tmp_path, row))


def test_bad_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder or file"):
        read_clips(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no labels\.jsonl and no other table"):
        read_clips(tmp_path)
    with pytest.raises(DataError, match=r"row 2 has the id 'one\.wav' of row 1"):
        read_clips(folder(tmp_path, ROW, ROW))
    with pytest.raises(DataError, match="holds no rows"):
        read_clips(folder(tmp_path))
    with pytest.raises(DataError, match="it has clips below it: "):
        read_clips(tmp_path.parent)
    labels = tmp_path / "labels.jsonl"
    labels.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="row 1 is not JSON"):
        read_clips(tmp_path)
    labels.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="row 1 is a list; expected an object"):
        read_clips(tmp_path)
    labels.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_clips(tmp_path)
    labels.unlink()
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("id\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"several tables \(test\.csv, train\.csv\)"):
        read_clips(tmp_path)
    (tmp_path / "list.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="is a JSON dict; expected a list"):
        read_clips(tmp_path / "list.json")
    with pytest.raises(DataError, match="is no table that is read here"):
        read_clips(tmp_path / "wav" / "one.wav")
