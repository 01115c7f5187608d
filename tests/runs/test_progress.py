from __future__ import annotations

import io

import pytest

from postlude.runs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_nothing_unless_asked() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        assert list(progress.iterate([1, 2, 3], "work")) == [1, 2, 3]
        progress.log("hello")
    assert stream.getvalue() == ""


def test_a_pipe_gets_plain_lines_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postlude.runs.progress._SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    with Progress(show=True, stream=stream) as progress:
        assert list(progress.iterate(iter("ab"), "work", total=2)) == ["a", "b"]
        progress.log("hello [red]")
    lines = ["work: 1/2 in 0 s", "work: 2/2 in 0 s, 0 s left", "hello [red]"]
    assert stream.getvalue().splitlines() == lines


def test_a_task_may_say_how_fast_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postlude.runs.progress._SECONDS_BETWEEN_LINES", 0.0)
    stream, terminal = io.StringIO(), Terminal()
    for one in (stream, terminal):
        with Progress(show=True, stream=one) as progress:
            task = progress.task("work", 2)
            task.advance()
            task.rename("work, 3 pieces/s")
            task.advance()
            if one is terminal:
                assert progress._rich is not None
                assert progress._rich.tasks[0].description == "work, 3 pieces/s"
            task.close()
    assert stream.getvalue().splitlines()[-1] == "work, 3 pieces/s: 2/2 in 0 s, 0 s left"


def test_work_that_ends_at_once_says_nothing() -> None:
    stream = io.StringIO()
    with Progress(show=True, stream=stream) as progress:
        assert list(progress.iterate(iter("abc"), "work", total=3)) == ["a", "b", "c"]
    assert stream.getvalue() == ""


def test_a_terminal_gets_bars_and_nested_tasks() -> None:
    stream = Terminal()
    with Progress(stream=stream) as progress:
        for _ in progress.iterate(range(2), "outer"):
            for _ in progress.iterate(range(2), "inner"):
                progress.log("a line")
    assert "outer" in stream.getvalue()
    assert stream.getvalue().count("a line") == 4


def test_a_terminal_can_be_kept_quiet() -> None:
    stream = Terminal()
    with Progress(show=False, stream=stream) as progress:
        assert list(progress.iterate(range(3), "work")) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_an_open_display_can_be_opened_again() -> None:
    stream = Terminal()
    with Progress(stream=stream) as progress:
        with progress as inner:
            assert list(inner.iterate(range(2), "inner")) == [0, 1]
        progress.log("still here")
        assert list(progress.iterate(range(2), "outer")) == [0, 1]
    assert "still here" in stream.getvalue()
    assert "outer" in stream.getvalue()


def test_work_that_goes_on_counts_from_where_it_was() -> None:
    task = Progress(show=True, stream=io.StringIO()).task("tune", 1200, 100)
    task.advance(100)
    # A first step is often slow, so nothing is foretold from it.
    assert task._line(task._started + 6) == "tune: 200/1200 in 6 s"
    task._first = (task._started + 6, 200)
    task.advance(100)
    assert task._line(task._started + 10) == "tune: 300/1200 in 10 s, 36 s left"
