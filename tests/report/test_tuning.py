from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postlude.report.tuning import render, write

RESULT = {
    "output": "tuned/<b>",
    "rule": "prift-mass",
    "settings": {"tau": 0.5},
    "adapter": "lora",
    "loss": 0.5,
    "steps": 100,
    "epochs": 2.0,
    "max_length": 64,
    "skipped_steps": 1,
    "data": {"sequences": 1200, "tokens": 9000, "response_tokens": 4000, "truncated": 3, "lost_tokens": 50},
    "prior": {"reference": "abc"},
    "merge_difference": None,
}  # fmt: skip


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1 / step,
        "mean_loss": 2 / step,
        "learning_rate": 1e-5,
        "effective_tokens": 20.0,
        "tokens": 40.0,
        "kept_share": 0.5,
        "mean_weight": 0.5,
        "eos_share": 0.0,
        "gradient_norm": 1.0,
        "seconds": 0.1,
    }


def test_the_page() -> None:
    page = render(RESULT, [row(step) for step in range(1, 101)])
    assert "Tuning by prift-mass with lora" in page
    assert "were seen twice in 100 steps" in page
    assert "3 sequences were cut at 64 tokens and lost 50 tokens" in page
    assert "1 step had no token of any weight" in page
    assert "The unweighted loss went from 0.586 in the first 10 steps to 0.021 in the last." in page
    for title in ("Loss", "Learning rate", "Effective tokens", "Weights", "Gradient"):
        assert f"<h3>{title}</h3>" in page
    assert "Each point is the mean of 3 steps." in page
    assert "tuned/&lt;b&gt;" in page and "<b>" not in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert "abc" not in page
    assert "--text other.txt --reference CHECKPOINT" in page and "millionths" not in page


def test_the_next_command_has_the_paths_of_the_run() -> None:
    result = {**RESULT, "output": "my out", "checkpoint": "models/base"}
    page = render(result, [row(step) for step in range(1, 8)])
    assert "evaluate &#39;my out&#39; --text other.txt --reference models/base" in page


@pytest.mark.parametrize("steps", [1, 2, 41])
def test_other_objectives_have_a_page(steps: int, tmp_path: Path) -> None:
    log = [{"step": s, "loss": 0.1, "surprise": float(s), "note": "x"} for s in range(1, steps + 1)]
    write(tmp_path, {"objective": "grpo", "steps": steps}, log)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Tuning by grpo" in page and "<h3>surprise</h3>" in page
    assert json.dumps("x") not in page


def test_numbers_that_are_not_finite_are_left_out() -> None:
    log = [row(step) for step in range(1, 8)]
    log[3]["gradient_norm"] = None
    log[4]["loss"] = float("nan")
    assert "<h3>Loss</h3>" in render(RESULT, log)
