"""A stage runs once, again when something it depends on changed, and goes on after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from postlude.errors import DataError, RunDirectoryError, StageError
from postlude.recipes.commands import Command, Parameter
from postlude.recipes.recipe import Recipe, read
from postlude.recipes.run import pending, run, state

WORD = Parameter("word", "--word", str)
SOURCE = Parameter("source", "", str, required=True)
COMMANDS = {
    "copy": Command("copy", (SOURCE,), (WORD,), output="--output", output_name="text.txt"),
    "look": Command("look", (SOURCE,), ()),
}
TEXT = """\
variables: {first: FIRST}
stages:
  one: {copy: "${first}", word: a}
  two: {copy: "${one}", word: b}
  seen: {look: "${two}"}
  other: {copy: "${first}", word: c}
"""


class Machine:
    """Two commands, the calls of them, and an error on demand."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, BaseException] = {}

    def __call__(self, words: Sequence[str]) -> object:
        given = list(words)
        if given[0] == "look":
            self.calls.append("look")
            return {"length": len(Path(given[1]).read_text())}
        word, source, target = given[2], given[3], given[5]
        self.calls.append(word)
        if word in self.failing:
            raise self.failing.pop(word)
        Path(target).write_text(Path(source).read_text() + word)
        return {"word": word}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    first = tmp_path / "first.txt"
    first.write_text("x")
    return written(tmp_path, TEXT)


def written(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("FIRST", str(tmp_path / "first.txt")))
    return read(file, COMMANDS)


def results(out: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in out.glob("stages/*/text.txt")}


def test_stages_feed_each_other_and_run_once(recipe: Recipe, tmp_path: Path) -> None:
    machine, out = Machine(), tmp_path / "run"
    assert pending(recipe, out) == {"one", "two", "seen", "other"}
    done = run(recipe, out, machine)
    assert results(out) == {"one": "xa", "two": "xab", "other": "xc"}
    assert machine.calls == ["a", "b", "look", "c"]
    assert [one.reused for one in done] == [False] * 4
    again = run(recipe, out, machine)
    assert machine.calls == ["a", "b", "look", "c"]
    assert [one.reused for one in again] == [True] * 4
    assert [one.result for one in again] == [one.result for one in done]
    summary, stages = state(out)
    assert summary["stages"] == ["one", "two", "seen", "other"]
    assert stages[2].result == {"length": 3}
    assert pending(recipe, out) == set()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("an option", ["b2", "look"]),
        ("a file", ["a", "b", "look", "c"]),
        ("an output", ["b"]),
        ("a lost output", ["a"]),
        ("a record", ["look"]),
        ("a number in a record", ["look"]),
    ],
)
def test_what_changed_is_done_again_and_nothing_else(
    recipe: Recipe, tmp_path: Path, change: str, again: list[str]
) -> None:
    out = tmp_path / "run"
    run(recipe, out, Machine())
    if change == "an option":
        recipe = written(tmp_path, TEXT.replace("word: b", "word: b2"))
    elif change == "a file":
        (tmp_path / "first.txt").write_text("y")
    elif change == "an output":
        (out / "stages/two/text.txt").write_text("spoiled")
    elif change == "a lost output":
        (out / "stages/one/text.txt").unlink()
    elif change == "a number in a record":
        file = out / "stages/seen/done.json"
        file.write_text(file.read_text().replace('"length": 3', '"length": 7'))
    else:
        (out / "stages/seen/done.json").write_text('{"key": ')
    machine = Machine()
    run(recipe, out, machine)
    assert machine.calls == again
    fresh = tmp_path / "fresh"
    run(recipe, fresh, Machine())
    assert results(out) == results(fresh)


def test_a_failed_stage_says_where_and_keeps_the_rest(recipe: Recipe, tmp_path: Path) -> None:
    machine, out = Machine(), tmp_path / "run"
    machine.failing["b"] = DataError("no such text.")
    with pytest.raises(
        StageError, match=r"stage 'two' \(line 4\): no such text. Finished"
    ) as caught:
        run(recipe, out, machine)
    assert caught.value.exit_code == 2
    summary, stages = state(out)
    assert summary["states"] == {
        "one": "done",
        "two": "failed",
        "seen": "waiting",
        "other": "waiting",
    }
    assert "no such text." in summary["error"]
    assert [one.stage for one in stages] == ["one"]
    run(recipe, out, machine)
    assert machine.calls == ["a", "b", "b", "look", "c"]
    # As of a run that nothing went wrong in.
    fresh = tmp_path / "fresh"
    run(recipe, fresh, Machine())
    assert (out / "run.json").read_bytes() == (fresh / "run.json").read_bytes()


def test_how_far_a_run_is_can_be_read_while_it_is_under_way(recipe: Recipe, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", []
    machine = Machine()

    def watched(words: Sequence[str]) -> object:
        seen.append(list(state(out)[0]["states"].values()))
        return machine(words)

    run(recipe, out, watched)
    assert seen == [
        ["running", "waiting", "waiting", "waiting"],
        ["done", "running", "waiting", "waiting"],
        ["done", "done", "running", "waiting"],
        ["done", "done", "done", "running"],
    ]
    assert set(state(out)[0]["states"].values()) == {"done"}
    # Of another recipe in the same place only what it shares with the first is done.
    seen.clear()
    changed = written(tmp_path, TEXT.replace("word: b", "word: b2"))
    run(changed, out, watched)
    assert seen[0] == ["done", "running", "waiting", "done"]


def test_after_a_kill_the_unfinished_stage_keeps_its_folder(recipe: Recipe, tmp_path: Path) -> None:
    machine, out = Machine(), tmp_path / "run"
    machine.failing["b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, machine)
    assert state(out)[0]["states"]["two"] == "running"
    kept = out / "stages/two/half-done"
    kept.write_text("work of the command")
    run(recipe, out, machine)
    assert kept.exists()
    # Another recipe has no use for it.
    kept_by_other = out / "stages/two/half-done"
    machine.failing["b2"] = KeyboardInterrupt()
    changed = written(tmp_path, TEXT.replace("word: b", "word: b2"))
    with pytest.raises(KeyboardInterrupt):
        run(changed, out, machine)
    assert not kept_by_other.exists()


def test_another_directory_is_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    with pytest.raises(RunDirectoryError, match="is not the directory of a run"):
        run(recipe, mine, Machine())
    assert [one.name for one in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunDirectoryError, match="is a file"):
        run(recipe, mine / "thesis.txt", Machine())
    with pytest.raises(RunDirectoryError, match="not the directory of a run"):
        state(mine)


def test_a_record_says_what_was_run(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(recipe, out, Machine())
    record = json.loads((out / "stages/two/done.json").read_text())
    source, target = out / "stages/one/text.txt", out / "stages/two/text.txt"
    assert record["command"] == ["copy", "--word", "b", str(source), "--output", str(target)]
    assert list(record["files"]) == ["text.txt"]
