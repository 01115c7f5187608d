"""The demonstration on a tiny random model: what it writes, whose numbers it prints, that it resumes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from postlude import _front_door
from postlude.errors import OutputExistsError
from postlude.report.demo import Verbs, demo
from postlude.report.demo_plan import Plan
from postlude.runs.progress import Progress

VERBS = Verbs(_front_door.load, _front_door.inspect, _front_door.quantize, _front_door.evaluate)


@pytest.fixture(scope="module")
def plan(tiny_llama_dir: Path, some_text: str) -> Plan:
    return Plan(
        model=str(tiny_llama_dir),
        calibration=some_text,
        held_out=some_text[::-1],
        prompt="The night",
        methods=("rtn", "offq"),
        inspections=("outliers", "signature"),
        activation_group=8,
        samples=4,
        length=16,
        max_length=32,
        error_windows=2,
        new_tokens=3,
    )


@pytest.fixture(scope="module")
def made(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    returned = demo(VERBS, out, seed=3, plan=plan)
    assert returned["report"] == str(out / "report.html")
    assert [row["name"] for row in returned["methods"]] == ["float", "rtn", "offq"]
    return out


@pytest.fixture(scope="module")
def results(made: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((made / "results.json").read_text())
    return read


def test_what_is_written(made: Path) -> None:
    files = {str(file.relative_to(made)) for file in made.rglob("*") if file.is_file()}
    assert {"report.html", "results.json", "offq/config.json", "text/calibration.txt"} <= files
    assert "<svg" in (made / "report.html").read_text()
    assert not any(path.name.startswith(".") for path in made.parent.iterdir())


def test_every_method_has_every_number(results: dict[str, Any]) -> None:
    for row in results["methods"][1:]:
        for name in ("perplexity", "kl", "top1_agreement", "bytes", "bits_per_weight", "seconds"):
            assert row[name] >= 0
        assert row["bits_per_activation"] > 4
        assert len(row["layer_error"]["median"]) == 2
        assert 1 <= len(row["continuation_tokens"]) <= 3
    assert set(results["inspections"]) == {"outliers", "signature"}
    assert results["environment"]["postlude"]


def test_the_kept_checkpoint_has_the_printed_numbers(
    made: Path, plan: Plan, results: dict[str, Any]
) -> None:
    again = _front_door.evaluate(
        _front_door.load(made / "offq", dtype="float32"),
        made / "text" / "held_out.txt",
        reference=_front_door.load(plan.model, dtype="float32"),
        max_length=plan.max_length,
    )
    row = results["methods"][2]
    for name in ("perplexity", "kl", "top1_agreement", "bytes", "bits_per_weight"):
        assert again[name] == row[name], name


def test_the_printed_commands_give_the_printed_numbers(
    made: Path,
    results: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from postlude.cli import run

    monkeypatch.chdir(made)
    for command in results["commands"][-2:]:
        program, *words = command.split()
        assert program == "postlude"
        if words[0] == "quantize":
            words.append("--no-check")  # a process of its own, which has tests of its own
        assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["perplexity"] == results["methods"][2]["perplexity"]


def test_the_printed_python_runs(
    made: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    names: dict[str, Any] = {}
    code = results["python"].replace("again/", "once_more/")
    exec(compile(code, "snippet", "exec"), names)
    assert names["result"]["perplexity"] == results["methods"][2]["perplexity"]
    assert names["reports"]["outliers"].to_dict() == results["inspections"]["outliers"]


def test_an_earlier_one_is_not_replaced_unasked(made: Path, plan: Plan) -> None:
    with pytest.raises(OutputExistsError, match="--overwrite"):
        demo(VERBS, made, plan=plan)


def test_something_else_is_never_replaced(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"results\.json"):
        demo(VERBS, tmp_path, overwrite=True, plan=plan)


def test_what_is_finished_is_not_done_again(
    made: Path, plan: Plan, results: dict[str, Any], tmp_path: Path
) -> None:
    done: list[str] = []

    def quantize(model: Any, settings: Any, **options: Any) -> Any:
        done.append(type(settings).__name__)
        if done == ["RTN", "OffQ"]:
            raise KeyboardInterrupt
        return _front_door.quantize(model, settings, **options)

    verbs = Verbs(_front_door.load, _front_door.inspect, quantize, _front_door.evaluate)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        demo(verbs, out, seed=3, plan=plan)
    assert not out.exists()
    demo(verbs, out, seed=3, plan=plan)
    assert done == ["RTN", "OffQ", "OffQ"]
    again = json.loads((out / "results.json").read_text())

    def numbers(found: dict[str, Any]) -> Any:
        rows = [{**row, "seconds": None} for row in found["methods"]]
        return rows, found["inspections"]

    assert numbers(again) == numbers(results)


def test_progress_is_shown_inside_one_display(plan: Plan, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    short = dataclasses.replace(plan, methods=("rtn",), inspections=("outliers",))
    with Progress(stream=stream) as progress:
        demo(VERBS, tmp_path / "out", plan=short, progress=progress)
    for word in ("demo", "rtn: blocks", "evaluate"):
        assert word in stream.getvalue()


def test_the_front_door_runs_the_built_in_plan(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postlude.report import demo as module

    short = dataclasses.replace(plan, methods=("rtn",), inspections=("outliers",))
    monkeypatch.setattr(module, "built_in", lambda: short)
    returned = _front_door.demo(tmp_path / "out", seed=1)
    results = json.loads(Path(returned["results"]).read_text())
    assert results["command"] == "postlude demo --seed 1 -o demo"
    assert results["settings"]["seed"] == 1


def test_perplexity_beyond_numbers(plan: Plan, tmp_path: Path) -> None:
    def evaluate(*given: Any, **options: Any) -> dict[str, Any]:
        return {**_front_door.evaluate(*given, **options), "perplexity": float("inf")}

    short = dataclasses.replace(plan, methods=("rtn",), inspections=("outliers",))
    verbs = Verbs(_front_door.load, _front_door.inspect, _front_door.quantize, evaluate)
    returned = demo(verbs, tmp_path / "out", plan=short)
    results = json.loads(Path(returned["results"]).read_text())
    assert results["methods"][1]["perplexity"] is None
