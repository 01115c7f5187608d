"""A recipe is checked as a whole before anything starts; an error names the line and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from postlude.cli import app
from postlude.cli._commands import recipe_commands
from postlude.errors import DataError
from postlude.recipes.recipe import Recipe, read

COMMANDS = recipe_commands(app)
GOOD = """\
name: four bits
variables:
  model: zoo:tiny-lm
  bits: w4a8
stages:
  small:
    quantize: ${model}
    method: offq
    bits: ${bits}
    samples: 4
    check: false
    set: [damping=0.1, clip=true]
    calibration: wiki.txt
  quality:
    evaluate: ${small}
    text: wiki.txt
    reference: ${model}
  update:
    inspect compare: ["${model}", "${small}"]
"""


@pytest.fixture(autouse=True)
def _text_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki.txt").write_text("words")
    monkeypatch.chdir(tmp_path)


def recipe(tmp_path: Path, text: str, **variables: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read(file, COMMANDS, variables)


def test_stages_become_command_lines(tmp_path: Path) -> None:
    small, quality, update = recipe(tmp_path, GOOD, bits="w8a8").stages
    assert small.words({}) == [
        "quantize", "--method", "offq", "--bits", "w8a8", "--calibration", "wiki.txt", "--samples", "4",
        "--set", "damping=0.1", "--set", "clip=true", "--no-check", "zoo:tiny-lm",
    ]  # fmt: skip
    outputs = {"small": "/run/small/output"}
    assert quality.words(outputs) == [
        "evaluate", "--text", "wiki.txt", "--reference", "zoo:tiny-lm", "/run/small/output",
    ]  # fmt: skip
    assert update.words(outputs) == ["inspect", "compare", "zoo:tiny-lm", "/run/small/output"]
    assert quality.needs == ("small",) and small.needs == ()
    assert small.line == 6


def test_every_command_that_writes_has_an_output_and_the_rest_has_none() -> None:
    writing = {name for name, command in COMMANDS.items() if command.output}
    assert {"quantize", "tune", "tune prior", "attribute build", "export"} <= writing
    assert not writing & {"inspect", "inspect compare", "evaluate", "generate", "attribute verify"}
    for command in COMMANDS.values():
        hidden = {"output", "overwrite", "run", "html", "json"}
        assert not hidden & {option.name for option in command.options}
    assert COMMANDS["export"].output_for({"to": "gguf"}) == "model.gguf"
    assert COMMANDS["export"].output_for({"to": "onnx"}) == "output"


def test_a_seed_is_given_to_every_stage_that_has_none(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD.replace("samples: 4", "seed: 5"))
    small, quality, _ = read(file, COMMANDS, seed=9).stages
    assert small.options["seed"] == 5
    assert quality.options["seed"] == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples: 4", "sampels: 4", r"line 10: `quantize` has no 'sampels'. Did you mean 'samples'\?"),
        ("samples: 4", "samples: 0", r"line 10: `samples` of `quantize` is 0: .*greater than or equal to 1"),
        ("text: wiki.txt", "text: wikki.txt", r"line 16: there is no 'wikki.txt' for `text`"),
        ("  model: zoo:tiny-lm", "  model: tiny", r"line 7: there is no 'tiny' for `checkpoint`"),
        ("  bits: w4a8", "  bits: w4b8", r"line 9: .*'w4b8' is not understood"),
        ("samples: 4", "samples: many", r"line 10: `samples` of `quantize` is 'many': .*valid integer"),
        ("check: false", "check: maybe", r"line 11: `check` of `quantize` is 'maybe'"),
        ("method: offq", "method: ofq", r"line 8: No quantize method named 'ofq'. Did you mean 'offq'"),
        ("quantize: ${model}", "quantise: ${model}", r"line 7: there is no command 'quantise'. .* 'quantize'"),
        ("quantize: ${model}", "quantize: [a, b]", r"line 7: `quantize` takes the arguments CHECKPOINT; found 2"),
        ("evaluate: ${small}", "evaluate: ${smal}", r"line 15: \$\{smal\} is neither .* mean 'small'"),
        ("evaluate: ${small}", "evaluate: ${update}", r"line 15: .* 'update' stands further down.*above 'quality'"),
        ("evaluate: ${small}", "evaluate: ${quality}", r"line 15: .*cannot read its own output"),
        ("quantize: ${model}", "quantize: ${update}", r"line 7: .*stages 'small' and 'update' need each other"),
        ("  model: zoo:tiny-lm", "  model: ${bits}", r"line 3: the variable 'model' is '\$\{bits\}'; expected a value"),
        ("  model: zoo:tiny-lm", "  model: zoo:tiny-ml", r"line 7: No zoo model named .*mean 'tiny-lm'"),
        ("samples: 4", "group: banana", r"line 10: --group 'banana' is not understood"),
        ("[damping=0.1, clip=true]", "[dampign=0.1]", r"line 12: .*'dampign'.*mean 'damping'"),
        ("    calibration: wiki.txt\n", "", r"line 6: offq learns from calibration text: give some"),
        ("[damping=0.1, clip=true]", "[clip=maybe]", r"line 12: clip=maybe does not fit offq"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(DataError, match=message):
        recipe(tmp_path, GOOD.replace(old, new, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file"),
        ("- a", "found list"),
        ("a: [", r"yaml, line 1, column 5: not YAML"),
        ("stages: {}", "at least one stage"),
        (
            "a: !!python/object/apply:os.system [true]",
            "line 1: a value is marked !!python/object/apply:os.system",
        ),
        ("a: !thing 1", "line 1: a value is marked !thing"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recipe(tmp_path, text)


def test_a_variable_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no variable 'modle'\. Did you mean 'model'"):
        recipe(tmp_path, GOOD, modle="x")
    with pytest.raises(DataError, match=r"has no variable 'zzz'; known: model, bits"):
        recipe(tmp_path, GOOD, zzz="x")
    with pytest.raises(DataError, match=r"has no variable 'zzz'; it has none"):
        recipe(tmp_path, GOOD[GOOD.index("stages:") :], zzz="x")
    (tmp_path / "recipe.yaml").write_text(GOOD)
    with pytest.raises(DataError, match=r"no recipe .*recipes.yaml. Did you mean 'recipe.yaml'"):
        read(tmp_path / "recipes.yaml", COMMANDS)
    with pytest.raises(DataError, match="cannot be read as a recipe: Is a directory"):
        read(tmp_path, COMMANDS)


def test_every_stage_with_a_mistake_is_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("samples: 4", "sampels: 4").replace("text: wiki.txt", "text: wikki.txt")
    with pytest.raises(DataError, match=r"'sampels'.*\n.*'wikki.txt'") as caught:
        recipe(tmp_path, text)
    # What a stage with a mistake would have made is no mistake of the stages that read it.
    assert len(str(caught.value).splitlines()) == 2


def test_a_key_of_the_recipe_hides_no_mistake_of_a_stage(tmp_path: Path) -> None:
    text = GOOD.replace("name: four", "nam: four").replace("samples: 4", "sampels: 4")
    with pytest.raises(DataError, match=r"line 1: A recipe has no 'nam'.*\n.*'sampels'"):
        recipe(tmp_path, text)


def test_every_mistake_of_a_stage_is_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("samples: 4", "sampels: 4\n    length: none").replace("offq", "ofq")
    with pytest.raises(DataError) as caught:
        recipe(tmp_path, text)
    lines = str(caught.value).splitlines()
    assert [one.split(": ")[0].split(", ")[1] for one in lines] == ["line 10", "line 11", "line 8"]


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ("evaluate: ${index}\n    text: wiki.txt", r"stage 'index' \(attribute build\) writes an index; expected a"),
        ('attribute query: ["${small}", "Once"]', r"stage 'small' \(quantize\) writes a checkpoint; expected an index"),
        ('attribute query: ["${index}", "Once"]', ""),
    ],
)  # fmt: skip
def test_what_a_stage_writes_is_what_another_reads(
    tmp_path: Path, reads: str, message: str
) -> None:
    text = (
        "stages:\n  small: {quantize: zoo:tiny-lm}\n"
        "  index: {attribute build: [zoo:tiny-lm, wiki.txt]}\n"
        f"  last:\n    {reads}\n"
    )
    if message:
        with pytest.raises(DataError, match=f"line 5: .*{message}"):
            recipe(tmp_path, text)
    else:
        assert len(recipe(tmp_path, text).stages) == 3


def test_nothing_is_done_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from postlude import _front_door

    loaded = _front_door.load
    before = sorted(tmp_path.rglob("*"))
    recipe(tmp_path, GOOD)
    (tmp_path / "recipe.yaml").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    assert _front_door.load is loaded


def test_a_reward_is_not_executed_to_check(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("import pathlib\npathlib.Path('executed').touch()\n")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    stage = "{tune: [zoo:tiny-lm, data.jsonl], objective: grpo, reward: 'rewards.py:f'}"
    recipe(tmp_path, f"stages:\n  a: {stage}\n")
    assert not (tmp_path / "executed").exists()


def test_every_variable_without_a_value_is_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("  bits: w4a8", "  bits:\n  text:")
    with pytest.raises(
        DataError, match=r"'bits' and 'text' have no values: .*--set bits=VALUE --set text=VALUE"
    ):
        recipe(tmp_path, text)
