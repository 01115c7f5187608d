"""Tell which training examples an answer comes from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postlude import registry
from postlude._front_door.opening import Path_, open_checkpoint
from postlude.attribution.answers import Answer
from postlude.attribution.build import build as _build
from postlude.attribution.data import Data, open_data
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection
from postlude.attribution.forecast import forecast
from postlude.attribution.index import Index
from postlude.attribution.layer_weights import LayerWeights, Learning
from postlude.attribution.plan import this_machine
from postlude.attribution.query import learn_weights, method_of, model_of
from postlude.attribution.query import query as _query
from postlude.errors import InputError, SettingsError
from postlude.runs.atomic import atomic_write
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = [
    "Examples",
    "attribute",
    "attribution_learn_weights",
    "attribution_query",
    "attribution_verify",
    "opened_index",
]

Examples = Path_ | Sequence[Mapping[str, Any] | str] | Data


def attribute(
    checkpoint: Path_ | Checkpoint,
    data: Examples,
    method: str | Attributor = "lorif",
    *,
    out: Path_,
    collection: Collection | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Index:
    """Build an index of training examples, to ask which of them made the model say something.

    What it is expected to take is said before it starts. A build that was killed goes on where it stopped when it
    is called again, and ends with the same bytes.

    Args:
        checkpoint: loaded, or a path.
        data: a ``.jsonl`` file with ``text``, or ``prompt`` and ``completion``, a line; or such records; or texts. For
            a diffusion model a folder of ``.png`` files with ``labels.jsonl``, or a ``.npz`` or ``.safetensors`` file.
        method: a settings object such as ``LoRIF(rank=1)``, or a name for its defaults.
        out: the directory of the index.
        collection: length, layers, loss, seed.
        overwrite: replace an index of something else.
        progress: where to show it.

    Returns:
        The index; ``index.query(text, top=10)`` asks it. ``index.report`` says what the build took.

    Raises:
        SettingsError: settings that the method, or this model, cannot do.
        DataError: examples that cannot be used; names the line.
        StoreError: ``out`` holds something else.
        NoSpaceError: the disk is full.
    """
    settings = _attributor(method)
    chosen = collection or Collection()
    opened = open_checkpoint(checkpoint)
    settings.check_model(opened)
    examples = open_data(data, opened.kind)
    examples.check(opened, chosen)
    if progress is not None and progress.shown:
        expected = forecast(opened, examples, settings, chosen, this_machine())
        if expected is not None:
            progress.log(str(expected))
    index, report = _build(
        opened, examples, settings, out, collection=chosen, overwrite=overwrite, progress=progress
    )
    index.report = report
    return index


def _attributor(method: str | Attributor) -> Attributor:
    settings = registry.find("attribute", method).settings() if isinstance(method, str) else method
    if not isinstance(settings, Attributor):
        raise SettingsError(
            f"attribute takes the name or the settings of an attribute method, got {type(method).__name__}"
        )
    return settings


def attribution_query(
    index: Path_ | Index,
    source: Examples,
    *,
    method: str | Attributor | None = None,
    changes: Mapping[str, Any] | None = None,
    weights: Path_ | LayerWeights | None = None,
    checkpoint: Path_ | Checkpoint | None = None,
    data: Examples | None = None,
    top: int = 10,
    layers: bool = False,
    tokens: bool = False,
    html: Path_ | None = None,
    keep: bool = True,
    command: str = "",
    progress: Progress | None = None,
) -> list[Answer]:
    """Rank training examples for one query or several, and write the page of the answers.

    Args:
        index: opened, or a path.
        source: a text, a ``.jsonl`` file with a query a line, or a list.
        method: another method, or other settings, that can read the index; those it was built for otherwise.
        changes: settings to change in it, for example ``{"damping": 2.0}``.
        weights: of layers, learned for this index and method by :func:`attribution_learn_weights`, or their file.
        checkpoint, data: the model and the examples, where they are no longer where they were.
        top, layers, tokens: see :func:`postlude.attribution.query.query`.
        html: file to write the page to, with layers and tokens.
        keep: keep the fitted curvature in the index for later queries.
        command: that makes the page again, to be printed on it.
        progress: where to show it.
    """
    opened, settings, model = opened_index(index, method, changes, checkpoint)
    answers = _query(
        opened,
        source,
        top=top,
        layers=layers or html is not None,
        tokens=tokens or html is not None,
        method=settings,
        weights=weights,
        checkpoint=model,
        data=data,
        keep=keep,
        progress=progress,
    )
    if html is not None:
        from postlude.report.attribution import page_of

        named = None
        if weights is not None:
            loaded = weights if isinstance(weights, LayerWeights) else LayerWeights.load(weights)
            named = loaded.named()
        page = page_of(opened, answers, settings, command, named)
        Path(html).resolve().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as temporary:
            temporary.write_text(page, encoding="utf-8")
    return answers


def opened_index(
    index: Path_ | Index,
    method: str | Attributor | None,
    changes: Mapping[str, Any] | None,
    checkpoint: Path_ | Checkpoint | None,
) -> tuple[Index, Attributor, Checkpoint]:
    """An index, the settings to ask it with, and its model."""
    opened = index if isinstance(index, Index) else Index(index)
    settings = method_of(opened) if method is None else _attributor(method)
    if changes:
        settings = dataclasses.replace(settings, **changes)
    settings.check(opened)
    return opened, settings, model_of(opened) if checkpoint is None else open_checkpoint(checkpoint)


def attribution_learn_weights(
    index: Path_ | Index,
    source: Examples,
    *,
    out: Path_ | None = None,
    learning: Learning | None = None,
    method: str | Attributor | None = None,
    changes: Mapping[str, Any] | None = None,
    checkpoint: Path_ | Checkpoint | None = None,
    keep: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LayerWeights:
    """Learn what each layer should count for, from queries alone.

    Args:
        index: opened, or a path.
        source: queries, as for :func:`attribution_query`; those that share a style or a background teach weights for
            just that.
        out: file to write the weights to, ``weights.safetensors`` in the index by default.
        learning: how.
        method, changes, checkpoint, keep: as for :func:`attribution_query`; the weights hold for that method.
        overwrite: replace a file that is there.
        progress: where to show it.

    Returns:
        The weights; ``attribution_query(..., weights=...)`` takes them or their file.

    Raises:
        SettingsError: fewer queries or examples than ``k``, or a method whose scores are no sum over layers.
    """
    opened, settings, model = opened_index(index, method, changes, checkpoint)
    found = learn_weights(
        opened,
        source,
        learning,
        method=settings,
        checkpoint=model,
        keep=keep,
        progress=progress,
    )
    found.save(opened.path / "weights.safetensors" if out is None else out, overwrite=overwrite)
    return found


def attribution_verify(index: Path_ | Index) -> dict[str, Any]:
    """Read every byte of an index and compare it with its checksums.

    Returns:
        ``path``, ``examples``, ``shards``, ``bytes``, ``damaged`` (shard, file and reason of each), ``data``: whether
        the training examples are ``unchanged`` since the build, what is wrong with them, or why that is not known,
        and ``ok``: whether no shard is damaged and the examples, where they are at hand, are unchanged.

    Raises:
        StoreError: not an index, or one that cannot even be opened.
    """
    opened = index if isinstance(index, Index) else Index(index)
    damaged = opened.verify()
    data, whole = "unchanged", True
    given = opened.manifest["data"]["path"]
    if given is None:
        data = "unknown: the index was built from examples in memory"
    elif not os.path.exists(given):
        data = f"unknown: there is no file {given} any more"
    else:
        try:
            # Read again, whatever the index has in memory.
            opened.records(given)
        except InputError as error:
            data, whole = str(error), False
    return {
        "path": str(opened.path),
        "ok": whole and not damaged,
        "examples": len(opened),
        "shards": len(opened.store.shards),
        "bytes": opened.bytes,
        "damaged": [dataclasses.asdict(one) for one in damaged],
        "data": data,
    }
