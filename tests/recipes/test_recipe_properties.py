"""Any recipe can be written again; a changed key is refused by its line or means what it says; hashes follow."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from postlude.cli import app
from postlude.cli._commands import recipe_commands
from postlude.errors import DataError
from postlude.recipes.recipe import Recipe, read
from postlude.recipes.run import keys

from ..properties import every

COMMANDS = recipe_commands(app)
EXAMPLES = pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.slow)])

NAMES = ["small", "tuned", "index", "quality", "look", "a", "b-2"]
MODEL = st.sampled_from(["zoo:tiny-lm", "${model}"])


def options(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


QUANTIZE = options(
    method=st.sampled_from(["rtn", "gptq", "offq"]),
    bits=st.sampled_from(["w4a4kv4", "w8a8", "${bits}"]),
    samples=st.integers(1, 64),
    seed=st.integers(0, 9),
    check=st.booleans(),
    set=st.lists(st.sampled_from(["damping=0.1", "clip=true"]), min_size=1, unique=True),
)
TUNE = options(
    weights=st.sampled_from(["sft", "dft"]),
    epochs=st.sampled_from([1, 0.5, 2.0]),
    packing=st.booleans(),
)


@st.composite
def recipes(draw: Any) -> dict[str, Any]:
    """The content of a recipe that can be run: stages that write, and stages that read what these wrote."""
    stages: dict[str, Any] = {}
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    made: list[str] = []
    for name in names:
        source = draw(MODEL | st.sampled_from(made).map("${{{}}}".format) if made else MODEL)
        verb = draw(st.sampled_from(["quantize", "tune", "evaluate", "inspect compare"]))
        if verb == "quantize":
            stages[name] = {verb: source, "calibration": "wiki.txt", **draw(QUANTIZE)}
        elif verb == "tune":
            stages[name] = {verb: [source, "data.jsonl"], **draw(TUNE)}
        elif verb == "evaluate":
            stages[name] = {verb: source, "text": "wiki.txt"}
        else:
            stages[name] = {verb: ["zoo:tiny-lm", source]}
        if verb in ("quantize", "tune"):
            made.append(name)
    variables = {"model": "zoo:tiny-lm", "bits": "w4a8"}
    return {"name": "any", "variables": variables, "stages": stages}


def paths(content: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key, as the keys that lead to it."""
    for key, value in content.items():
        yield (*where, key)
        if isinstance(value, dict):
            yield from paths(value, (*where, key))


def renamed(content: Any, path: tuple[str, ...], name: str) -> Any:
    """The same with another name for one key, in the same place."""
    first, *rest = path
    if rest:
        return {k: renamed(v, tuple(rest), name) if k == first else v for k, v in content.items()}
    return {name if key == first else key: value for key, value in content.items()}


@pytest.fixture(autouse=True)
def _data_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki.txt").write_text("words")
    (tmp_path / "data.jsonl").write_text('{"text": "words"}\n')
    monkeypatch.chdir(tmp_path)


def written(content: Any, **style: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, **style)


def parsed(text: str) -> Recipe:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return read(file.name, COMMANDS)


def plain(recipe: Recipe) -> list[Any]:
    return [(s.name, s.command.name, s.arguments, dict(s.options)) for s in recipe.stages]


@EXAMPLES
def test_a_recipe_written_again_is_the_same(examples: int) -> None:
    @every(examples, content=recipes(), flow=st.booleans(), indent=st.integers(2, 6))
    def _(content: dict[str, Any], flow: bool, indent: int) -> None:
        recipe = parsed(written(content))
        other = "# a remark\n" + written(content, default_flow_style=flow, indent=indent)
        again = parsed(other)
        assert plain(again) == plain(recipe)
        assert keys(again) == keys(recipe)
        assert plain(parsed(recipe.text)) == plain(recipe)


@EXAMPLES
def test_a_key_that_is_misspelt_is_refused_or_means_what_it_says(examples: int) -> None:
    @every(examples, content=recipes(), data=st.data())
    def _(content: dict[str, Any], data: Any) -> None:
        path = data.draw(st.sampled_from(sorted(paths(content))))
        key = path[-1]
        at = data.draw(st.integers(0, len(key)))
        name = key[:at] + data.draw(st.sampled_from("xqz")) + key[at:]
        changed = renamed(content, path, name)
        text = written(changed)
        try:
            recipe = parsed(text)
        except DataError as error:
            message = str(error)
            line = re.search(r"line (\d+): ", message)
            assert line, message
            around = text.splitlines()[int(line[1]) - 1]
            # The line of the key, or of the stage that lacks it or refers to it by its old name.
            assert name in around or f"${{{key}}}" in message or len(path) != 2, (message, around)
            assert name in message or key in message, message
        else:
            # A name of one's own choice: of a stage, of a variable that nothing uses, or a word of the title.
            assert path[0] in ("stages", "variables", "name", "about") and len(path) <= 2
            if path[0] == "stages":
                assert name in [stage.name for stage in recipe.stages]


@EXAMPLES
def test_hashes_change_with_what_decides_the_result(examples: int, tmp_path: Path) -> None:
    @every(examples, content=recipes(), data=st.data())
    def _(content: dict[str, Any], data: Any) -> None:
        recipe = parsed(written(content))
        before = keys(recipe)
        number = data.draw(st.integers(0, len(recipe.stages) - 1))
        stage = recipe.stages[number]
        dependent = {stage.name}
        for later in recipe.stages[number + 1 :]:
            if dependent & set(later.needs):
                dependent.add(later.name)
        value = content["stages"][stage.name]
        reads_text = stage.command.name in ("evaluate", "tune")
        if reads_text and data.draw(st.booleans()):
            file = tmp_path / ("wiki.txt" if stage.command.name == "evaluate" else "data.jsonl")
            kept = file.read_bytes()
            file.write_bytes(kept + b"\n")
            after = keys(recipe)
            file.write_bytes(kept)
            assert keys(recipe) == before
            expected = {s.name for s in recipe.stages if file.name in s.inputs()}
            for later in recipe.stages:
                if expected & set(later.needs):
                    expected.add(later.name)
        else:
            other = {**value, "seed": 77}
            changed = {**content, "stages": {**content["stages"], stage.name: other}}
            after, expected = keys(parsed(written(changed))), dependent
        assert {name for name in before if before[name] != after[name]} == expected
