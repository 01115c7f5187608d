"""Every claim can be tried: it takes --quick, and the script that tries them all reports what fails."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "claims"
CLAIMS = sorted(FOLDER.glob("[a-z]*.py"))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script, whose own folder is looked in first; what it imports from there is forgotten."""
    monkeypatch.syspath_prepend(FOLDER)
    for file in FOLDER.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)


@pytest.mark.parametrize("file", CLAIMS, ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_says_what_it_takes(
    file: Path, folder: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), "--quick", "--seeds", "1", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--quick", "--seeds", "--run", "--write"))


def test_what_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("quick", FOLDER / "_quick.py")
    assert spec is not None and spec.loader is not None
    quick: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quick", quick)
    spec.loader.exec_module(quick)
    (tmp_path / "good.py").write_text("import sys; print(*sys.argv[1:])")
    (tmp_path / "worse.py").write_text("raise ValueError('no such luck')")
    (tmp_path / "_shared.py").write_text("raise ValueError('no claim')")
    monkeypatch.setattr(quick, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["quick"])
    assert quick.main() == 1
    said = capsys.readouterr().out
    assert "no such luck" in said and "no claim" not in said
    assert "| good | ok |" in said and "| worse | exit code 1 |" in said
    assert "2 claims in" in said
    monkeypatch.setattr(sys, "argv", ["quick", "good"])
    assert quick.main() == 0
    monkeypatch.setattr(sys, "argv", ["quick", "goof"])
    with pytest.raises(SystemExit):
        quick.main()
