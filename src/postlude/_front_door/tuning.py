"""Train a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.loading import dtype_of
from postlude.runs.progress import Progress
from postlude.tuning.adapters import Adapter
from postlude.tuning.examples import read_examples
from postlude.tuning.objective import TuneRun
from postlude.tuning.prior import compute_prior
from postlude.tuning.recordings import recordings_for
from postlude.tuning.run import Tuned
from postlude.tuning.run import tune as _tune
from postlude.tuning.supervised import Goal, length_of, objective_of

__all__ = ["tune", "tune_prior"]


def tune(
    checkpoint: Path_ | Checkpoint,
    data: Path_,
    goal: Goal = "sft",
    run: TuneRun | None = None,
    *,
    signal: str | None = None,
    prior: Path_ | None = None,
    reference: Path_ | Checkpoint | None = None,
    keep_eos: bool = False,
    adapter: str | Adapter | None = None,
    merge: bool = False,
    dtype: str | torch.dtype = "auto",
    encoder: str | None = None,
    out: Path_ | None = None,
    overwrite: bool = False,
    save_every: int | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Train a model on demonstrations with token weights, on preferences, or by rewards.

    Args:
        checkpoint: where to start, loaded or a path.
        data: a .jsonl file: ``prompt`` and ``completion``, ``messages``, or ``text``; other objectives have others.
        goal: a token rule by name or settings (``PriFTMass()``), a whole
            :class:`postlude.tuning.weighting.TokenWeighting`, or another objective (``"dpo"``).
        run: length, batch, learning rate, seed.
        signal: what a rule reads its probabilities from: ``online`` or ``reference``; the paper's own when None.
        prior: directory of the reference's stored columns, see :func:`tune_prior`.
        reference: the frozen model; the one to start from when None.
        keep_eos: the token that ends a text weighs 1 whatever the rule says of it.
        adapter: train this beside frozen weights: a name of the peft library, or settings.
        merge: add the adapter to the weights at the end.
        dtype: to train and to store in; ``"auto"`` trains in fp32 and stores as the checkpoint is stored.
        encoder: of an audio language model: ``"trained"``, whole, also beside an adapter (as where nothing is said), or
            ``"frozen"``.
        out: where to save the result with its log and report. The same call after a kill resumes.
        overwrite: replace ``out``, and start a run of something else afresh.
        save_every: steps from one kept state to the next.
        inplace: train the given model rather than a copy of it.
        progress: where to show it.

    Returns:
        The tuned checkpoint, the run in numbers, and one row for every step.

    Raises:
        See :func:`postlude.tuning.run.tune`.
    """
    from postlude.report.tuning import write as write_report

    objective = objective_of(goal, signal, prior, keep_eos, save_every)
    chosen = dtype_of(dtype)
    opened = open_checkpoint(checkpoint)
    return _tune(
        opened,
        data,
        objective,
        TuneRun() if run is None else run,
        adapter=Adapter(adapter) if isinstance(adapter, str) else adapter,
        merge=merge,
        reference=None if reference is None else open_checkpoint(reference),
        dtype=chosen if isinstance(chosen, torch.dtype) else None,
        encoder=encoder,
        out=out,
        overwrite=overwrite,
        inplace=inplace or opened is not checkpoint,
        report=write_report,
        progress=progress,
    )


def tune_prior(
    reference: Path_ | Checkpoint,
    data: Path_,
    out: Path_,
    *,
    max_length: int | None = None,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compute once what a frozen reference says about every token to be learned, and store it for :func:`tune`.

    Args:
        reference: the frozen model, loaded or a path; usually the one that tuning starts from.
        data: as for :func:`tune`.
        out: the directory to write. The same call after a kill resumes.
        max_length: tokens at which a sequence is cut; the same as in tuning.
        dtype: to compute in; ``"auto"`` for the model's own, on a CPU float32.
        overwrite: replace ``out``.
        progress: where to show it.

    Returns:
        The manifest of :mod:`postlude.tuning.prior`: what it was computed from, how much it holds.
    """
    chosen = dtype_of(dtype)
    opened = open_checkpoint(reference)
    length = length_of(max_length, opened.context)
    examples = read_examples(data, opened.tokenizer, length, progress, recordings_for(opened))
    return compute_prior(
        opened,
        examples,
        out,
        max_length=length,
        dtype=chosen if isinstance(chosen, torch.dtype) else None,
        overwrite=overwrite,
        progress=progress,
    )
