"""A few cases of the fault suite (`make faults`), its judgement of them, and its page."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no fork and no SIGKILL")


@pytest.fixture(scope="module")
def suite() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    from faults import suite

    suite.all_faults()
    yield suite
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def work(suite: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from faults import inputs

    work = suite.Work(tmp_path_factory.mktemp("faults") / "work", seed=1)
    inputs.warm(everything=False)
    inputs.make(work)
    return work


EVERYDAY = [
    "SIGKILL at a random moment, `quantize`",
    "one bit flipped, header of `model.safetensors`",
    "one bit flipped, weights that Postlude wrote",
    "cut off, `model.safetensors`",
    "hostile, a pickle in the place of tensors",
    "hostile, headers of safetensors",
    "hostile, NaN and infinity among the weights",
    "hostile, paths that lead out of their folder",
    "hostile, YAML of a recipe",
    "hostile, JSON in JSON in JSON",
]


def test_these_are_the_everyday_ones(suite: Any) -> None:
    found = [f"{one.family}, {one.name}" for one in suite.all_faults() if one.everyday]
    assert sorted(found) == sorted(EVERYDAY)


@pytest.mark.parametrize("name", EVERYDAY)
def test_two_of_a_kind(suite: Any, work: Any, name: str) -> None:
    fault = next(one for one in suite.all_faults() if f"{one.family}, {one.name}" == name)
    trials = list(itertools.islice(fault.trials(work, 2), 2))
    assert len(trials) == 2
    assert not [trial for trial in trials if trial.outcome == "FAILED"], trials
    assert all(trial.outcome in suite.OUTCOMES for trial in trials)


def test_what_was_executed_is_seen(suite: Any, work: Any) -> None:
    def evil() -> None:
        work.sentinel.touch()

    assert "CODE WAS EXECUTED" in suite.harm(work, suite.command(evil))
    assert not work.sentinel.exists()
    assert suite.harm(work, suite.command(lambda: None)) == []


def test_what_hangs_dies_or_raises_is_seen(suite: Any, work: Any) -> None:
    from postlude.errors import DataError

    def refuse() -> None:
        raise DataError("file.txt line 1 is no text.")

    def endless() -> None:
        while True:
            pass

    inputs = suite.contents(work.inputs)
    judged = suite.judge_refusal(work, suite.command(refuse), inputs, [], r"file\.txt")
    assert judged.outcome == "refused"
    judged = suite.judge_refusal(work, suite.command(refuse), inputs, [], r"other\.txt")
    assert judged.outcome == "FAILED" and "lacks" in judged.about
    judged = suite.judge_refusal(work, suite.command(lambda: 1 / 0), inputs, [], "")
    assert judged.outcome == "FAILED" and "a traceback" in judged.about
    judged = suite.judge_refusal(work, suite.command(endless, seconds=0.2), inputs, [], "")
    assert judged.outcome == "FAILED" and "signal 9" in judged.about
    judged = suite.judge_refusal(work, suite.command(refuse), {}, [work.inputs], "")
    assert "inputs changed" in judged.about and "wrote inputs" in judged.about


def test_the_table_is_written_between_its_marks(suite: Any, tmp_path: Path) -> None:
    from faults.__main__ import write

    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- measured: faults -->\nold\n<!-- end: faults -->\nAfter.\n")
    found = {("cut off", "a file"): [suite.Trial("refused"), suite.Trial("FAILED")]}
    lines = suite.table(found)
    assert lines[-1].startswith("| **all** | | **2** | 0 | 1 |") and lines[-1].endswith("| 1 |")
    write(lines, page)
    text = page.read_text()
    assert "old" not in text and text.startswith("Before.") and text.endswith("After.\n")
    assert "| cut off | a file | 2 |  | 1 |" in text
