from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

import postlude
from postlude import registry
from postlude.cli import run
from postlude.errors import SettingsError

__all__ = ["Door", "Outcome"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rounds to a grid.

    More about it.

    Attributes:
        weights: bits of a weight,
            on two lines.
        activations, kv: bits of the others.
    """

    weights: int = 4
    activations: int = 16
    kv: int = 16
    group: int | Literal["channel", "tensor"] = "channel"
    activation_group: int | Literal["token", "tensor"] = "token"
    damping: float = 0.01
    alpha: float | None = 0.5
    symmetric: bool = True
    sites: tuple[str, ...] = ()
    layers: list[int] = dataclasses.field(default_factory=list)
    order: str = "natural"

    def __post_init__(self) -> None:
        if self.weights < 2:
            raise SettingsError(f"grid takes 2 bits or more for weights, got {self.weights}")


@dataclasses.dataclass(frozen=True)
class Plain:
    """Has nothing to set."""


@dataclasses.dataclass(frozen=True)
class Needy:
    """Has a setting without a default."""

    rank: int


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that holds only the methods of this file."""
    monkeypatch.setattr(registry, "_METHODS", {})
    monkeypatch.setattr(registry, "_import_methods", lambda verb: None)
    paper = "arXiv:2210.17323"
    registry.method("quantize", "grid", family="rounding", paper=paper, needs=("calibration",))(
        Grid
    )
    registry.method("quantize", "plain", family="rounding")(Plain)
    registry.method("quantize", "needy", family="rounding")(Needy)
    registry.method("inspect", "outliers", family="activations")(Plain)


class Door:
    """Stands in for the front door: notes every call, returns what it was told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.results: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("progress", None)
            self.calls.append((name, args, kwargs))
            result = self.results.get(name, {})
            if isinstance(result, BaseException):
                raise result
            return result(*args) if callable(result) else result

        return call


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, methods: None) -> Door:
    door = Door()
    door.results["load"] = lambda path: f"<{path}>"
    monkeypatch.setattr("postlude.evaluation.size.size_of", lambda checkpoint: {"bytes": 7})
    module = ModuleType("postlude._front_door")
    module.__getattr__ = lambda name: getattr(door, name)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "postlude._front_door", module)
    monkeypatch.setattr(postlude, "_front_door", module, raising=False)
    return door


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object of the standard output."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@pytest.fixture
def postlude_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a command line in this process: ``postlude_command("methods", "--json")``."""

    def command(*words: object) -> Outcome:
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return command
