"""What the scripts of claims/ share: spread over seeds, and their section of the page."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from postlude.errors import RunDirectoryError

FOLDER = Path(__file__).resolve().parents[2] / "claims"
PAGE = """# Claims

Before.

<!-- measured: one -->
old
<!-- end: one -->

Between.

<!-- measured: two -->
<!-- end: two -->
"""


@pytest.fixture(scope="module")
def shared() -> Any:
    spec = importlib.util.spec_from_file_location("_claim", FOLDER / "_claim.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(shared: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make a claim as from the command line, with a page of its own."""
    page = tmp_path / "claims.md"
    page.write_text(PAGE)
    monkeypatch.setattr(shared, "PAGE", page)
    monkeypatch.setattr(shared, "ROOT", tmp_path)

    def start(*arguments: str, name: str = "one", parts: tuple[str, ...] = ()) -> Any:
        monkeypatch.setattr(sys, "argv", ["claim", *arguments])
        return shared.Claim(name, "A claim.\n\nMore of it.", parts)

    start.page = page  # type: ignore[attr-defined]
    return start


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([7.0, 7.0, 7.0], "7.00"),
        ([0.25], "0.250"),
        ([10.0, 12.0, 14.0], "12.0 ± 2.0"),
        ([0.1, 0.1004], "0.10020 ± 0.00028"),
        ([99.0, 101.0], "100.0 ± 1.4"),
        ([-3.0, -5.0], "-4.00 ± 1.41"),
        ([0.0, 0.0], "0"),
    ],
)
def test_spread(shared: Any, values: list[float], shown: str) -> None:
    assert shared.spread(values) == shown
    if "±" in shown:
        mean, deviation = map(float, shown.split(" ± "))
        assert mean == pytest.approx(statistics.mean(values), rel=1e-2)
        assert deviation == pytest.approx(statistics.stdev(values), rel=5e-2)


def test_only_the_section_between_its_markers_is_replaced(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = run("--write")
    claim.table("Title", ["method", "loss"], [["rtn", "1.0 ± 0.1"]])
    claim.finish()
    written, printed = run.page.read_text(), capsys.readouterr().out
    begin, end = "<!-- measured: one -->\n", "<!-- end: one -->\n"
    assert written.startswith(PAGE.split(begin)[0] + begin)
    assert written.endswith(end + PAGE.split(end)[1])
    assert written.split(begin)[1].split(end)[0].strip() == printed.strip()
    assert "| method | loss |\n| --- | ---: |\n| rtn | 1.0 ± 0.1 |" in printed
    assert "`python claims/one.py`: 5 seeds" in printed


def test_printing_leaves_the_page_alone(run: Any) -> None:
    claim = run()
    claim.say("Something.")
    claim.finish()
    assert run.page.read_text() == PAGE


def test_a_page_without_the_section(run: Any) -> None:
    with pytest.raises(SystemExit, match="no section between"):
        run("--write", name="three").finish()


@pytest.mark.parametrize(
    "arguments", [("--write", "--quick"), ("--write", "--seeds", "2"), ("--seeds", "0")]
)
def test_a_trial_is_not_stored(run: Any, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2


def test_seeds(run: Any) -> None:
    assert list(run().seeds) == [0, 1, 2, 3, 4]
    assert list(run("--quick").seeds) == [0, 1]
    assert list(run("--quick", "--seeds", "3").seeds) == [0, 1, 2]


def test_a_part_has_a_section_of_its_own(
    run: Any, shared: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = run("--part", "small", parts=("small", "large"))
    claim.finish()
    assert (claim.part, claim.name) == ("small", "one-small")
    assert "`python claims/one.py --part small`: 5 seeds" in capsys.readouterr().out
    # Without one, all of them, each in a process of its own.
    started = []
    monkeypatch.setattr(shared.subprocess, "run", lambda words, check: started.append(words))
    with pytest.raises(SystemExit) as ended:
        run("--quick", parts=("small", "large"))
    assert not ended.value.code
    assert [words[1:] for words in started] == [
        ["claim", "--quick", "--part", part] for part in ("small", "large")
    ]


def test_what_was_measured_is_not_measured_again(run: Any, tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"loss": 0.1}

    for _ in range(2):
        claim = run("--run", str(tmp_path / "kept"))
        found = claim.measured(claim.directory({"steps": 3}), "seed-0", measure)
        assert {name: float(value) for name, value in found.items()} == {"loss": pytest.approx(0.1)}
    assert len(calls) == 1
    with pytest.raises(RunDirectoryError, match="has steps 3, this one asks for 4"):
        claim.directory({"steps": 4})
