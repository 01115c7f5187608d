from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from postlude.errors import NoSpaceError, OutputExistsError
from postlude.runs import atomic
from postlude.runs.atomic import atomic_directory, atomic_write, is_partial


def fill(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    (directory / "inner").mkdir()
    (directory / "inner" / "weights").write_text(content * 10)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "data.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "old"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["data.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        Exception("No space left on device (os error 28)"),  # as tokenizers raises it
    ],
)
def test_a_full_disk_is_said(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "data.txt"
    target.write_text("old")
    with (
        pytest.raises(NoSpaceError, match=r"No space left to write .*data\.txt .* same command"),
        atomic_write(target),
    ):
        raise error
    with pytest.raises(NoSpaceError, match=r"write .*model"), atomic_directory(tmp_path / "model"):
        raise error
    # Said once, by what could not be written.
    with (
        pytest.raises(NoSpaceError, match=r"write .*inner\.txt"),
        atomic_directory(tmp_path / "model"),
        atomic_write(tmp_path / "inner.txt"),
    ):
        raise error
    assert os.listdir(tmp_path) == ["data.txt"] and target.read_text() == "old"
    with pytest.raises(OSError, match="bad"), atomic_write(target):
        raise OSError(errno.EIO, "bad")


def test_a_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with atomic_directory(target) as temporary:
        fill(temporary, "x")
        assert not target.exists()
    assert (target / "inner" / "weights").read_text() == "x" * 10
    assert os.listdir(target.parent) == ["b"]


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as temporary:
        fill(temporary, "x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as temporary:
        fill(temporary, "old")
    with pytest.raises(OutputExistsError, match="--overwrite"), atomic_directory(target):
        pytest.fail("the block must not start")
    with atomic_directory(target, overwrite=True, marker="config.json") as temporary:
        (temporary / "config.json").write_text("new")
    assert os.listdir(target) == ["config.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_counts_as_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with atomic_directory(target) as temporary:
        fill(temporary, "x")
    assert (target / "config.json").read_text() == "x"


def test_without_the_exchange_call_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    target = tmp_path / "out"
    for content in ("old", "new"):
        with atomic_directory(target, overwrite=True) as temporary:
            fill(temporary, content)
    assert (target / "config.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_does_not_delete_what_is_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years")
    with (
        pytest.raises(OutputExistsError, match=r"holds no config\.json"),
        atomic_directory(precious.parent, overwrite=True, marker="config.json"),
    ):
        pytest.fail("the block must not start")
    monkeypatch.chdir(precious.parent)
    for path in (".", ".."):
        with (
            pytest.raises(OutputExistsError, match="working directory"),
            atomic_directory(path, overwrite=True),
        ):
            pytest.fail("the block must not start")
    with pytest.raises(OutputExistsError, match="is a file"), atomic_directory(precious):
        pytest.fail("the block must not start")
    assert precious.read_text() == "years"


KILLED = """
import os, signal, sys
from postlude.runs.atomic import atomic_directory
with atomic_directory(sys.argv[1], overwrite=True) as temporary:
    (temporary / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_leaves_the_old_directory_or_none(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "out"
    if exists:
        with atomic_directory(target) as temporary:
            fill(temporary, "old")
    run = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert target.exists() == exists
    if exists:
        assert (target / "config.json").read_text() == "old"
    assert any(is_partial(path) for path in tmp_path.iterdir())
    # The next writer clears up after the dead one.
    with atomic_directory(target, overwrite=True) as temporary:
        fill(temporary, "new")
    assert os.listdir(tmp_path) == ["out"]


def test_a_discarded_directory_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    fill(tmp_path / "run", "x")
    # Killed before anything in it was removed: nothing of that name is left, and the rest goes with the next write.
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
    atomic.discard(tmp_path / "run", tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert is_partial(left) and left.name.startswith(".out.")
    monkeypatch.undo()
    monkeypatch.setattr(atomic, "_is_alive", lambda process: False)
    with atomic_directory(tmp_path / "out") as temporary:
        fill(temporary, "y")
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "run").mkdir()
    atomic.discard(tmp_path / "run", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
