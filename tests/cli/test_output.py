from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from postlude.cli._output import Result, plain, to_json


@dataclasses.dataclass
class Inner:
    path: Path
    values: torch.Tensor


class Report:
    def to_dict(self) -> dict[str, Any]:
        return {"layers": (1, 2)}

    def __rich__(self) -> str:
        return "a drawn report"


def test_plain() -> None:
    value = {
        1: Inner(Path("a/b"), torch.tensor([[1.0, float("nan")]])),
        "report": Report(),
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        "dtype": torch.bfloat16,
        "kind": Inner,
        "many": (x for x in (True, None)),
        "bad": float("inf"),
    }
    assert plain(value) == {
        "1": {"path": "a/b", "values": [[1.0, None]]},
        "report": {"layers": [1, 2]},
        "array": [0, 1, 2],
        "scalar": 0.5,
        "dtype": "torch.bfloat16",
        "kind": "Inner",
        "many": [True, None],
        "bad": None,
    }


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot write object as JSON"):
        to_json({"x": object()})


def test_json_is_one_line_and_keeps_letters() -> None:
    text = to_json({"a": "é\n"})
    assert text == '{"a": "é\\n"}'
    assert json.loads(text) == {"a": "é\n"}


def shown(result: Result) -> list[str]:
    file = io.StringIO()
    result.show(Console(file=file, width=100, highlight=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_tables() -> None:
    lines = shown(
        Result(
            {
                "loss": 1.23456789,
                "nested": {"angle": 4.0, "names": []},
                "rows": [{"name": "a[1]", "value": 1}, {"name": "b", "value": 22.5}],
                "report": Report(),
                "long": list(range(20)),
                "good": True,
            }
        )
    )
    assert lines[0].split() == ["loss", "1.23457"]
    assert "long  0, 1, 2, 3, 4, 5, 6, 7, ... (20 values)" in lines
    assert "good  yes" in lines
    assert lines[lines.index("nested") + 1].split() == ["angle", "4"]
    assert lines[lines.index("rows") + 1].split() == ["name", "value"]
    assert lines[lines.index("rows") + 2].split() == ["a[1]", "1"]
    assert "a drawn report" in lines


def test_own_view() -> None:
    assert shown(Result({"x": 1}, "see here")) == ["see here"]
    assert shown(Result(Report())) == ["a drawn report"]


def test_a_data_class_at_the_top() -> None:
    assert [line.split() for line in shown(Result(Inner(Path("a"), torch.ones(2))))] == [
        ["path", "a"],
        ["values", "1,", "1"],
    ]
