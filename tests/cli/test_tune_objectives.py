"""``postlude tune`` with objectives on TRL, from the files to the saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

REWARDS = """
def letters(completions, letter):
    return [float(text.count(one)) for text, one in zip(completions, letter)]

def short(completions):
    return [1.0]

def boom(completions):
    raise ValueError("boom")

calls = []

def later(completions):
    calls.append(1)
    return boom(completions) if len(calls) == 2 else [float(len(text)) for text in completions]
"""
SIZES = ("--steps", 2, "--batch-size", 4, "--learning-rate", "1e-3", "--device", "cpu")
GRPO = ("--objective", "grpo", "--set", "generations=2", "--set", "max_new_tokens=4")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARDS)
    prompts = [{"prompt": f"q{i}", "letter": "e"} for i in range(4)]
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "weight": i} for i in range(4)]
    for name, rows in (("prompts", prompts), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_grpo(work: Path, tiny_llama_dir: Path, postlude_command: Any) -> None:
    from postlude import _front_door

    done = postlude_command(
        "tune", tiny_llama_dir, "prompts.jsonl", *GRPO, *SIZES, "-o", "rl", "--json",
        "--reward", "rewards_of_a_test:letters", "--reward", "rewards_of_a_test.py:letters=-0.5",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert (found["objective"], found["steps"]) == ("grpo", 2)
    assert [one["weight"] for one in found["reward"]] == [1.0, -0.5]
    rows = [json.loads(line) for line in (work / "rl" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and "reward" in rows[0]
    assert "Reward" in (work / "rl" / "report.html").read_text()
    assert _front_door.load("rl").tokenizer.pad_token is None
    compared = postlude_command("inspect", "compare", tiny_llama_dir, "rl", "--layers", 0, "--json")
    assert compared.json["updates"][0]["relative_norm"] is not None


def test_dpo(work: Path, tiny_llama_dir: Path, postlude_command: Any) -> None:
    done = postlude_command(
        "tune", tiny_llama_dir, "pairs.jsonl", "--objective", "dpo", *SIZES, "--adapter", "lora",
        "--rank", 2, "--set", "beta=0.2", "-o", "tuned", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert (found["objective"], found["beta"], found["pairs"], found["left_out"]) == (
        "dpo",
        0.2,
        3,
        1,
    )
    assert (work / "tuned" / "adapter_config.json").is_file()
    assert not (work / "tuned" / "ref").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prompts.jsonl", *GRPO), "grpo needs a reward: name a function"),
        (("prompts.jsonl", *GRPO, "--reward", "rewards_of_a_test:leters"), "Did you mean 'letters'"),
        (("prompts.jsonl", *GRPO, "--reward", "reward_of_a_test:letters"), "No module of rewards named"),
        (("prompts.jsonl", *GRPO, "--reward", "rewards_of_a_test:short"), "returned 1 numbers for 4 completions"),
        (("prompts.jsonl", *GRPO, "--reward", "rewards_of_a_test:boom"), "ValueError: boom (rewards_of_a_test.py line"),
        (("pairs.jsonl", *GRPO, "--reward", "rewards_of_a_test:letters"), "asks for the column 'letter'"),
        (("prompts.jsonl", "--reward", "rewards_of_a_test:letters"), "--reward is for --objective grpo"),
        (("prompts.jsonl", "--objective", "dpo"), "line 1 has keys ['letter', 'prompt']; expected"),
        (("pairs.jsonl", "--objective", "dpo", "--packing"), "dpo does not pack rows"),
    ],
)  # fmt: skip
def test_what_is_refused(
    work: Path, tiny_llama_dir: Path, postlude_command: Any, words: tuple[str, ...], message: str
) -> None:
    before = sorted(path.name for path in work.iterdir())
    done = postlude_command("tune", tiny_llama_dir, *words, *SIZES, "-o", "out", "--json")
    assert done.code == 2, done.err
    assert message in " ".join(done.json["error"]["message"].split())
    assert sorted(path.name for path in work.iterdir() if path.name != "__pycache__") == before


def test_a_reward_that_raises_later_leaves_the_saved_states(
    work: Path, tiny_llama_dir: Path, postlude_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.tuning import trainer

    monkeypatch.setattr(trainer, "_SECONDS_BETWEEN_STATES", 0.0)
    words = (
        "tune", tiny_llama_dir, "prompts.jsonl", *GRPO, *SIZES,
        "--reward", "rewards_of_a_test.py:later", "-o", "out",
    )  # fmt: skip
    stopped = postlude_command(*words, "--json")
    assert stopped.code == 2, stopped.err
    assert "raised ValueError: boom" in stopped.json["error"]["message"]
    assert (work / ".out.run" / "states" / "step-1").is_dir()
    assert postlude_command(*words).code == 0
