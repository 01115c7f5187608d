from __future__ import annotations

from typing import Any

import pytest

from postlude import registry
from postlude.evaluation.lds import Retraining


@pytest.fixture(autouse=True)
def _two_methods(methods: None) -> None:
    class Settings:
        """Settings."""

    for name in ("lorif", "logra"):
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


def test_retrieval(door: Any, postlude_command: Any) -> None:
    done = postlude_command(
        "evaluate", "retrieval", "ckpt", "train.jsonl", "--methods", "logra", "--share", 0.5, "--facts", 0,
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
