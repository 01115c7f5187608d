from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.attribution.build import build, plan_shards
from postlude.attribution.index import Index
from postlude.attribution.lorif import LoRIF
from postlude.attribution.queries import record_queries
from postlude.errors import DataError, NoSpaceError, SettingsError, StoreError
from postlude.runs import store as store_module
from postlude.runs.checkpoint import Checkpoint

from .small import checkpoint, collection, texts, write

METHOD = LoRIF(format="int8")


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return checkpoint()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", texts(12))


@pytest.fixture
def index(model: Checkpoint, data: Path, tmp_path: Path) -> Index:
    found, _ = build(model, data, METHOD, tmp_path / "index", collection=collection())
    return found


def test_what_is_reported_and_remembered(model: Checkpoint, data: Path, tmp_path: Path) -> None:
    settings = collection(max_length=24, shard_examples=5)
    index, report = build(model, data, METHOD, tmp_path / "index", collection=settings)
    lengths = [1 + len(record["text"]) for record in texts(12)]
    assert report["examples"] == len(index) == 12
    assert report["tokens"] == sum(min(24, n) for n in lengths)
    assert report["truncated"] == sum(n > 24 for n in lengths) > 0
    assert report["truncated_tokens"] == sum(max(0, n - 24) for n in lengths)
    assert report["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "index/shards").iterdir()
    )
    assert report["resumed"] == 0
    assert [len(shard) for shard in index.store.shards] == [5, 5, 2]
    manifest = index.manifest
    assert manifest["model"]["fingerprint"] == model.fingerprint()
    assert manifest["data"]["path"] == str(data)
    assert manifest["collection"]["seed"] == 0
    assert manifest["representation"]["rank"] == 1
    assert manifest["method"]["name"] == "lorif"
    assert manifest["postlude"]
    again, report = build(model, data, METHOD, tmp_path / "index", collection=settings)
    assert report["resumed"] == 12
    assert again.hash() == index.hash()
    assert torch.equal(index.tensor("tokens"), torch.tensor([min(24, n) for n in lengths]))


def test_shards_cover_everything_once() -> None:
    assert plan_shards(10, 4) == [4, 4, 2]
    assert plan_shards(8, 4) == [4, 4]
    assert plan_shards(3, 4) == [3]


def test_a_damaged_shard_is_named(index: Index) -> None:
    assert index.verify() == []
    file = index.store.shards[1].file
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    file.write_bytes(damaged)
    (damage,) = Index(index.path).verify()
    assert (damage.shard, damage.file) == (1, file.name)


def test_a_full_disk_in_the_middle_costs_one_shard(
    model: Checkpoint, data: Path, tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = store_module.save_file, 0

    def full_at_second(tensors: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            Path(path).write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    out = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "save_file", full_at_second)
        with pytest.raises(
            NoSpaceError, match=r"no space left .*make room and run the same command"
        ):
            build(model, data, METHOD, out, collection=collection())
    with pytest.raises(StoreError, match="not finished: 1 of 2 shards"):
        Index(out)
    again, report = build(model, data, METHOD, out, collection=collection())
    assert report["resumed"] == 8
    assert again.hash() == index.hash()


def test_data_that_changed_is_refused(index: Index, data: Path, tmp_path: Path) -> None:
    assert len(index.records()) == 12
    moved = tmp_path / "moved.jsonl"
    data.rename(moved)
    with pytest.raises(DataError, match=r"There is no file .* --data"):
        Index(index.path).records()
    assert len(Index(index.path).records(moved)) == 12
    write(data, texts(11))
    with pytest.raises(StoreError, match=r"has changed since .* was built: 11 examples"):
        Index(index.path).records()


def test_a_changed_setting_model_or_text_is_another_index(
    index: Index, model: Checkpoint, data: Path
) -> None:
    for other, method, settings, text, message in (
        (model, METHOD, collection(seed=1), data, "collection.seed: found 0, expected 1"),
        (model, LoRIF(format="bf16"), collection(), data, "representation.format"),
        (checkpoint(seed=1), METHOD, collection(), data, "model.fingerprint"),
        (model, METHOD, collection(), texts(11), "data.examples: found 12, expected 11"),
    ):
        with pytest.raises(StoreError, match=message):
            build(other, text, method, index.path, collection=settings)
    assert Index(index.path).hash() == index.hash()
    new, _ = build(model, texts(3), METHOD, index.path, collection=collection(), overwrite=True)
    assert len(new) == 3


def test_another_model_or_tokenizer_cannot_query(
    index: Index, model: Checkpoint, plain_tokenizer: Any
) -> None:
    assert len(record_queries(index, model, ["the shore"])) == 1
    with pytest.raises(StoreError, match="was built with another model"):
        record_queries(index, checkpoint(seed=1), ["the shore"])
    other = Checkpoint(model.model, plain_tokenizer, model.anatomy)
    with pytest.raises(StoreError, match="was built with another tokenizer"):
        record_queries(index, other, ["the shore"])
    with pytest.raises(DataError, match="example 1 is empty"):
        record_queries(index, model, ["the shore", " "])


def edit(index: Index, name: str, change: Callable[[Any], Any]) -> None:
    value = json.loads((index.path / name).read_text())
    change(value)
    (index.path / name).write_text(json.dumps(value))
    if name == "manifest.json":
        # As another version would have written it: the list says its hash.
        sha = hashlib.sha256((index.path / name).read_bytes()).hexdigest()
        edit(index, "shards.json", lambda body: body.update(manifest=sha))


def test_manifests_that_are_not_to_be_trusted(index: Index, tmp_path: Path) -> None:
    manifest = index.path / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(StoreError, match="was changed after the build"):
        Index(index.path)
    manifest.write_text(before)
    edit(index, "manifest.json", lambda body: body["content"].pop("layers"))
    with pytest.raises(StoreError, match="lacks or garbles a part"):
        Index(index.path)
    edit(index, "manifest.json", lambda body: body["content"]["representation"].update(kind="x"))
    with pytest.raises(StoreError, match="keeps 'x', which this version"):
        Index(index.path)
    edit(index, "manifest.json", lambda body: body.update(version=2))
    with pytest.raises(StoreError, match="attribution index version 2, this installation reads"):
        Index(index.path)
    edit(index, "manifest.json", lambda body: body.update(version=1))
    edit(index, "shards.json", lambda body: body["shards"][0].update(file="../../train.jsonl"))
    with pytest.raises(StoreError, match="points elsewhere is not read"):
        Index(index.path)
    with pytest.raises(StoreError, match="holds no attribution index"):
        Index(tmp_path)


def test_bad_input_is_refused_before_anything_is_written(
    model: Checkpoint, tmp_path: Path, plain_tokenizer: Any
) -> None:
    out = tmp_path / "index"
    empty = write(tmp_path / "empty.jsonl", [{"text": "a"}, {"text": ""}])
    with pytest.raises(DataError, match=r"empty\.jsonl line 2 is empty"):
        build(model, empty, METHOD, out)
    with pytest.raises(SettingsError, match="max_length is 65, but the model takes at most 64"):
        build(model, texts(2), METHOD, out, collection=collection(max_length=65))
    with pytest.raises(SettingsError, match="no linear layer matches"):
        build(model, texts(2), METHOD, out, collection=collection(layers="lm_head"))
    with pytest.raises(DataError, match="has no tokenizer"):
        build(Checkpoint(model.model, None, model.anatomy), texts(2), METHOD, out)
    assert not out.exists()
    # Only the tokenizer tells that a single letter leaves nothing to predict.
    plain = Checkpoint(model.model, plain_tokenizer, model.anatomy)
    with pytest.raises(DataError, match="example 1 is empty: 1 tokens"):
        build(plain, ["ab", "a"], METHOD, out)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL and no fork")
@pytest.mark.timeout(300)
def test_killed_builds_and_two_processes_make_the_same_bits(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "train.jsonl", texts(14))
    script = str(Path(__file__).with_name("interrupted.py"))
    command = [sys.executable, script, str(tiny_llama_dir), str(data), str(tmp_path), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    whole, *killed, shared = [json.loads(line) for line in done.stdout.splitlines()]
    assert whole["code"] == 0
    assert len([name for name in whole["files"] if name.endswith("safetensors")]) == 4
    assert whole["steps"] > 15
    for record in killed:
        assert record["killed"] == -signal.SIGKILL, record
        assert record["code"] == 0, record
        assert record["files"] == whole["files"], record
    assert shared["codes"] == [0, 0], done.stderr
    assert shared["files"] == whole["files"]
    index = Index(tmp_path / "shared")
    assert len(index) == 14
    assert index.verify() == []
