from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError, UnknownNameError
from postlude.tuning.reinforcement import GRPO, Reward, Rollouts, parse_reward

from .jobs import CHAT, killed_at, make_job, parameters, write_lines

pytest.importorskip("trl")

PROMPTS = [{"prompt": f"q{i}:", "answer": "e"} for i in range(4)]
SMALL = {"generations": 4, "max_new_tokens": 6}


def share(completions: list[str], answer: list[str]) -> list[float]:
    """How much of a completion is the letter that is wanted."""
    return [c.count(a) / max(len(c), 1) for c, a in zip(completions, answer, strict=True)]


@pytest.fixture
def tiny(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


# The run


@pytest.mark.parametrize("lora", [False, True])
def test_the_reward_rises_and_the_log_says_how(
    data: Path, tiny: Any, tiny_tokenizer: Any, lora: bool
) -> None:
    def short_words(completions: list[str]) -> list[float]:
        return [sum(letter.isascii() for letter in text) / 6 for text in completions]

    rates = {"learning_rate": 5e-2} if lora else {}
    job = make_job(tiny, tiny_tokenizer, data, steps=12, batch_size=8, lora=lora, **rates)
    before = parameters(job.model)
    objective = GRPO(short_words, **SMALL, beta=0.02)
    objective.check(job)
    found = objective.train(job)
    rewards = [row["reward"] for row in found.log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05, rewards
    for name in (
        "loss", "learning_rate", "reward", "reward_std", "kl", "completion_length",
        "zero_variance_groups", "truncated_completions", "entropy",
    ):  # fmt: skip
        assert all(isinstance(row[name], float) for row in found.log), name
    assert found.log[0]["kl"] == pytest.approx(0, abs=1e-6) and found.log[-1]["kl"] > 1e-4
    assert found.result["first_reward"] == rewards[0]
    assert found.result["prompts"] == 4 and found.result["steps"] == 12
    assert len(found.result["samples"]) == 4
    for name, value in parameters(job.model).items():
        assert torch.equal(value, before[name]) == (lora and "lora_" not in name), name
    inner = job.model.get_base_model() if lora else job.model
    assert "forward" not in vars(inner)
    assert list(getattr(job.model, "peft_config", ["default"])) == ["default"]
    assert (job.checkpoint.tokenizer.pad_token, inner.config.pad_token_id) == (None, None)


def group_advantages(rewards: Tensor, normalize: bool) -> Tensor:
    """Of ``[groups, generations]``, one group after the other."""
    found = []
    for group in rewards.tolist():
        mean = sum(group) / len(group)
        spread = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        found.append([(r - mean) / (spread + 1e-4 if normalize else 1) for r in group])
    return torch.tensor(found)


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_against_a_loop(
    data: Path, tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    seen: list[Any] = []
    write = Rollouts._write_row

    def watched(self: Any, step: int) -> None:
        seen.append({name: list(values) for name, values in self._logs["rewards"].items()})
        seen.append(list(self._logs["advantages"]))
        write(self, step)

    monkeypatch.setattr(Rollouts, "_write_row", watched)

    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    def letters(completions: list[str], **columns: list[Any]) -> list[float]:
        assert set(columns) == {"prompts", "answer"}
        assert columns["prompts"][0].startswith("q")
        return [float(sum(map(str.isalpha, text))) for text in completions]

    job = make_job(tiny, tiny_tokenizer, data, steps=1, batch_size=8)
    GRPO((length, letters), **SMALL, normalize=normalize).train(job)
    rewards, advantages = seen
    assert list(rewards) == ["length", "letters"]
    total = sum(torch.tensor(values, dtype=torch.float64) for values in rewards.values())
    expected = group_advantages(total.reshape(2, 4), normalize).flatten()
    assert torch.allclose(torch.tensor(advantages), expected, atol=1e-4)


def test_weights_of_rewards(data: Path, tiny: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(
        "def one(completions):\n    return [1.0] * len(completions)\n"
        "def two(completions):\n    return [2.0] * len(completions)\n"
    )
    file = tmp_path / "scores.py"
    job = make_job(tiny, tiny_tokenizer, data, steps=1, batch_size=4)
    found = GRPO((f"{file}:one=0.5", f"{file}:two=-3"), **SMALL).train(job)
    assert found.log[0]["reward"] == pytest.approx(0.5 - 6)
    # No spread within a group: nothing is learned, and the log says so.
    assert found.log[0]["zero_variance_groups"] == 1
    assert found.log[0]["gradient_norm"] == 0


def test_a_killed_run_ends_with_the_same_bits(
    data: Path, tiny: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(share, **SMALL, iterations=2)

    def job(directory: str) -> Any:
        return make_job(
            tiny, tiny_tokenizer, data, epochs=2, batch_size=4, accumulate=2, directory=directory
        )

    whole = job("whole")
    expected = objective.train(whole)
    # Four prompts, two a step, each generation learned from twice, two epochs.
    assert len(expected.log) == 8
    revive = killed_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        objective.train(job("run"))
    # Between the two passes over the same answers no state is kept.
    assert [path.name for path in (data.parent / "run").glob("step-*")] == ["step-4"]
    revive()
    again = job("run")
    found = objective.train(again)
    assert [{**row, "seconds": 0} for row in found.log] == [
        {**row, "seconds": 0} for row in expected.log
    ]
    for name, value in parameters(again.model).items():
        assert torch.equal(value, parameters(whole.model)[name]), name


def test_another_reference(
    data: Path, tiny: Any, make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    other = make_model(seed=1)
    job = make_job(tiny, tiny_tokenizer, data, steps=1, batch_size=4, reference=other)
    before = parameters(other)
    found = GRPO(share, **SMALL, beta=0.1).train(job)
    assert found.log[0]["kl"] > 0.1
    assert all(torch.equal(value, before[name]) for name, value in other.named_parameters())
    assert "forward" not in vars(other)


def test_adapters_that_change_the_base_need_a_reference(
    data: Path, tiny: Any, tiny_tokenizer: Any
) -> None:
    import dataclasses

    from .jobs import with_lora

    job = make_job(tiny, tiny_tokenizer, data, steps=1, batch_size=4)
    job = dataclasses.replace(job, model=with_lora(job.model, init_lora_weights="pissa"))
    with pytest.raises(SettingsError, match="do not start from the model before tuning"):
        GRPO(share, **SMALL, beta=0.1).train(job)


def test_chats_go_through_the_template(tmp_path: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    chats = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(2)]
    job = make_job(
        tiny, tiny_tokenizer, write_lines(tmp_path / "p.jsonl", chats), steps=1, batch_size=4
    )
    seen: list[Any] = []

    def watch(completions: list[str], prompts: list[str], messages: list[Any]) -> list[float]:
        seen.append((completions, prompts, messages))
        return [0.0] * len(completions)

    objective = GRPO(watch, **SMALL)
    with pytest.raises(DataError, match="tokenizer has no chat template"):
        objective.check(job)
    job.checkpoint.tokenizer.chat_template = CHAT
    objective.check(job)
    objective.train(job)
    ((completions, prompts, messages),) = seen
    assert all(isinstance(text, str) for text in completions)
    assert set(prompts) <= {"q0", "q1"} and messages[0][0]["content"] == prompts[0]


def test_every_prompt_comes_once_in_a_pass(data: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    seen: list[str] = []

    def note(completions: list[str], prompts: list[str]) -> list[float]:
        seen.extend(prompts[::4])
        return [0.0] * len(completions)

    job = make_job(tiny, tiny_tokenizer, data, epochs=1.5, batch_size=8)
    assert GRPO(note, **SMALL).train(job).result["steps"] == 3
    assert sorted(seen[:4]) == ["q0:", "q1:", "q2:", "q3:"] and len(set(seen[4:])) == 2


# Rewards that do not what they should


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0, 3.0], "returned 3 numbers for 4 completions; expected a list with one finite"),
        ([1.0, math.nan, 0, 0], "returned nan for the completion"),
        ([1.0, 0, math.inf, 0], "returned inf for the completion"),
        ([1.0, None, 0, 0], "returned None for the completion"),
        ("abcd", "returned a str; expected a list"),
        (1.0, "returned a float; expected a list"),
    ],
)
def test_values_that_are_refused(values: Any, message: str) -> None:
    reward = Reward("my_rewards:odd", lambda completions: values)
    with pytest.raises(DataError) as caught:
        reward(["a", "b", "c", "d"], {"prompts": ["p"] * 4})
    assert str(caught.value).startswith(f"The reward my_rewards:odd {message}")


def test_values_of_other_kinds() -> None:
    for values in ((1, True), torch.tensor([1.0, 1.0]), [1, 1.0]):
        assert Reward("r", lambda completions, v=values: v)(["a", "b"], {}) == [1.0, 1.0]


def test_a_run_stops_at_a_bad_reward(data: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    def broken(completions: list[str]) -> list[float]:
        return [math.nan] * len(completions)

    job = make_job(tiny, tiny_tokenizer, data, steps=1, batch_size=4)
    with pytest.raises(DataError, match="The reward broken returned nan for the completion"):
        GRPO(broken, **SMALL).train(job)
    assert "forward" not in vars(job.model)


def test_a_reward_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "raising_t3.py"
    file.write_text(
        "import json\n\n\n"
        "def boom(completions):\n    raise ValueError('boom')\n\n\n"
        "def deep(completions):\n    return [json.loads(one) for one in completions]\n\n\n"
        "def silent(completions):\n    assert not completions\n"
    )
    monkeypatch.chdir(tmp_path)
    for function, what in (
        ("boom", "ValueError: boom (raising_t3.py line 5)"),
        (
            "deep",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (raising_t3.py line 9)",
        ),
        ("silent", "AssertionError (raising_t3.py line 13)"),
    ):
        with pytest.raises(DataError) as caught:
            parse_reward(f"raising_t3.py:{function}")(["a"], {})
        assert str(caught.value) == (
            f"The reward raising_t3.py:{function} raised {what}. Mend it, and run the same command again."
        )
        assert caught.value.__cause__ is not None


# Which reward


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards_t3.py").write_text(
        textwrap.dedent(
            """
            import math
            from collections import Counter

            LIMIT = 3

            def exact(completions, answer):
                return [float(c == a) for c, a in zip(completions, answer)]

            def shorter(completions):
                return [-len(c) for c in completions]

            def _private():
                pass
            """
        )
    )
    (tmp_path / "broken_t3.py").write_text("import no_such_library_t3\n")
    (tmp_path / "raises_t3.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_module_of_the_current_directory(rewards: Path) -> None:
    found = parse_reward("my_rewards_t3:exact")
    assert (found.name, found.weight) == ("my_rewards_t3:exact", 1.0)
    assert found(["a", "b"], {"answer": ["a", "a"], "prompts": ["", ""]}) == [1.0, 0.0]
    assert parse_reward("my_rewards_t3:exact=0.25").weight == 0.25
    assert parse_reward("./my_rewards_t3.py:shorter=-2")(["abc"], {}) == [-3.0]
    assert parse_reward(f"{rewards / 'my_rewards_t3.py'}:exact").weight == 1


def test_nothing_is_written_beside_rewards(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = sorted(rewards.iterdir())
    monkeypatch.delitem(sys.modules, "my_rewards_t3", raising=False)
    parse_reward("my_rewards_t3:exact")
    parse_reward("./my_rewards_t3.py:exact")
    assert sorted(rewards.iterdir()) == before
    assert not sys.dont_write_bytecode


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("exact", SettingsError, r"'exact' is not understood: expected module:function"),
        (":exact", SettingsError, r"is not understood"),
        ("my_rewards_t3:not a name", SettingsError, r"is not understood"),
        ("my_rewards_t3:exact=x", SettingsError, r"has the weight 'x'; expected a finite number"),
        ("my_rewards_t3:exact=nan", SettingsError, r"has the weight 'nan'"),
        ("my_rewards_t3:exakt", UnknownNameError, r"No reward function in my_rewards_t3 named .* Did you mean 'exact'"),
        ("my_rewards_t3:LIMIT", UnknownNameError, r"named 'LIMIT'"),
        ("my_reward_t3:exact", UnknownNameError, r"No module of rewards named .* Did you mean 'my_rewards_t3'"),
        ("./my_reward_t3.py:exact", UnknownNameError, r"named 'my_reward_t3.py'. Did you mean 'my_rewards_t3.py'"),
        ("nowhere/at/all.py:exact", UnknownNameError, r"named 'all.py'"),
        ("broken_t3:exact", SettingsError, r"broken_t3 holds rewards and cannot be imported: ModuleNotFoundError"),
        ("raises_t3:exact", SettingsError, r"cannot be imported: ZeroDivisionError"),
        ("raises_t3.py:exact", SettingsError, r"cannot be imported: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_words_that_name_no_reward(
    rewards: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        parse_reward(text)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_changed_reward_is_another_run(rewards: Path) -> None:
    objective = GRPO("./my_rewards_t3.py:exact=2", **SMALL)
    before = objective.describe()
    assert before["reward"][0]["name"] == "./my_rewards_t3.py:exact"
    assert (before["objective"], before["generations"], before["reward"][0]["weight"]) == (
        "grpo",
        4,
        2,
    )
    assert objective.describe() == before
    with open(rewards / "my_rewards_t3.py", "a") as file:
        file.write("# changed\n")
    assert objective.describe() != before
    assert GRPO(share, **SMALL).describe() == GRPO(share, **SMALL).describe()
    assert not GRPO(share).needs_reference and GRPO(share, beta=0.1).needs_reference


def test_a_function_that_takes_no_completions(data: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    def odd(texts: list[str]) -> list[float]:
        return []

    job = make_job(tiny, tiny_tokenizer, data, batch_size=4)
    with pytest.raises(SettingsError, match=r"odd takes texts; expected a function \(completions"):
        GRPO(odd, **SMALL).check(job)


def test_a_column_that_is_not_there(data: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    def graded(completions: list[str], solution: list[str]) -> list[float]:
        return []

    job = make_job(tiny, tiny_tokenizer, data, batch_size=4)
    with pytest.raises(
        DataError, match=r"graded asks for the column 'solution', and .*line 1 has 'answer'"
    ):
        GRPO(graded, **SMALL).check(job)


# Data and sizes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r"line 2 has keys \['question'\]; expected \"prompt\""),
        ({"prompt": ""}, r"line 2 has an empty prompt"),
        ({"prompt": 3}, r'line 2: expected "prompt" as a string or a list of objects'),
        ({"prompt": []}, r'line 2: expected "prompt" as a string'),
        ({"prompt": "q", "completions": 1}, r"line 2 has a column 'completions', which rewards"),
        ({"prompt": [{"role": "user", "content": "q"}]}, r"line 1 has a prompt that is a string and .*line 2"),
    ],
)  # fmt: skip
def test_lines_that_are_refused(
    tmp_path: Path, tiny: Any, tiny_tokenizer: Any, row: Any, message: str
) -> None:
    data = write_lines(tmp_path / "p.jsonl", [{"prompt": "q"}, row])
    job = make_job(tiny, tiny_tokenizer, data, batch_size=4)
    job.checkpoint.tokenizer.chat_template = CHAT
    with pytest.raises(DataError) as caught:
        GRPO(lambda completions: [], **SMALL).check(job)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_sizes_that_do_not_fit(data: Path, tiny: Any, tiny_tokenizer: Any) -> None:
    def refused(pattern: str, objective: GRPO, **run: Any) -> None:
        with pytest.raises(SettingsError) as caught:
            objective.check(make_job(tiny, tiny_tokenizer, data, **run))
        assert re.search(pattern, str(caught.value)), str(caught.value)

    small = GRPO(share, **SMALL)
    refused(r"A step holds 6 answers .* no whole number of groups of 4", small, batch_size=6)
    refused(r"more than the 64 of this run", GRPO(share, max_new_tokens=62), batch_size=8)
    refused(r"more than the 9 of this run", small, batch_size=4, max_length=9)
    refused("grpo does not pack rows", small, packing=True)
    refused("grpo needs a reward: name a function", GRPO(**SMALL), batch_size=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"generations": 1}, {"max_new_tokens": 0}, {"iterations": 0}, {"temperature": 0.0},
        {"clip_ratio": -1.0}, {"beta": -0.1}, {"beta": math.inf}, {"loss_type": "ppo"},
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(SettingsError, match=rf"{name} is .*; expected"):
        GRPO(**settings)
