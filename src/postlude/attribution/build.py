"""Build an index: every training example through the model once, its rows into shards.

A shard is a run of consecutive examples and depends on nothing but them, the model and the settings, so a killed build
goes on at the first shard that is not there, and several processes (``torchrun``) take turns at shards and make the
same files as one.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import postlude
from postlude import registry
from postlude.attribution.data import Data, open_data
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection
from postlude.attribution.index import KIND, Index, describe_model
from postlude.attribution.queries import record_rows
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.processes import Processes
from postlude.runs.progress import Progress
from postlude.runs.store import TensorStore

__all__ = ["build", "plan_shards"]


def plan_shards(count: int, shard_examples: int) -> list[int]:
    """Examples of each shard: equal but for the last."""
    full, rest = divmod(count, shard_examples)
    return [shard_examples] * full + ([rest] if rest else [])


def build(
    checkpoint: Checkpoint,
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any] | str] | Data,
    attributor: Attributor,
    out: str | os.PathLike[str],
    *,
    collection: Collection | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Index, dict[str, Any]]:
    """Make the index of a training set, or go on with one that was interrupted.

    Args:
        checkpoint: the model.
        data: path of a .jsonl file, or records, or texts; images for a denoiser (:mod:`postlude.attribution.images`).
        attributor: settings of the method; they decide what is kept.
        out: the directory of the index.
        collection: length, layers, loss and so on.
        overwrite: replace an index of something else.
        progress: where to show it.

    Returns:
        The index, and ``examples``, ``tokens``, ``truncated`` (examples that were cut), ``truncated_tokens``,
        ``bytes``, ``bytes_per_example``, ``curvature_bytes`` (what is kept beside the rows), ``seconds``,
        ``resumed`` (examples that were already there).

    Raises:
        DataError: a record that cannot be used (names its line), or no tokenizer.
        SettingsError: settings that do not fit the model.
        StoreError: ``out`` holds something else, or the disk is full.
    """
    started = time.perf_counter()
    collection = collection or Collection()
    attributor.check_model(checkpoint)
    records = open_data(data, checkpoint.kind)
    records.check(checkpoint, collection)
    representation = attributor.representation()
    layers = representation.layers(checkpoint, collection)
    manifest = {
        "postlude": postlude.__version__,
        "model": describe_model(checkpoint),
        "data": {
            "path": None if records.path is None else str(Path(records.path).resolve()),
            "hash": records.hash,
            "examples": len(records),
            "kind": records.kind,
        },
        "method": {
            "name": registry.info_of(attributor).name,
            "settings": dataclasses.asdict(attributor),
        },
        "representation": representation.to_dict(),
        "collection": dataclasses.asdict(collection),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    rows = plan_shards(len(records), collection.shard_examples)
    with Processes() as processes, progress or Progress(show=False) as shown:
        store = processes.first(
            lambda: TensorStore.create(out, manifest, rows, kind=KIND, overwrite=overwrite),
            lambda: TensorStore.create(out, manifest, rows, kind=KIND),
        )
        missing = processes.agree(store.missing)
        resumed = len(records) - sum(rows[number] for number in missing)
        if resumed and missing:
            shown.log(f"resuming: {resumed} of {len(records)} examples are in {store.path}")
        mine = processes.share(missing)
        task = shown.task("examples", total=sum(rows[number] for number in mine))
        if mine:
            with representation.recorder(checkpoint, collection) as record:
                for number in mine:
                    start, stop = store.bounds(number)
                    examples = records.examples(checkpoint, collection, start, stop)
                    tensors = record_rows(
                        record, examples, collection.tokens_per_batch, task.advance
                    )
                    tensors["tokens"] = torch.tensor([e.count for e in examples], dtype=torch.int32)
                    tensors["cut"] = torch.tensor([e.cut for e in examples], dtype=torch.int32)
                    store.write(number, tensors)
        task.close()
        processes.wait()
        processes.first(store.finish)
        index = Index(store.path)
        index.use(records)
        processes.first(lambda: attributor.prepare(index, checkpoint, shown))
    cut = index.tensor("cut")
    return index, {
        "examples": len(index),
        "tokens": int(index.tensor("tokens").sum()),
        "truncated": int((cut > 0).sum()),
        "truncated_tokens": int(cut.sum()),
        "bytes": index.bytes,
        "bytes_per_example": index.bytes / len(index),
        "curvature_bytes": index.curvature_bytes,
        "seconds": time.perf_counter() - started,
        "resumed": resumed,
        "path": str(index.path),
    }
