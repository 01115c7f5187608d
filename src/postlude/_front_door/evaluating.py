"""Judge checkpoints, and attribution methods."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from postlude import _judging
from postlude._front_door.opening import Path_, open_checkpoint
from postlude._front_door.text import Text
from postlude.attribution.examples import Collection
from postlude.evaluation.lds import Retraining
from postlude.evaluation.perplexity import evaluate as _evaluate
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = ["evaluate", "evaluate_lds", "evaluate_retrieval"]


def evaluate(
    checkpoint: Path_ | Checkpoint,
    text: Text,
    *,
    reference: Path_ | Checkpoint | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure loss and perplexity on a text, and the distance to a reference model.

    A .txt file is cut into windows that do not overlap; every line of a .jsonl file is a document of its own.
    Nothing here is random: ``seed`` is taken for uniformity.

    Returns:
        See :func:`postlude.evaluation.perplexity.evaluate`; ``seconds`` is added.
    """
    base = None if reference is None else open_checkpoint(reference)
    started = time.perf_counter()
    result = _evaluate(
        open_checkpoint(checkpoint), text, reference=base, max_length=max_length, progress=progress
    )
    return {**result, "seconds": time.perf_counter() - started}


def evaluate_lds(
    checkpoint: Path_ | Checkpoint,
    data: _judging.Data,
    methods: Sequence[_judging.Method] = ("lorif", "logra", "graddot"),
    *,
    queries: _judging.Data | int = 60,
    subsets: int = 100,
    seeds: int = 1,
    training: Retraining | None = None,
    max_length: int = 0,
    run: Path_ | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge attribution methods by models trained on random halves of the data.

    Args:
        checkpoint: where every training starts, loaded or a path. The model that is explained is this one trained on
            all of ``data``.
        data: examples with ``"text"``: a .jsonl file, or records, or texts.
        methods: names or settings objects of attribution methods; BM25 and the similarity of hidden states are added.
        queries: what to ask about, as ``data``; or how many examples to hold out for it.
        subsets, seeds: random halves, and trainings of each.
        training: how models are trained.
        max_length: tokens at which an example is cut; 0 for the model's context.
        run: keep finished trainings in this directory: the same call after a kill resumes from them.
        overwrite: start a run of something else afresh.
        seed: of every random choice.
        progress: where to show it.

    Returns:
        ``methods``, one entry each: ``method``, ``lds`` with its 95 % interval ``low`` and ``high``,
        ``bytes_per_example`` of its index, ``build_cpu_seconds``, ``query_cpu_seconds`` (all queries), ``control``,
        ``above_controls`` (:func:`postlude.evaluation.lds.above` the better control, None of a control).
        Beside it ``query_loss_before``, ``query_loss`` of the explained model, ``query_loss_of_halves``, and with two
        seeds ``seed_correlation``, the rank correlation of the losses of one seed with those of another. ``notes``
        says what is to be kept in mind, such as that the halves are few.

    Raises:
        UnknownNameError: no such method.
        DataError: examples that cannot be read or trained on.
        RunDirectoryError: the run directory belongs to another model, data or training.
    """
    return _judging.judge_by_retraining(
        open_checkpoint(checkpoint),
        data,
        methods,
        queries=queries,
        subsets=subsets,
        seeds=seeds,
        training=training,
        collection=Collection(max_length=max_length),
        run=run,
        overwrite=overwrite,
        seed=seed,
        progress=progress,
    )


def evaluate_retrieval(
    checkpoint: Path_ | Checkpoint,
    data: _judging.Data,
    methods: Sequence[_judging.Method] = ("lorif", "logra", "graddot"),
    *,
    queries: int = 60,
    share: float = 0.3,
    facts: int = 20,
    training: Retraining | None = None,
    max_length: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge attribution methods by what they must find: copies of training examples, and sources of planted facts.

    Args:
        checkpoint: where training starts, loaded or a path; what is explained is this one trained on all of ``data``
            and the planted facts.
        data: examples with ``"text"``: a .jsonl file, or records, or texts.
        methods: names or settings objects of attribution methods; BM25 and the similarity of hidden states are added.
        queries: training examples to look for by copies of themselves.
        share: of the tokens of a copy replaced.
        facts: how many to plant; 0 for none.
        training: how the model is trained.
        max_length: tokens at which an example is cut; 0 for the model's context.
        seed: of every random choice.
        progress: where to show it.

    Returns:
        ``methods``, one entry each: ``method``, what :func:`postlude.evaluation.retrieval.self_retrieval` returns, with
        facts what :func:`postlude.evaluation.retrieval.planted_sources` returns (``planted_...``),
        ``noised_above_controls`` and ``planted_above_controls``, and the costs as in :func:`evaluate_lds`.
    """
    return _judging.judge_by_retrieval(
        open_checkpoint(checkpoint),
        data,
        methods,
        queries=queries,
        share=share,
        facts=facts,
        training=training,
        collection=Collection(max_length=max_length),
        seed=seed,
        progress=progress,
    )
