"""A store holds the same bytes whatever happened while it was filled."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from postlude.runs.store import TensorStore

from ..properties import every

ROWS = [3, 1, 4, 2]
SHARDS = st.integers(0, len(ROWS) - 1)
EVENTS = st.one_of(
    st.tuples(st.sampled_from(["write", "flip", "cut", "lose"]), SHARDS, st.integers(0, 10**6)),
    st.tuples(st.sampled_from(["reopen", "half", "finish", "missing"]), SHARDS, st.just(0)),
)


def content(number: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {"a": torch.randn(ROWS[number], 2, generator=draw), "b": torch.ones(ROWS[number])}


def create(path: Path) -> TensorStore:
    return TensorStore.create(path, {"seed": 1}, ROWS)


def complete(store: TensorStore) -> None:
    for number in store.missing():
        store.write(number, content(number))
    store.finish()


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def happens(store: TensorStore, path: Path, event: tuple[str, int, int]) -> TensorStore:
    name, number, place = event
    found = next(iter((path / "shards").glob(f"{number:05d}@*.safetensors")), None)
    if name == "write" and number in store.missing():
        store.write(number, content(number))
    elif name == "missing":
        store.missing()
    elif name == "reopen":
        store = create(path)
    elif name == "half":
        # What a kill leaves between writing and renaming.
        (path / "shards" / f"{number:05d}.new").write_bytes(b"half")
        store = create(path)
    elif name == "finish" and not store.missing():
        store.finish()
    elif found is not None and name == "flip":
        raw = bytearray(found.read_bytes())
        raw[place % len(raw)] ^= 1 << place % 8
        found.write_bytes(raw)
    elif found is not None and name == "cut":
        found.write_bytes(found.read_bytes()[: place % found.stat().st_size])
    elif found is not None and name == "lose":
        found.unlink()
    return store


@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_any_history_ends_with_the_same_bytes(examples: int, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("CRITICAL")
    complete(create(tmp_path / "whole"))
    whole = files(tmp_path / "whole")

    @every(examples, events=st.lists(EVENTS, max_size=12))
    def _(events: list[tuple[str, int, int]]) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            path = Path(folder) / "store"
            store = create(path)
            for event in events:
                store = happens(store, path, event)
            complete(create(path))
            found = {name: raw for name, raw in files(path).items() if not name.endswith(".new")}
            assert found == whole
            read = TensorStore.open(path)
            assert list(read.verify()) == [None] * len(ROWS)
            for shard in read.shards:
                for name, expected in content(shard.number).items():
                    assert torch.equal(shard.tensor(name), expected)
