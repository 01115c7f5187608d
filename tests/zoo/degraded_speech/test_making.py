from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postlude.errors import DataError, OutputExistsError, SettingsError
from postlude.runs.clips import read_clips
from postlude.zoo.degraded_speech import __main__ as command
from postlude.zoo.degraded_speech import damage, making
from postlude.zoo.degraded_speech.columns import EXPLANATION, RATE, Artifact
from postlude.zoo.degraded_speech.labels import scores
from postlude.zoo.degraded_speech.making import Maker, Plan
from postlude.zoo.degraded_speech.voices import Espeak, Toy
from postlude.zoo.speech_answers import assessment_of, parse, parse_score, write


def clip(monkeypatch: pytest.MonkeyPatch, plan: Plan, index: int = 0) -> tuple[Any, dict[str, Any]]:
    """A clip with this damage; without it, the same voice says the same."""
    monkeypatch.setattr(making, "draw_plan", lambda random: plan)
    return Maker([Toy()], 3).make("train", index)


@pytest.mark.parametrize("index", range(6))
def test_noise_of_a_clip(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    clean, _ = clip(monkeypatch, Plan(()), index)
    noisy, row = clip(monkeypatch, Plan(("noise",)), index)
    (found,) = row["artifacts"]
    start, end = round(found["start"] * RATE), round(found["end"] * RATE)
    added = noisy - clean
    assert not added[:start].any() and not added[end:].any()
    assert found["value"] == damage.STEPS[found["kind"]][found["severity"] - 1]
    assert row["Background noise"] == 5 - found["severity"]
    if found["kind"] != "click":
        ratio = damage.power(clean[start:end]) / damage.power(added[start:end])
        assert 10 * math.log10(ratio) == pytest.approx(found["value"], abs=1e-6)


@pytest.mark.parametrize("index", range(3))
def test_a_pause_is_silent_within_a_word_and_moves_later_words(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    clean, before = clip(monkeypatch, Plan((), pause=0), index)
    paused, row = clip(monkeypatch, Plan(("pause",), pause=4), index)
    (found,) = row["artifacts"]
    start, end = round(found["start"] * RATE), round(found["end"] * RATE)
    assert end - start == 4 * RATE // 10 and not paused[start:end].any()
    assert row["Unnatural pause"] == f"{found['start']:.1f}-{found['end']:.1f}s"
    near = slice(end + 40, end + RATE // 2)
    np.testing.assert_allclose(
        paused[near], clean[start + 40 : start + RATE // 2][: near.stop - near.start]
    )
    torn = 0
    for (a, b), (c, d) in zip(before["words"], row["words"], strict=True):
        if b <= found["start"]:
            assert (a, b) == (c, d)
        elif a >= found["start"]:
            assert (c, d) == pytest.approx((a + 0.4, b + 0.4))
        else:
            assert (c, d) == pytest.approx((a, b + 0.4))
            torn += 1
    assert torn == 1
    assert row["Continuity"] == 4


def test_tempo_moves_words(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = clip(monkeypatch, Plan(()))
    _, row = clip(monkeypatch, Plan(("speed",), tempo=1.4))
    assert np.allclose(np.array(row["words"]) * 1.4, before["words"], atol=2e-3)
    assert row["Speed"] == 5 and row["artifacts"][0]["value"] == 1.4
    assert row["artifacts"][0]["end"] == row["duration"]


def test_a_gain_is_the_one_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, _ = clip(monkeypatch, Plan(()))
    louder, row = clip(monkeypatch, Plan(("loudness",)))
    np.testing.assert_allclose(louder, clean * 10 ** (row["artifacts"][0]["value"] / 20))
    assert 10 ** (row["artifacts"][0]["value"] / 20) != 1


@pytest.mark.parametrize("index", range(3))
def test_lost_packets_are_silent_even_in_noise(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    samples, row = clip(monkeypatch, Plan(("noise", "discontinuity")), index)
    lost = next(a for a in row["artifacts"] if a["class"] == "discontinuity")
    assert lost["parts"]
    for start, end in lost["parts"]:
        assert lost["start"] <= start < end <= lost["end"]
        assert not samples[round(start * RATE) : round(end * RATE)].any()


def test_clips_of_many_draws() -> None:
    maker, random = Maker([Toy()], 5), np.random.default_rng(0)
    for index in range(12):
        samples, row = maker.make("test" if index % 3 == 0 else "train", index)
        assert making.SHORTEST <= row["duration"] <= making.LONGEST
        assert row["duration"] == len(samples) / RATE and len(samples) % (RATE // 10) == 0
        assert np.abs(samples).max() <= 0.98 + 1e-9
        assert 633 <= len(row[EXPLANATION]) <= 1850
        assert row[EXPLANATION].endswith(
            f"overall quality is rated {row['Overall quality']} out of 5."
        )
        assert parse(write(assessment_of(row))).exact
        for found in row["artifacts"]:
            assert found["start"] == round(found["start"], 1) <= found["end"] - 0.3
            assert found["end"] <= row["duration"] + 1e-9
    plans = [making.draw_plan(random) for _ in range(3000)]
    shares = [sum(len(p.classes) == n for p in plans) / 3000 for n in range(3)]
    assert shares == pytest.approx([0.1, 0.45, 0.45], abs=0.03)
    assert all(("pause" in p.classes) == (p.pause > 0) for p in plans)


@pytest.mark.parametrize(
    ("artifacts", "naturalness", "expected"),
    [
        ((), 5, {"noi": 5, "dis": 5, "con": 5, "eff": 5, "nat": 5, "mos": 5, "spd": 3}),
        # Deficits of 4 and 2: effort 5 - 3; naturalness 4 - 2; half of 1 and half of 13 / 5 is 1.8.
        (
            (
                Artifact("noise", "hum", 0, 1, 4, 2),
                Artifact("distortion", "clip", 0, 1, 2, 0.35),
            ),
            4,
            {"noi": 1, "dis": 3, "con": 5, "eff": 2, "nat": 2, "mos": 2, "spd": 3},
        ),
        # Halves are rounded up: effort 5 - 1.5 is 4; half of 2 and half of 19 / 5 is 2.9.
        (
            (
                Artifact("discontinuity", "", 0, 1, 2, 0.1),
                Artifact("pause", "", 0.2, 0.5, 1, 0.3),
            ),
            4,
            {"noi": 5, "dis": 5, "con": 2, "eff": 4, "nat": 4, "mos": 3, "spd": 3},
        ),
        (
            (Artifact("discontinuity", "", 0, 1, 4, 0.4), Artifact("pause", "", 0.2, 0.8, 2, 0.6)),
            5,
            {"noi": 5, "dis": 5, "con": 1, "eff": 3, "nat": 5, "mos": 2, "spd": 3},
        ),
        (
            (Artifact("speed", "", 0, 1, 0, 0.7),),
            4,
            {"noi": 5, "dis": 5, "con": 5, "eff": 5, "nat": 4, "mos": 4, "spd": 1},
        ),
    ],
)
def test_scores(
    artifacts: tuple[Artifact, ...], naturalness: int, expected: dict[str, int]
) -> None:
    assert scores(artifacts, naturalness) == expected


# ------------------------------------------------------------------------------------------------ the command


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_command_and_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["data", "--n", "10", "--seed", "4", "--source", "toy", "--json"]
    assert command.main([*asked, "-o", str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["train"] == 8
    whole = contents(tmp_path / "a")

    made, make = [], Maker.make

    def killed(self: Maker, split: str, index: int) -> Any:
        made.append((split, index))
        if len(made) == 4:
            raise KeyboardInterrupt
        return make(self, split, index)

    monkeypatch.setattr(Maker, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main([*asked, "-o", str(tmp_path / "b")])
    unfinished = tmp_path / "b" / "train" / "labels.part"
    # A kill may also leave half a line.
    unfinished.write_bytes(unfinished.read_bytes() + b'{"id": "tr')
    assert not (tmp_path / "b" / "train" / "labels.jsonl").exists()
    made.clear()
    made.append(("none", 0))
    made *= 5
    assert command.main([*asked, "-o", str(tmp_path / "b")]) == 0
    assert made[5:] == [("train", i) for i in range(3, 8)] + [("test", 0), ("test", 1)]
    assert contents(tmp_path / "b") == whole

    clips = {split: read_clips(tmp_path / "a" / split) for split in ("train", "test")}
    for key in ("voice", "text"):
        train, test = ({clip.details[key] for clip in clips[split]} for split in clips)
        assert train and test and not train & test
    one = clips["train"][0]
    assert one.artifacts is not None and one.read().converted == ()
    rows = lines(tmp_path / "a/train/calibration.jsonl")
    assert len(rows) == 7 * 8 and all(parse_score(row["completion"]) for row in rows)
    assert (tmp_path / "a/train" / rows[0]["audio"]).is_file()
    answers = lines(tmp_path / "a/train/answers.jsonl")
    assert [row["completion"] for row in answers] == [
        write(assessment_of(clip.columns)) for clip in clips["train"]
    ]
    scores = lines(tmp_path / "a/train/scores.jsonl")
    for row, whole_answer in zip(scores, answers, strict=True):
        assert row["completion"] == whole_answer["completion"].split(" | ")[0]
        assert {**row, "completion": 0} == {**whole_answer, "completion": 0}
    open_ = lines(tmp_path / "a/train/reinforce.jsonl")
    assert "completion" not in open_[0] and open_[0]["Distortion"] == one.scores["Distortion"]


def test_the_command_says_who_speaks_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTLUDE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(Espeak, "available", staticmethod(lambda: True))
    out = tmp_path / "two words"
    assert command.main(["data", "--n", "5", "--source", "toy", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "speakers: toy\n" in shown and "left out: espeak (here: --source espeak" in shown
    assert "left out: digits (there is no fsdd_recordings.tar.gz in POSTLUDE_DATA: give" in shown
    assert f"postlude tune random/ '{out}/train'/scores.jsonl -o calibrated/" in shown
    assert f"evaluate speech calibrated/ --data '{out}/test'" in shown
    # The folder of both sets is no set, and its other file no table of labels.
    with pytest.raises(DataError, match=r"has clips below it: test, train\. Give .*test"):
        read_clips(out)


def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTLUDE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(Espeak, "available", staticmethod(lambda: False))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "about.json").write_text('{"n": 7}')
    for asked, message in (
        (["--source", "auto"], "no espeak-ng on this machine and no fsdd_recordings"),
        (["--source", "both"], "no fsdd_recordings.tar.gz in POSTLUDE_DATA; give --digits"),
        (["--source", "digits", "--digits", "none"], "there are no spoken digits at none"),
        (["--source", "espeak"], "apt-get install espeak-ng"),
        (["--source", "toy", "--n", "4"], "--n is 4; expected 5 clips or more"),
        (["--source", "toy", "-o", str(tmp_path / "full")], "holds something else"),
        (["--source", "toy", "-o", str(tmp_path / "begun")], "holds clips made with {'n': 7}"),
    ):
        assert command.main(["data", "-o", str(tmp_path / "out"), *asked]) == 2
        assert re.search(re.escape(message), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_errors_of_the_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="nobody speaks"):
        Maker([], 0)
    with pytest.raises(OutputExistsError):
        (tmp_path / "file").touch()
        command.make_sets(tmp_path / "file", 5, 0, [Toy()])
    monkeypatch.setattr(making, "LONGEST", 0.5)
    monkeypatch.setattr(making, "_TRIES", 2)
    with pytest.raises(DataError, match=r"says no sentence of the train set within 0\.5 s"):
        Maker([Toy()], 0).make("train", 0)
