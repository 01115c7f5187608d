from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postlude.errors import ArchitectureError, DataError, SettingsError
from postlude.evaluation import speech
from postlude.evaluation.speech import evaluate_speech, judge_findings, judge_scores, pearson
from postlude.runs.audio import write_wav
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.listening import Answer
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo.audio_llm import build, build_processor
from postlude.zoo.speech_answers import (
    PARTS,
    SCORES,
    Assessment,
    Finding,
    Parsed,
    parse,
    phrase,
    write,
)

NOTHING = {part.key: Finding() for part in PARTS}


def random_assessment(generator: np.random.Generator) -> Assessment:
    findings = {}
    for part in PARTS:
        there = generator.random() < 0.5
        start = int(generator.integers(0, 20))
        times = ((start / 10, (start + int(generator.integers(1, 15))) / 10),)
        kind = str(generator.choice(["hum", "white", "pink"])) if part.noun else ""
        findings[part.key] = Finding(kind, times) if there else Finding()
    return Assessment({one.key: int(generator.integers(1, 6)) for one in SCORES}, findings)


@pytest.fixture
def answered() -> tuple[list[Assessment], list[Assessment]]:
    generator = np.random.default_rng(0)
    truth = [random_assessment(generator) for _ in range(60)]
    said = [one if generator.random() < 0.4 else random_assessment(generator) for one in truth]
    return said, truth


def test_scores_against_scipy(answered: tuple[list[Assessment], list[Assessment]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    said, truth = answered
    rows = judge_scores([parse(write(one)) for one in said], truth)
    assert [row["dimension"] for row in rows] == [one.column for one in SCORES]
    for row in rows:
        first = [one.scores[row["key"]] for one in said]
        second = [one.scores[row["key"]] for one in truth]
        assert row["pcc"] == pytest.approx(stats.pearsonr(first, second).statistic)
        assert row["spearman"] == pytest.approx(stats.spearmanr(first, second).statistic)
        assert row["accuracy"] == pytest.approx(np.mean(np.equal(first, second)))
        assert row["mean_error"] == pytest.approx(np.abs(np.subtract(first, second)).mean())
        counts = np.bincount(second)
        assert counts[int(row["constant_score"])] == counts.max()
        assert row["constant_accuracy"] == pytest.approx(counts.max() / 60)
        assert (row["read"], row["skipped"], row["note"]) == (60, 0, None)


def test_findings_against_sklearn_and_a_sampled_axis(
    answered: tuple[list[Assessment], list[Assessment]],
) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    said, truth = answered
    rows = judge_findings([parse(write(one)) for one in said], truth, [4.0] * 60)
    middles = (np.arange(4000) + 0.5) / 1000

    def inside(finding: Finding) -> Any:
        return sum(
            ((middles > a) & (middles < b)).astype(int) for a, b in finding.times
        ) > np.zeros(4000)

    for part, row in zip(PARTS, rows, strict=True):
        first = [one.findings[part.key] for one in said]
        second = [one.findings[part.key] for one in truth]
        there = [one.present for one in second]
        told = [one.present for one in first]
        for name in ("f1", "precision", "recall"):
            expected = getattr(metrics, f"{name}_score")(there, told)
            assert row[name] == pytest.approx(expected)
        assert row["always_f1"] == pytest.approx(metrics.f1_score(there, [True] * 60))
        overlaps, whole = [], []
        for one, right in zip(first, second, strict=True):
            a, b = inside(one), inside(right)
            if a.any() or b.any():
                overlaps.append((a & b).sum() / (a | b).sum())
            whole.append(b.mean())
        assert row["iou"] == pytest.approx(np.mean(overlaps)) and row["iou_clips"] == len(overlaps)
        assert row["always_iou"] == pytest.approx(np.mean(whole))
        both = [
            a.type == b.type for a, b in zip(first, second, strict=True) if a.present and b.present
        ]
        assert row["type_accuracy"] == pytest.approx(np.mean(both), nan_ok=True) or not part.noun


def test_constants_have_no_correlation() -> None:
    truth = [Assessment({one.key: 1 + at % 5 for one in SCORES}, NOTHING) for at in range(6)]
    same = [parse("noi=3 dis=3 con=3 eff=3 nat=3 mos=3 | noise none | dist none | pause none")] * 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = judge_scores(same, truth)
        findings = judge_findings(same, truth, [1.0] * 6)
    assert all(math.isnan(row["pcc"]) and math.isnan(row["spearman"]) for row in rows)
    assert all(row["note"] == "every answer is 3" for row in rows)
    assert judge_scores(same, [truth[0]] * 6)[0]["note"] == "every answer is 3"
    assert all(math.isnan(row["f1"]) and math.isnan(row["iou"]) for row in findings)
    assert math.isnan(pearson([1.0], [2.0])) and math.isnan(pearson([], []))


def test_what_cannot_be_read_is_counted_and_never_scored() -> None:
    truth = [Assessment({one.key: 1 + at for one in SCORES}, NOTHING) for at in range(4)]
    said = [parse(write(one)) for one in truth]
    said[1] = parse("nonsense, from 1 to 5")
    said[2] = parse(
        write(truth[2]).replace("noi=3", "noi=7").replace("noise none", "noise hum 2-1")
    )
    rows = judge_scores(said, truth)
    assert [row["skipped"] for row in rows] == [2, 1, 1, 1, 1, 1]
    assert all(row["accuracy"] == 1 and row["pcc"] == pytest.approx(1) for row in rows)
    assert rows[0]["note"] is None and judge_scores(said[1:3], truth[1:3])[0]["note"] == (
        "fewer than two answers could be read"
    )
    findings = judge_findings(said, truth, [1.0] * 4)
    assert [row["skipped"] for row in findings] == [2, 1, 1]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    processor = build_processor()
    model = build(0, processor=processor, width=16, encoder_layers=1, layers=1, heads=2)
    return Checkpoint(model, processor.tokenizer, anatomy_of(model), processor=processor)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    (tmp_path / "wav").mkdir()
    rows = []
    for at in range(4):
        write_wav(
            tmp_path / f"wav/{at}.wav", (generator.normal(size=9600) * 0.05).astype("float32")
        )
        one = random_assessment(generator)
        row: dict[str, Any] = {
            "id": str(at),
            "Speed": 3,
            "Feeling of voice": "clear",
            "Natural language description": "x",
        }
        row |= {dimension.column: one.scores[dimension.key] for dimension in SCORES}
        row |= {part.column: phrase(part, one.findings[part.key]) for part in PARTS}
        rows.append(row)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("questions", ["long", "short"])
def test_a_model_that_knows_nothing(checkpoint: Checkpoint, clips: Path, questions: str) -> None:
    found = evaluate_speech(checkpoint, clips, questions=questions, limit=3)
    assert found["clips"] == 3 and found["asked"] == (27 if questions == "long" else 18)
    assert found["skipped"] == found["asked"] and found["exact"] == 0
    assert math.isnan(found["mean_pcc"]) and found["mean_pcc_zero"] == 0
    assert len(found["artifacts"]) == (3 if questions == "long" else 0)
    assert len(found["samples"]) == 3


def test_a_model_that_knows_everything(
    checkpoint: Checkpoint, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.runs.clips import read_clips
    from postlude.zoo.speech_answers import assessment_of, parse_score, question

    right = [assessment_of({**clip.scores, **clip.descriptions}) for clip in read_clips(clips)]

    def knows(checkpoint: Any, recordings: Any, prompts: list[str], **settings: Any) -> Any:
        each = len(prompts) // 4
        asked = {question(one): one.key for one in SCORES}
        return [
            Answer(
                str(right[at // each].scores[asked[text]])
                if text in asked
                else write(right[at // each]),
                (),
                True,
            )
            for at, text in enumerate(prompts)
        ]

    monkeypatch.setattr(speech, "generate", knows)
    found = evaluate_speech(checkpoint, clips)
    assert found["skipped"] == 0 and found["exact"] == 1 and found["mean_pcc"] == pytest.approx(1)
    assert found["mean_f1"] == 1 and found["mean_iou"] == pytest.approx(1)
    short = evaluate_speech(checkpoint, clips, questions="short")
    assert short["mean_pcc"] == pytest.approx(1) and short["skipped"] == 0
    assert parse_score("3") == 3


def test_labels_that_cannot_be_read_are_left_out_and_told(
    checkpoint: Checkpoint, clips: Path
) -> None:
    rows = [json.loads(line) for line in (clips / "labels.jsonl").read_text().splitlines()]
    rows[1]["Noise Description"] = "a hum from the 2nd second on"
    (clips / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate_speech(checkpoint, clips, questions="short")
    assert found["clips"] == 3 and found["asked"] == 18
    assert len(found["unclear"]) == 1 and "1: 'Noise Description' is 'a hum" in found["unclear"][0]
    for row in rows:
        row["Noise Description"] = "?2"
    (clips / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="the labels of none of 4 clips can be read; the first: 0:"):
        evaluate_speech(checkpoint, clips)


def test_what_is_refused(checkpoint: Checkpoint, clips: Path, make_model: Any) -> None:
    with pytest.raises(SettingsError, match="questions is 'all'; expected long or short"):
        evaluate_speech(checkpoint, clips, questions="all")
    deaf = make_model()
    with pytest.raises(ArchitectureError, match="reads no recordings"):
        evaluate_speech(Checkpoint(deaf, None, anatomy_of(deaf)), clips)


def test_parsed_without_findings() -> None:
    short = Parsed({one.key: 3 for one in SCORES}, {}, True)
    rows = judge_findings([short], [Assessment({one.key: 3 for one in SCORES}, NOTHING)], [1.0])
    assert all(row["skipped"] == 1 for row in rows)
