"""Attribution judged by evaluation: the one place where these two nouns meet, called by the front door.

Both checks start from a checkpoint, train it on the examples, ask every method why that model predicts what it
predicts, and hold the scores against what is known: the losses of models trained on halves
(:mod:`postlude.evaluation.lds`), or where something came from (:mod:`postlude.evaluation.retrieval`). BM25 and the
similarity of hidden states are always among the methods, as controls.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import postlude
from postlude import registry
from postlude.attribution.build import build
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection, Example, Records, tokenize
from postlude.attribution.index import Index
from postlude.attribution.queries import Queries, record_rows
from postlude.errors import ArchitectureError, DataError, SettingsError
from postlude.evaluation.lds import (
    Retraining,
    above,
    draw_subsets,
    lds,
    note_on_halves,
    reliability,
    retrain,
    retraining_bank,
)
from postlude.evaluation.perplexity import Sequences, sequence_losses
from postlude.evaluation.retrieval import plant_facts, planted_ranks, self_ranks
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.runs.progress import Progress

__all__ = ["CONTROLS", "Data", "Method", "judge_by_retraining", "judge_by_retrieval", "methods_of"]

CONTROLS = ("bm25", "repsim")

Data = str | os.PathLike[str] | Sequence[Mapping[str, Any] | str]
Method = str | Attributor


def judge_by_retraining(
    checkpoint: Checkpoint,
    data: Data,
    methods: Sequence[Method],
    *,
    queries: Data | int = 60,
    subsets: int = 100,
    seeds: int = 1,
    training: Retraining | None = None,
    collection: Collection | None = None,
    run: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Linear datamodeling score of attribution methods; see the front door."""
    started = time.perf_counter()
    _refuse_others(checkpoint)
    chosen = methods_of(methods)
    settings = training or Retraining()
    collection = collection or Collection()
    train, asked = _split(Records(data), queries, seed)
    tokens = _tokens(checkpoint, train, collection)
    query_tokens = _tokens(checkpoint, asked, collection)
    masks = draw_subsets(len(tokens), subsets, seed)
    manifest = {
        "postlude": postlude.__version__,
        "verb": "evaluate lds",
        "model": checkpoint.fingerprint(),
        "train": Records(train).hash,
        "queries": Records(asked).hash,
        "training": dataclasses.asdict(settings),
        "max_length": collection.max_length,
        "prompts": collection.prompts,
        "seed": seed,
    }
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(progress or Progress(show=False))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postlude-")))
        kept = RunDirectory(
            run if run is not None else place / "run", manifest, overwrite, "run directory (--run)"
        )
        if kept.finished():
            shown.log(f"resuming: {len(kept.finished())} finished trainings in {kept.path}")
        explained = _trained(checkpoint, tokens, settings, kept)
        # Methods first: what cannot be used is refused before anything long has begun.
        asked_of, scores = [], []
        for method in shown.iterate(chosen, "methods"):
            with _asking(explained, train, method, collection, place) as ask:
                scores.append(ask.texts(asked))
                asked_of.append((ask.label, ask.cost()))
        losses = retraining_bank(
            checkpoint,
            tokens,
            query_tokens,
            masks,
            settings,
            seeds=seeds,
            unit=kept.unit,
            progress=shown,
        )
    judged = [lds(score, masks, losses.mean(1), seed=seed) for score in scores]
    rows = [
        {"method": label, "lds": found.value, "low": found.low, "high": found.high, **cost}
        for (label, cost), found in zip(asked_of, judged, strict=True)
    ]
    _mark(rows, "above_controls", [found.per_query for found in judged], seed)
    note = note_on_halves(subsets)
    asked_sequences = Sequences(query_tokens, "documents")
    return {
        "examples": len(tokens),
        "queries": len(query_tokens),
        "subsets": subsets,
        "seeds": seeds,
        "training": settings,
        "query_loss_before": _mean(sequence_losses(checkpoint, asked_sequences)),
        "query_loss": _mean(sequence_losses(explained, asked_sequences)),
        "query_loss_of_halves": float(losses.mean()),
        "seed_correlation": reliability(losses, seed=seed).value if seeds > 1 else None,
        "methods": rows,
        "notes": [note] if note else [],
        "seconds": time.perf_counter() - started,
    }


def _refuse_others(checkpoint: Checkpoint) -> None:
    """Refuse what is no language model: both judges train on text."""
    if checkpoint.kind != "language":
        raise ArchitectureError(
            f"{checkpoint.path or 'this checkpoint'} is a {checkpoint.kind} model, and attribution is judged here by "
            "training language models on text; claims/learned_weights.py shows how to judge it for images"
        )


def judge_by_retrieval(
    checkpoint: Checkpoint,
    data: Data,
    methods: Sequence[Method],
    *,
    queries: int = 60,
    share: float = 0.3,
    facts: int = 20,
    training: Retraining | None = None,
    collection: Collection | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Self-retrieval and planted sources of attribution methods; see the front door."""
    started = time.perf_counter()
    _refuse_others(checkpoint)
    chosen = methods_of(methods)
    settings = training or Retraining()
    collection = collection or Collection()
    records = Records(data)
    train: list[Mapping[str, Any]] = [records[number] for number in range(len(records))]
    planted = plant_facts(facts, seed) if facts else None
    if planted is not None:
        train += [{"text": text} for text in planted.examples]
    tokens = _tokens(checkpoint, train, collection)
    rows: list[dict[str, Any]] = []
    noised, recalls = [], []
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(progress or Progress(show=False))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postlude-")))
        shown.log(f"training on {len(tokens)} examples")
        explained = retrain(checkpoint, tokens, settings, seed)
        for method in shown.iterate(chosen, "methods"):
            with _asking(explained, train, method, collection, place) as ask:
                ranks = self_ranks(ask.tokens, tokens, queries=queries, share=share, seed=seed)
                noised.append((ranks.noised == 1).double())
                row = ranks.summary()
                if planted is not None:
                    sources = [[len(records) + i for i in one] for one in planted.sources]
                    asked = _tokens(explained, [{"text": q} for q in planted.queries], collection)
                    found = planted_ranks(ask.tokens, asked, sources, len(tokens))
                    recalls.append(found.recall)
                    row |= {f"planted_{key}": value for key, value in found.summary().items()}
                rows.append({"method": ask.label, **row, **ask.cost()})
    _mark(rows, "noised_above_controls", noised, seed)
    if recalls:
        _mark(rows, "planted_above_controls", recalls, seed)
    return {
        "examples": len(tokens),
        "queries": min(queries, len(tokens)),
        "share": share,
        "facts": facts,
        "training": settings,
        "methods": rows,
        "seconds": time.perf_counter() - started,
    }


def _mark(rows: Sequence[dict[str, Any]], key: str, per_query: Sequence[Tensor], seed: int) -> None:
    """Say of every method whether it is above the best control on the same queries; None of a control."""
    controls = [values for row, values in zip(rows, per_query, strict=True) if row["control"]]
    best = max(controls, key=lambda values: float(values.double().mean()))
    for row, values in zip(rows, per_query, strict=True):
        row[key] = None if row["control"] else above(values, best, seed=seed)


def methods_of(methods: Sequence[Method]) -> list[Attributor]:
    """Settings of the methods, and of those controls that are not among them.

    Raises:
        UnknownNameError: a name that is not registered; carries the nearest ones.
        SettingsError: no attribution method.
    """
    chosen = [
        registry.find("attribute", one).settings() if isinstance(one, str) else one
        for one in methods
    ]
    for one in chosen:
        if not isinstance(one, Attributor):
            raise SettingsError(
                f"methods holds a {type(one).__name__}; expected names or settings of attribute methods"
            )
    names = [one.name for one in chosen]
    missing = [name for name in CONTROLS if name not in names]
    return chosen + [registry.find("attribute", name).settings() for name in missing]


class _Ask:
    """One method on one model: builds its index, then scores queries."""

    def __init__(
        self, explained: Checkpoint, method: Attributor, index: Index, bytes_: float, seconds: float
    ) -> None:
        self.explained, self.method, self.index = explained, method, index
        self.bytes, self.build, self.query = bytes_, seconds, 0.0

    @property
    def label(self) -> str:
        return _label(self.method)

    def texts(self, records: Sequence[Mapping[str, Any]]) -> Tensor:
        """Scores ``[Q, N]`` of records."""
        return self._score(_examples(self.explained, records, self.index.collection))

    def tokens(self, queries: Sequence[Tensor]) -> Tensor:
        """Scores ``[Q, N]`` of sequences of tokens."""
        return self._score([Example(i, one.tolist(), 1, 0) for i, one in enumerate(queries)])

    def cost(self) -> dict[str, Any]:
        return {
            "bytes_per_example": self.bytes,
            "build_cpu_seconds": self.build,
            "query_cpu_seconds": self.query,
            "control": self.method.name in CONTROLS,
        }

    def _score(self, examples: list[Example]) -> Tensor:
        started = time.process_time()
        full, collection = self.index.representation.full_precision(), self.index.collection
        with full.recorder(self.explained, collection) as record:
            tensors = record_rows(record, examples, collection.tokens_per_batch)
        queries = Queries(examples, tensors, full, self.index.layers, self.explained)
        scores = self.method.score(self.index, queries).total
        self.query += time.process_time() - started
        return scores


@contextlib.contextmanager
def _asking(
    explained: Checkpoint,
    train: Sequence[Mapping[str, Any]],
    method: Attributor,
    collection: Collection,
    place: Path,
) -> Iterator[_Ask]:
    """An index that is there as long as it is asked."""
    # From a file, since some methods read the training examples again.
    file = place / "train.jsonl"
    if not file.is_file():
        file.write_text("".join(json.dumps(dict(one)) + "\n" for one in train), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="index-", dir=place) as folder:
        started = time.process_time()
        index, report = build(
            explained, file, method, Path(folder) / "index", collection=collection
        )
        method.prepare(index, explained)
        seconds = time.process_time() - started
        yield _Ask(explained, method, index, report["bytes_per_example"], seconds)


def _trained(
    checkpoint: Checkpoint, tokens: Sequence[Tensor], settings: Retraining, kept: RunDirectory
) -> Checkpoint:
    """The model to explain, kept like the others."""

    def compute() -> dict[str, Tensor]:
        return dict(retrain(checkpoint, tokens, settings).model.state_dict())

    model = copy.deepcopy(checkpoint.model)
    model.load_state_dict(kept.unit("trained-on-everything", compute))
    return dataclasses.replace(checkpoint, model=model, path=None)


def _split(
    records: Records, queries: Data | int, seed: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Training examples and queries: those given, or so many held out at random."""
    everything = [records[number] for number in range(len(records))]
    if not isinstance(queries, int):
        found = Records(queries)
        return everything, [found[number] for number in range(len(found))]
    if not 2 <= queries <= len(everything) - 4:
        raise DataError(
            f"{queries} of {len(everything)} examples are to be held out as queries; expected 2 or more, with 4 "
            "or more left to train on."
        )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:queries])
    return (
        [one for number, one in enumerate(everything) if number not in held_out],
        [everything[number] for number in order[:queries]],
    )


def _examples(
    checkpoint: Checkpoint, records: Sequence[Mapping[str, Any]], collection: Collection
) -> list[Example]:
    length = collection.max_length or checkpoint.context
    found = Records(list(records))
    return tokenize(checkpoint.tokenizer, found, 0, len(found), length, collection)


def _tokens(
    checkpoint: Checkpoint, records: Sequence[Mapping[str, Any]], collection: Collection
) -> list[Tensor]:
    if any("text" not in one for one in records):
        raise DataError(
            'Some examples have "prompt" and "completion"; expected "text" in each: models are retrained on whole '
            "texts."
        )
    return [torch.tensor(one.tokens) for one in _examples(checkpoint, records, collection)]


def _label(method: Attributor) -> str:
    """The name, and every setting that is not its default."""
    changed = [
        f"{field.name}={getattr(method, field.name)}"
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != field.default
    ]
    return method.name + (f" ({', '.join(changed)})" if changed else "")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
