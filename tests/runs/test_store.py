from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from postlude.errors import NoSpaceError, StoreError
from postlude.runs import store as module
from postlude.runs.store import TensorStore

ROWS = [4, 4, 2]


def content(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "a/u": torch.randn(ROWS[number], 3, 5, generator=generator),
        "a/v": torch.randint(-127, 127, (ROWS[number], 7), generator=generator, dtype=torch.int8),
    }


def fill(path: Path, *numbers: int, **settings: Any) -> TensorStore:
    store = TensorStore.create(path, {"seed": 1, "widths": (3, 5)}, ROWS, **settings)
    for number in numbers:
        store.write(number, content(number))
    return store


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    fill(tmp_path / "store", 0, 1, 2).finish()
    return tmp_path / "store"


def test_rows_come_back(finished: Path) -> None:
    store = TensorStore.open(finished)
    assert len(store) == 10
    assert store.complete
    assert store.manifest == {"seed": 1, "widths": [3, 5]}
    assert [(s.start, s.stop) for s in store.shards] == [(0, 4), (4, 8), (8, 10)]
    for shard in store.shards:
        assert shard.names() == ["a/u", "a/v"]
        for name, expected in content(shard.number).items():
            assert torch.equal(shard.tensor(name), expected)
    assert list(store.verify()) == [None] * 3
    assert store.bytes == sum(f.stat().st_size for f in (finished / "shards").iterdir())
    with pytest.raises(StoreError, match="cannot give 'b'"):
        store.shards[0].tensor("b")


def test_order_of_writing_and_stopping_leave_no_trace(tmp_path: Path, finished: Path) -> None:
    other = tmp_path / "other"
    assert fill(other, 2).missing() == [0, 1]
    with pytest.raises(StoreError, match=r"lacks shards \[0, 1\]"):
        TensorStore.create(other, {"seed": 1, "widths": (3, 5)}, ROWS).finish()
    with pytest.raises(StoreError, match="is not finished: 1 of 3 shards"):
        TensorStore.open(other)
    again = fill(other, 1, 0)
    assert again.missing() == []
    again.finish()
    again.finish()
    assert files(other) == files(finished)
    assert TensorStore.open(other).hash() == TensorStore.open(finished).hash()


def test_a_damaged_shard_is_named_and_made_again(finished: Path) -> None:
    shard = TensorStore.open(finished).shards[1]
    damaged = bytearray(shard.file.read_bytes())
    damaged[-3] ^= 1
    shard.file.write_bytes(damaged)
    found = list(TensorStore.open(finished).verify())
    assert [one is None for one in found] == [True, False, True]
    assert found[1] is not None
    assert (found[1].shard, found[1].file) == (1, shard.file.name)
    assert "SHA-256" in found[1].reason
    before = files(finished)
    store = fill(finished)
    assert store.missing() == [1]
    assert not shard.file.exists()
    shard.file.write_bytes(b"")
    store.write(1, content(1))
    store.finish()
    assert list(TensorStore.open(finished).verify()) == [None] * 3
    assert {k: v for k, v in files(finished).items() if "1@" not in k} == {
        k: v for k, v in before.items() if "1@" not in k
    }


def test_a_missing_or_short_shard_is_seen_at_once(finished: Path) -> None:
    file = TensorStore.open(finished).shards[2].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=rf"shard 2 .* is {len(whole) - 1} bytes long, expected"):
        TensorStore.open(finished)
    file.unlink()
    with pytest.raises(StoreError, match=r"shard 2 .* is missing"):
        TensorStore.open(finished)
    assert fill(finished).missing() == [2]


def edit(path: Path, name: str, change: Any) -> None:
    value = json.loads((path / name).read_text())
    change(value)
    (path / name).write_text(json.dumps(value))


def test_another_version_kind_or_manifest_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="describes 'tensors'; expected 'index'"):
        TensorStore.open(finished, kind="index")
    with pytest.raises(StoreError, match="holds no tensors: there is no manifest"):
        TensorStore.open(tmp_path)
    with pytest.raises(StoreError, match=r"(?s)seed: found 1, expected 2.*--overwrite"):
        TensorStore.create(finished, {"seed": 2, "widths": (3, 5)}, ROWS)
    edit(finished, "manifest.json", lambda body: body.update(version=99))
    with pytest.raises(StoreError, match="version 99, this installation reads version 1"):
        TensorStore.open(finished)
    (finished / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        TensorStore.open(finished)
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "letter.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no manifest"):
        TensorStore.create(edited, {}, [1])
    with pytest.raises(StoreError, match="is a file"):
        TensorStore.create(edited / "letter.txt", {}, [1])


def test_a_manifest_edited_after_the_build_is_refused(finished: Path) -> None:
    before = files(finished)
    edit(finished, "manifest.json", lambda body: body["content"].update(seed=2))
    with pytest.raises(StoreError, match=r"manifest.json was changed after the build.*--overwrite"):
        TensorStore.open(finished)
    # The same words in other bytes are written back by a build of the same settings.
    edit(finished, "manifest.json", lambda body: body["content"].update(seed=1))
    with pytest.raises(StoreError, match="was changed after the build"):
        TensorStore.open(finished)
    again = fill(finished)
    assert again.missing() == []
    again.finish()
    assert files(finished) == before
    edit(finished, "shards.json", lambda body: body.pop("manifest"))
    with pytest.raises(StoreError, match="was changed after the build"):
        TensorStore.open(finished)
    fill(finished).finish()
    assert files(finished) == before


def test_overwriting_starts_afresh(finished: Path) -> None:
    store = TensorStore.create(finished, {"seed": 2}, [4], overwrite=True)
    assert store.missing() == [0]
    assert not store.complete


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.safetensors",
        "/etc/passwd",
        "shards/00000@" + 64 * "0" + ".safetensors",
        "00001@" + 64 * "0" + ".safetensors",
    ],
)
def test_a_list_that_points_elsewhere_is_not_read(finished: Path, name: str) -> None:
    edit(finished, "shards.json", lambda body: body["shards"][0].update(file=name))
    with pytest.raises(StoreError, match="points elsewhere is not read"):
        TensorStore.open(finished)


def test_a_link_out_of_the_folder_is_not_followed(finished: Path, tmp_path: Path) -> None:
    file = TensorStore.open(finished).shards[0].file
    file.rename(tmp_path / "outside.safetensors")
    file.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(StoreError, match="points elsewhere is not read"):
        TensorStore.open(finished)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(shards={}),
        lambda body: body["shards"].pop(),
        lambda body: body["shards"][0].pop("sha256"),
        lambda body: body["shards"][0].update(bytes="many"),
    ],
)
def test_a_garbled_list_is_refused(finished: Path, change: Any) -> None:
    edit(finished, "shards.json", change)
    with pytest.raises(StoreError, match="damaged"):
        TensorStore.open(finished)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_breaks_nothing(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "other"
    store = fill(path, 0)
    before = files(path)

    def half(tensors: dict[str, Tensor], target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", half)
        with pytest.raises(
            NoSpaceError, match=r"no space left while writing shard 1 of 3 .* run the same command"
        ):
            store.write(1, content(1))
    assert files(path) == before
    assert store.missing() == [1, 2]
    fill(path, 1, 2).finish()
    assert files(path) == files(finished)
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad"))
        )
        with pytest.raises(OSError, match="bad"):
            fill(tmp_path / "third", 0)


@pytest.mark.skipif(os.name == "nt", reason="there are no such limits")
def test_a_file_that_may_not_grow_breaks_nothing(tmp_path: Path) -> None:
    """A limit on the size of files, set by the system: the write fails half-way, as on a full disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "store"
    store = TensorStore.create(path, {}, [4, 4])
    store.write(0, {"x": torch.ones(4, 8)})
    before = files(path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        with pytest.raises(NoSpaceError, match="no space left"):
            store.write(1, {"x": torch.ones(4, 80000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(path) == before
    store.write(1, {"x": torch.ones(4, 8)})
    store.finish()
    assert list(TensorStore.open(path).verify()) == [None, None]


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"shard 2 has 2 rows, got \{'a/u': 4, 'a/v': 4\}"):
        fill(tmp_path / "store").write(2, content(0))
