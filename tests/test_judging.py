"""Attribution judged by evaluation, on a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude import _front_door, _judging
from postlude.attribution.graddot import GradDot
from postlude.attribution.lorif import LoRIF
from postlude.errors import DataError, RunDirectoryError, SettingsError, UnknownNameError
from postlude.evaluation.lds import Retraining
from postlude.quantization.rtn import RTN

TRAINING = Retraining(epochs=1, rate=1e-2, batch=4)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_dir: Path) -> Any:
    return pl.load(tiny_llama_dir, dtype="float32")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    words = ("boat", "shore", "bird", "reeds", "water", "night", "calm", "spoke")
    return [f"the {a} and the {b}" for a in words for b in words if a < b][:16]


def test_lds_of_methods(checkpoint: Any, texts: list[str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "queries": 4, "subsets": 4, "seeds": 2, "training": TRAINING, "run": tmp_path / "run",
    }  # fmt: skip
    result = _front_door.evaluate_lds(checkpoint, texts, [LoRIF(rank=2), "bm25"], **asked)
    names = [row["method"] for row in result["methods"]]
    assert names == ["lorif (rank=2)", "bm25", "repsim"]
    assert [row["control"] for row in result["methods"]] == [False, True, True]
    for row in result["methods"]:
        assert -1 <= row["low"] <= row["lds"] <= row["high"] <= 1
        assert row["bytes_per_example"] > 0
        assert (
            row["above_controls"] is None
            if row["control"]
            else row["above_controls"] in (True, False)
        )
    assert "4 halves are few" in result["notes"][0]
    assert (result["examples"], result["queries"]) == (12, 4)
    assert -1 <= result["seed_correlation"] <= 1
    assert result["query_loss"] < result["query_loss_before"]

    # Everything trained is there: again is the same, and trains nothing.
    again = _front_door.evaluate_lds(checkpoint, texts, [LoRIF(rank=2), "bm25"], **asked)
    for first, second in zip(result["methods"], again["methods"], strict=True):
        assert first["lds"] == second["lds"]
    with pytest.raises(RunDirectoryError, match=r"training\.rate"):
        other = {**asked, "training": dataclasses.replace(TRAINING, rate=2e-2)}
        _front_door.evaluate_lds(checkpoint, texts, ["bm25"], **other)


def test_retrieval_of_methods(checkpoint: Any, texts: list[str]) -> None:
    result = _front_door.evaluate_retrieval(
        checkpoint, texts, [GradDot()], queries=6, facts=2, training=TRAINING
    )
    assert [row["method"] for row in result["methods"]] == ["graddot", "bm25", "repsim"]
    assert result["examples"] == 16 + 8
    graddot, bm25 = result["methods"][:2]
    for key in ("noised_above_controls", "planted_above_controls"):
        assert isinstance(graddot[key], bool) and bm25[key] is None
    # Exact copies share every token.
    assert bm25["exact_top1"] == 1.0
    assert 0 <= bm25["planted_recall_low"] <= bm25["planted_recall"] <= bm25["planted_recall_high"]
    without = _front_door.evaluate_retrieval(
        checkpoint, texts, ["bm25"], queries=6, facts=0, training=TRAINING
    )
    assert "planted_recall" not in without["methods"][0]
    assert "planted_above_controls" not in without["methods"][0]


def test_marks_are_paired_with_the_best_control() -> None:
    worse, best = torch.tensor([0.1, 0.5, 0.3, 0.2]), torch.tensor([0.2, 0.6, 0.4, 0.3])
    values = [worse, best, best + 0.01, best - 0.01, best]
    rows: list[dict[str, Any]] = [{"control": number < 2} for number in range(5)]
    _judging._mark(rows, "above", values, seed=0)
    assert [row["above"] for row in rows] == [None, None, True, False, False]


def test_queries_of_their_own(checkpoint: Any, texts: list[str]) -> None:
    result = _front_door.evaluate_lds(
        checkpoint, texts[:8], ["bm25"], queries=texts[8:11], subsets=2, training=TRAINING
    )
    assert (result["examples"], result["queries"], result["seed_correlation"]) == (8, 3, None)


def test_refusals(checkpoint: Any, texts: list[str]) -> None:
    with pytest.raises(UnknownNameError, match="'lorif'"):
        _judging.methods_of(["lorfi"])
    with pytest.raises(SettingsError, match="holds a RTN"):
        _judging.methods_of([RTN()])  # type: ignore[list-item]
    with pytest.raises(DataError, match="60 of 16 examples"):
        _front_door.evaluate_lds(checkpoint, texts, ["bm25"])
    pairs = [{"prompt": "a", "completion": f"b{i}"} for i in range(10)]
    with pytest.raises(DataError, match="whole texts"):
        _front_door.evaluate_lds(checkpoint, pairs, ["bm25"], queries=2)
