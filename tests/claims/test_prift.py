"""The scripts of the PriFT claim: every rule takes part, the task is what it says, and the toy shows the effect."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude import registry

FOLDER = Path(__file__).resolve().parents[2] / "claims"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The modules of claims/, which import each other by their plain names."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("_arithmetic", "_models", "_toy", "_weightings", "prift")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == FOLDER:
                del sys.modules[name]


class Letters:
    """A tokenizer of one token a letter."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: str) -> Any:
        self.input_ids = [2 + ord(letter) for letter in text]
        return self


def test_every_rule_takes_part_with_every_signal(scripts: Any) -> None:
    found = scripts["_weightings"].variants()
    rules = {info.name for info in registry.available("tune") if info.family == "token weights"}
    assert {one.rule.name for one in found.values()} >= rules
    cached = scripts["_weightings"].variants("cached")
    assert list(cached) == list(found)
    assert cached["prift-mass"].signal == "cached" and cached["nucleus"].signal == "online"
    both = scripts["prift"].pairs(list(found))
    assert both["dft -> prift-prob"] == ("dft", "prift-prob")
    assert both["eaft"] == ("eaft, online", "eaft, reference")


def test_problems_are_solved_by_their_solutions(scripts: Any) -> None:
    problems = scripts["_arithmetic"].make(50, 0)
    assert problems == scripts["_arithmetic"].make(50, 0) != scripts["_arithmetic"].make(50, 1)
    for one in problems:
        first, second, third = (int(letter) for letter in one.prompt if letter.isdigit())
        assert int(one.answer) == first + second - third
        assert scripts["_models"].solved(one.completion, one.answer)
        assert not scripts["_models"].solved(one.completion.removesuffix("."), one.answer)


def test_only_solutions_are_spoiled(scripts: Any) -> None:
    task = scripts["_arithmetic"]
    rows = task.encode(Letters(), task.make(200, 0))
    spoiled = task.corrupt(rows, 0.4, 512, seed=0)
    changed = spoiled.ids != rows.ids
    assert not changed[rows.trained == 0].any()
    ends = rows.attended.sum(1) - 1
    assert (spoiled.ids[torch.arange(200), ends] == Letters.eos_token_id).all()
    assert changed[rows.trained == 1].double().mean() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(task.corrupt(rows, 0.0, 512, seed=0).ids, rows.ids)


def test_the_interval_of_a_difference(scripts: Any) -> None:
    # Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.303.
    assert scripts["prift"].difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == "+2.000 ± 2.484"
    assert scripts["prift"].difference([1.0, 1.1, 1.2], [0.0, 0.0, 0.0]) == "**+1.100 ± 0.248**"


@pytest.mark.slow
def test_a_frozen_prior_forgets_less_under_noise(scripts: Any) -> None:
    """The claim's toy at a third of its length, one world."""
    toy, weightings = scripts["_toy"], scripts["_weightings"].variants()
    worlds = [toy.pretrained(seed) for seed in range(3)]
    found = {
        name: [
            world.measure(toy.tuned(world, weightings[name], 0.4, seed, steps=200, rate=3e-3))
            for seed, world in enumerate(worlds)
        ]
        for name in ("sft", "prift-prob", "dft")
    }
    mean = {
        name: {key: sum(one[key] for one in values) / len(values) for key in toy.COLUMNS}
        for name, values in found.items()
    }
    assert mean["prift-prob"]["forgetting"] < 0.6 * mean["sft"]["forgetting"]
    assert mean["prift-prob"]["target_kl"] < 0.6 * mean["sft"]["target_kl"]
    assert mean["dft"]["target_kl"] > 2 * mean["sft"]["target_kl"]
