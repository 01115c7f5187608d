"""Examples that queries point at are written alone, or left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import postlude as pl
from postlude import _front_door
from postlude.attribution import GradDot
from postlude.attribution.index import Index
from postlude.attribution.query import scores
from postlude.attribution.select import strength
from postlude.errors import OutputExistsError, SettingsError

TEXTS = ["a cat sat", "the dog ran home", "one two three", "rain on the roof", "a cat slept"]


@pytest.fixture(scope="module")
def index(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("select")
    data = folder / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"id": f"n{i}", "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    index: Index = pl.attribute(tiny_llama_dir, data, GradDot(), out=folder / "index")
    return index


def test_strength_gives_every_query_the_same_say() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [300.0, 100.0, 200.0], [7.0, 7.0, 7.0]])
    expected = []
    for column in range(3):
        parts = []
        for row in scores.double().tolist():
            mean = sum(row) / 3
            deviation = (sum((one - mean) ** 2 for one in row) / 3) ** 0.5
            parts.append((row[column] - mean) / deviation if deviation else 0.0)
        expected.append(sum(parts) / 3)
    torch.testing.assert_close(strength(scores), torch.tensor(expected).double())


def test_chosen_and_the_rest_are_all_of_them(index: Index, tmp_path: Path) -> None:
    queries = ["a cat ate", "a cat ran"]
    kept, rest = tmp_path / "kept.jsonl", tmp_path / "rest.jsonl"
    found = _front_door.attribution_select(index, queries, kept, top=2)
    other = _front_door.attribution_select(index, queries, rest, top=2, drop=True)
    order = strength(scores(index, queries)).argsort(descending=True).tolist()
    assert found.numbers == other.numbers == order[:2]
    assert found.ids == [f"n{i}" for i in order[:2]]
    lines = [
        json.loads(line)["id"] for file in (kept, rest) for line in file.read_text().splitlines()
    ]
    assert lines[:2] == [f"n{i}" for i in sorted(order[:2])]  # in the order of the data
    assert sorted(lines) == [f"n{i}" for i in range(5)]
    assert (found.written, other.written) == (2, 3)


def test_what_cannot_be_chosen_is_refused(index: Index, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(SettingsError, match="top is 6; expected 1 to 5"):
        _front_door.attribution_select(index, "a cat", out, top=6)
    with pytest.raises(SettingsError, match="all 5 examples of the index would be dropped"):
        _front_door.attribution_select(index, "a cat", out, top=5, drop=True)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(OutputExistsError):
        _front_door.attribution_select(index, "a cat", out, top=1)
    assert out.read_text() == "mine"
