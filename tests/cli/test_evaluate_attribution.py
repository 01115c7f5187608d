from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from postlude import registry
from postlude.evaluation.lds import Retraining


@pytest.fixture(autouse=True)
def _two_methods(methods: None) -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        """Settings."""

        rank: int = 1

    for name in ("lorif", "logra", "graddot", "bm25"):
        registry._METHODS["attribute", name] = registry.MethodInfo(
            "attribute", name, "influence", "", (), Settings
        )


def test_lds(door: Any, postlude_command: Any) -> None:
    door.results["evaluate_lds"] = {"methods": [{"method": "lorif", "lds": 0.5}]}
    done = postlude_command(
        "evaluate", "lds", "ckpt", "train.jsonl", "--methods", "lorif, logra", "--queries", "q.jsonl",
        "--subsets", 10, "--seeds", 2, "--epochs", 3, "--rate", "1e-3", "--batch", 4, "--max-length", 64,
        "--run", "runs/a", "--seed", 5, "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert done.json == {"methods": [{"method": "lorif", "lds": 0.5}]}
    assert door.calls == [
        ("load", ("ckpt",), {"dtype": "float32", "device": None}),
        (
            "evaluate_lds",
            ("<ckpt>", "train.jsonl", ["lorif", "logra"]),
            {
                "queries": "q.jsonl",
                "subsets": 10,
                "seeds": 2,
                "training": Retraining(epochs=3, rate=1e-3, batch=4),
                "max_length": 64,
                "run": "runs/a",
                "overwrite": False,
                "seed": 5,
            },
        ),
    ]


def test_lds_holds_queries_out_by_default(door: Any, postlude_command: Any) -> None:
    words = ("evaluate", "lds", "ckpt", "train.jsonl", "--methods", "lorif", "--json")
    assert postlude_command(*words, "--held-out", 7).code == 0
    assert door.calls[-1][2]["queries"] == 7
    assert postlude_command(*words).code == 0
    assert (door.calls[-1][2]["queries"], door.calls[-1][2]["subsets"]) == (60, 100)


COST = {"bytes_per_example": 1656.2, "build_cpu_seconds": 2.8123, "query_cpu_seconds": 0.312345}
LONG = "lorif (rank=4, format=int8, damping=2.0)"


def test_lds_fits_eighty_columns(
    door: Any, postlude_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    low = {"lds": -0.1234567, "low": -0.1834567, "high": -0.0734567, **COST}
    door.results["evaluate_lds"] = {
        "examples": 240, "queries": 60, "subsets": 10, "seeds": 2, "training": Retraining(),
        "query_loss_before": 2.3456789, "query_loss": 1.23456, "query_loss_of_halves": 1.5,
        "seed_correlation": 0.61234, "seconds": 31.23456, "notes": ["10 halves are few"],
        "methods": [
            {"method": LONG, "above_controls": True, **low},
            {"method": "bm25", "above_controls": None, **low},
        ],
    }  # fmt: skip
    out = postlude_command("evaluate", "lds", "ckpt", "t.jsonl", "--methods", "lorif").out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines()) and "\u2026" not in out
    for shown in ("-0.123 [-0.183, -0.073]", "1,656", "0.312", "yes", "control", "note: 10 halves"):
        assert shown in out


@pytest.mark.parametrize("facts", [0, 20])
def test_retrieval_fits_eighty_columns(
    door: Any, postlude_command: Any, monkeypatch: pytest.MonkeyPatch, facts: int
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row: dict[str, Any] = {"exact_top1": 1.0, "noised_above_controls": False, **COST}
    row |= {"noised_top1": 0.85, "noised_top1_low": 0.7166, "noised_top1_high": 0.95}
    row |= {"planted_recall": 0.25, "planted_recall_low": 0.1, "planted_recall_high": 0.4}
    row |= {"planted_above_controls": True}
    door.results["evaluate_retrieval"] = {
        "examples": 320, "queries": 60, "share": 0.3, "facts": facts, "training": Retraining(),
        "seconds": 3.0, "methods": [{"method": LONG, **row}, {"method": "graddot", **row}],
    }  # fmt: skip
    out = postlude_command("evaluate", "retrieval", "ckpt", "t.jsonl", "--methods", "lorif").out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines()) and "\u2026" not in out
    assert "0.85 [0.72, 0.95]" in out
    assert ("0.25 [0.10, 0.40]" in out) == bool(facts)


@pytest.mark.parametrize("verb", ["lds", "retrieval"])
def test_settings_of_methods(door: Any, postlude_command: Any, verb: str) -> None:
    words = ("evaluate", verb, "ckpt", "t.jsonl", "--methods", "lorif,logra", "--json", "--set")
    done = postlude_command(*words, "lorif.rank=4", "--set", "bm25.rank=2")
    assert done.code == 0
    lorif, logra, bm25 = door.calls[-1][1][2]
    assert (lorif.rank, logra, bm25.rank) == (4, "logra", 2)
    before = len(door.calls)
    for word, message in (
        ("lorfi.rank=4", "Did you mean 'lorif'"),
        ("lorif.rnak=4", "Did you mean 'rank'"),
        ("lorif.rank=four", "rank=four does not fit lorif"),
        ("rank=4", "expected METHOD.KEY=VALUE"),
        ("graddot.rank=4", "graddot is not asked"),
    ):
        done = postlude_command(*words, word)
        assert (done.code, message in done.json["error"]["message"]) == (2, True), done.json
    assert len(door.calls) == before


def test_retrieval(door: Any, postlude_command: Any) -> None:
    done = postlude_command(
        "evaluate", "retrieval", "ckpt", "train.jsonl", "--methods", "logra", "--share", 0.5, "--facts", 0,
        "--json",
    )  # fmt: skip
    assert done.code == 0
    assert door.calls[-1][:2] == ("evaluate_retrieval", ("<ckpt>", "train.jsonl", ["logra"]))
    assert door.calls[-1][2]["share"] == 0.5
    assert door.calls[-1][2]["facts"] == 0


@pytest.mark.parametrize("verb", ["lds", "retrieval"])
def test_refusals_come_before_loading(door: Any, postlude_command: Any, verb: str) -> None:
    done = postlude_command("evaluate", verb, "ckpt", "t.jsonl", "--methods", "lorfi", "--json")
    assert done.code == 2
    assert "Did you mean 'lorif'" in done.json["error"]["message"]
    done = postlude_command("evaluate", verb, "ckpt", "t.jsonl", "--methods", "lorif", "--rate", 0)
    assert (done.code, "rate is 0" in done.err) == (2, True)
    assert door.calls == []
    for words in (["--help"], ["-h"]):
        out = postlude_command("evaluate", verb, *words).out
        assert "--json" in out and "--seed" in out


def test_a_directory_named_like_a_command_is_still_a_checkpoint(
    door: Any, postlude_command: Any
) -> None:
    assert postlude_command("evaluate", "./lds", "--text", "t.txt", "--json").code == 0
    assert door.calls[0][1] == ("./lds",)
