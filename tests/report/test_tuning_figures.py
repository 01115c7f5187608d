"""Which figures the page of a run has, by what its objective logs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from postlude.report.tuning import evaluation, headline, render

COMMON = {"learning_rate": 1e-5, "loss": 0.5, "gradient_norm": 1.0}
REWARDS = {"reward": 0.5, "reward_std": 0.1, "kl": 0.01, "zero_variance_groups": 0.25}
PAIRS = {"accuracy": 0.75, "margin": 0.5, "chosen_reward": 0.2, "rejected_reward": -0.3}


@pytest.mark.parametrize(
    ("columns", "titles", "verdict"),
    [
        ({"mean_loss": 2.0}, ["Loss", "Learning rate", "Gradient"], "The unweighted loss went from 2"),
        (
            REWARDS,
            ["Reward", "Loss", "Divergence from the reference", "What teaches nothing", "Learning rate", "Gradient"],
            "The mean reward went from 0.5",
        ),
        (PAIRS, ["Pairs in the right order", "Margin", "Loss", "Learning rate", "Gradient"], "The loss went from 0.5"),
    ],
)  # fmt: skip
def test_figures(columns: dict[str, float], titles: list[str], verdict: str) -> None:
    log = [{"step": step, **COMMON, **columns} for step in range(1, 6)]
    page = render({"objective": "some", "steps": 5}, log)
    assert re.findall(r"<h3>(.*?)</h3>", page) == titles
    assert verdict in page


def test_answers_and_rewards_are_told() -> None:
    result: dict[str, Any] = {
        "objective": "grpo",
        "reward": [{"name": "mine:exact", "weight": 0.5, "source": "abc"}],
        "samples": [{"prompt": "<q>", "completion": "a & b", "rewards": [1.0, 0.25]}],
    }
    page = render(result, [{"step": 1, **COMMON, **REWARDS}])
    assert "mine:exact x 0.5" in page and "abc" not in page
    assert "&lt;q&gt;" in page and "a &amp; b" in page and "1, 0.25" in page


def test_rewards_by_dimension_follow_the_reward() -> None:
    from postlude.tuning.speech_rewards import SPEECH_REWARDS

    names = SPEECH_REWARDS["speech-verifiable"]("").dimensions
    columns = {f"reward.{name}": 0.5 + 0.01 * at for at, name in enumerate(names)}
    log = [
        {"step": step, **COMMON, **columns, **REWARDS, "answers_per_second": 9.0}
        for step in range(1, 6)
    ]
    page = render({"objective": "grpo", "steps": 5, "final_rewards": {"noi": 0.5}}, log)
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles[:3] == ["Reward", "Reward by dimension", "Reward by dimension, continued"]
    assert "Speed" in titles and "reward.noi" not in titles
    for words in ("background noise", "overall quality", "noise: when", "pause: what", "format"):
        assert f">{words}</th>" in page, words


def test_every_line_of_the_dimensions_is_named_where_all_are_the_same() -> None:
    names = ("noise", "dist", "pause", "noise_times", "dist_times", "pause_times", "format")
    columns = {f"reward.{name}": 0.0 for name in ("noi", "dis", "con", "eff", "nat", "mos", *names)}
    page = render({"objective": "grpo", "steps": 2}, [{"step": 1, **columns, **REWARDS}] * 2)
    for words in ("background noise", "noise: what", "dist: when", "format"):
        assert f">{words}</th>" in page and f">{words}</text>" in page, words


def test_what_was_asked_and_what_one_answer_gets() -> None:
    result = {
        "objective": "grpo",
        "reward": [{"name": "speech-verifiable", "weight": 1.0, "source": None}],
        "encoder": "trained",
        "generations": 4,
        "beta": 0.04,
        "credit": "dimension",
        "prompts": 960,
        "steps": 200,
        "answers_per_second": 12.34,
        "baseline_reward": 0.6543,
        "baseline_answer": "noi=5 | noise none",
        "clips": "two words/test",
    }
    first, second, *_ = headline(result, [])[1:]
    assert first == (
        "960 clips, 4 answers to each (G), 200 steps; reward speech-verifiable, beta 0.04, credit by dimension; "
        "12.3 answers per second."
    )
    assert (
        "the commonest answer given to every clip gets a reward of 0.654: noi=5 | noise" in second
    )
    assert evaluation(result).endswith("--data 'two words/test'")
