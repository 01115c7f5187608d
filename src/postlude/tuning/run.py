"""One tuning run, from a checkpoint to a tuned one: once for every objective.

Adapters, the run directory, resuming, merging, checking, saving and the report. What is trained for is said by an
:class:`postlude.tuning.objective.Objective`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import postlude
from postlude import registry
from postlude.errors import (
    InputError,
    NonFiniteError,
    OutputExistsError,
    RunDirectoryError,
    SettingsError,
)
from postlude.runs.atomic import check_replaceable, discard
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory, run_beside
from postlude.runs.processes import Processes
from postlude.runs.progress import Progress
from postlude.runs.quiet import quiet_transformers
from postlude.runs.ranks import rank, ranks
from postlude.surgery.layers import quantized_linears
from postlude.tuning import adapters
from postlude.tuning.adapters import Adapter
from postlude.tuning.encoder import check_encoder, hold_fixed
from postlude.tuning.merging import check_mergeable
from postlude.tuning.objective import Job, Objective, TuneRun
from postlude.tuning.output import MARKER, Report, finished, keep_model, plain, save
from postlude.tuning.recordings import recordings_digest
from postlude.tuning.reference import cast, frozen
from postlude.tuning.rewards import RewardError
from postlude.tuning.sharded import asked, check_shardable, is_sharded, whole
from postlude.tuning.states import seeded

__all__ = [
    "Tuned",
    "data_files",
    "main_process",
    "tune",
]

_STATES, _MODEL = "states", "model-before"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A finished run.

    Attributes:
        checkpoint: the tuned model; with adapters that are not merged, still in peft's layers.
        result: numbers of the run, ``loss`` among them.
        log: one row for every optimiser step.
    """

    checkpoint: Checkpoint
    result: dict[str, Any]
    log: list[dict[str, Any]]


def tune(
    checkpoint: Checkpoint,
    data: str | os.PathLike[str],
    objective: Objective,
    run: TuneRun,
    *,
    adapter: Adapter | None = None,
    merge: bool = False,
    reference: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
    encoder: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    inplace: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Train a copy of a model, check it and save it.

    Parameters that are trained are kept in fp32 and stored in the type of the checkpoint, unless ``dtype`` says
    otherwise. On a CPU, where 16-bit products are slow, everything is computed in fp32.

    With ``out`` the state of the run is kept beside it (``.NAME.run``) until it is saved: the same call after a kill
    goes on from the last state and ends with the same bits. Under torchrun every rank calls this; the first one saves.

    Args:
        checkpoint: the model to start from.
        data: a .jsonl file.
        objective: what to train for.
        run: length, batch, rate, seed.
        adapter: train this beside the frozen weights; None trains the weights.
        merge: add the adapter to the weights at the end.
        reference: a frozen model for objectives that read one; None for the model to start from.
        dtype: to train and to store in.
        encoder: of an audio language model: ``trained`` (as where nothing is said) or ``frozen``.
        out: the directory to write: model, tokenizer, ``tune.json``, ``steps.jsonl`` and the report.
        overwrite: replace ``out``, and start a run of something else afresh.
        inplace: train the given model rather than a copy of it.
        report: writes the report of result and log into a directory.
        progress: where to show it.

    Raises:
        SettingsError: settings that do not fit the model or each other.
        DataError: data that cannot be read; names file and line.
        OutputExistsError: ``out`` exists.
        RunDirectoryError: a run of something else was stopped there.
        NonFiniteError: a loss or a gradient is not finite; names the step, and where the model before it is kept.
        VerificationError: the merged or the saved model does not compute what the trained one does.
    """
    final = None if out is None else Path(os.path.realpath(out))
    _check(checkpoint, adapter, merge, final, overwrite)
    encoder = check_encoder(checkpoint, encoder)
    manifest = _manifest(checkpoint, data, objective, run, adapter, reference, dtype, encoder)
    stored = checkpoint.model.dtype if dtype is None else dtype
    with (
        Processes() as processes,
        _directory(final, manifest, overwrite, processes) as directory,
    ):
        job = _job(
            checkpoint,
            Path(data),
            objective,
            run,
            adapter,
            reference,
            dtype,
            encoder,
            inplace,
            directory,
            progress,
        )
        job = dataclasses.replace(
            job, fingerprint=manifest["model"], reference_fingerprint=manifest["reference"]
        )
        if merge:
            check_mergeable(job.model)
        if asked():
            check_shardable(job.model, job.checkpoint.kind, objective.needs_reference)
        objective.check(job)
        trained = sum(one.numel() for one in job.model.parameters() if one.requires_grad)
        configuration = job.checkpoint.model.config.get_text_config()
        uses_cache = configuration.use_cache
        try:
            with quiet_transformers():
                outcome = objective.train(job)
        except NonFiniteError as error:
            if final is None or not main_process() or is_sharded(job.model):
                raise
            place = keep_model(job, directory.parent / _MODEL)
            raise NonFiniteError(f"{error} The model as it was then is in {place}.") from error
        finally:
            configuration.use_cache = uses_cache
        if is_sharded(job.model):
            job = dataclasses.replace(job, model=whole(job.model, main_process()))
            job = dataclasses.replace(
                job, checkpoint=dataclasses.replace(job.checkpoint, model=job.model)
            )
        model, differs = finished(job, merge, stored)
        result = {
            "output": None if out is None else os.fspath(out),
            "checkpoint": None if checkpoint.path is None else os.fspath(checkpoint.path),
            **manifest["objective"],
            **outcome.result,
            "trained_parameters": trained,
            "adapter": None if adapter is None else adapter.name,
            **({} if encoder is None else {"encoder": encoder}),
            "merged": merge,
            "merge_difference": differs,
            "seed": run.seed,
        }
        tuned = Tuned(
            dataclasses.replace(job.checkpoint, model=model, path=final),
            result,
            [dict(row) for row in outcome.log],
        )
        if final is not None and main_process():
            save(tuned, job, manifest, final, overwrite, report)
            discard(directory.parent, final)
        processes.wait()
    return tuned


def main_process() -> bool:
    """Whether this is the process that writes: the only one, or the first of torchrun's."""
    return rank() == 0


def data_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that ``path`` stands for: itself, or every .jsonl file in it."""
    source = Path(path)
    return sorted(source.glob("*.jsonl")) if source.is_dir() else [source]


# ------------------------------------------------------------------------------------------------------ before


def _check(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    merge: bool,
    final: Path | None,
    overwrite: bool,
) -> None:
    if final is not None:
        check_replaceable(final, overwrite, MARKER)
        if checkpoint.path is not None and checkpoint.path == final:
            raise OutputExistsError(
                f"{final} is the model itself, which would be lost: choose another output."
            )
    if final is not None and adapter is not None and not merge and checkpoint.path is None:
        raise SettingsError(
            "The model to adapt has no directory of its own (it is in memory, or an adapter was merged into it), so an "
            "adapter alone could not be loaded again: save the model first, or merge (--merge)."
        )
    if merge and adapter is None:
        raise SettingsError(
            "There is no adapter to merge: choose one (--adapter lora), or leave --merge out."
        )
    quantized = [name for name, _ in quantized_linears(checkpoint.model)]
    if quantized and adapter is None:
        raise SettingsError(
            f"{checkpoint.path or 'this checkpoint'} is quantized ({len(quantized)} layers, {quantized[0]} first), and "
            "codes cannot be trained. Tune the float model it was made from and quantize the result, or train an "
            "adapter beside the codes (--adapter lora)."
        )


def _manifest(
    checkpoint: Checkpoint,
    data: str | os.PathLike[str],
    objective: Objective,
    run: TuneRun,
    adapter: Adapter | None,
    reference: Checkpoint | None,
    dtype: torch.dtype | None,
    encoder: str | None,
) -> dict[str, Any]:
    """Everything that decides the result."""
    heard = recordings_digest(checkpoint, Path(data))
    if heard is not None and not objective.hears:
        raise SettingsError(
            f"{registry.info_of(objective).name} reads no recordings, and lines of {data} name some: use an objective "
            "that does (sft)."
        )
    digest = hashlib.sha256()
    for file in data_files(data):
        if file.is_file():
            digest.update(file.read_bytes())
    return plain(
        {
            "postlude": postlude.__version__,
            "verb": "tune",
            "objective": objective.describe(),
            "run": dataclasses.asdict(run),
            "adapter": None if adapter is None else dataclasses.asdict(adapter),
            "model": checkpoint.fingerprint(),
            "reference": None if reference is None else reference.fingerprint(),
            "data": digest.hexdigest(),
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            **({} if encoder is None else {"encoder": encoder, "recordings": heard}),
            "device": checkpoint.model.device.type,
            "ranks": ranks(),
            **({"sharded": True} if asked() else {}),
        }
    )


@contextlib.contextmanager
def _directory(
    final: Path | None, manifest: Mapping[str, Any], overwrite: bool, processes: Processes
) -> Iterator[Path]:
    """Where states are kept: beside the output, or for a run that is not saved nowhere for long."""
    if final is None:
        with tempfile.TemporaryDirectory(prefix="postlude-tune-") as name:
            yield Path(name)
        return
    path = run_beside(final)
    processes.first(lambda: _opened(path, manifest, overwrite), lambda: None)
    try:
        yield path / _STATES
    except (NonFiniteError, OutputExistsError):
        raise
    except RewardError:
        # It may have asked something that answers another time: only a run without a state is removed.
        if main_process() and not any((path / _STATES).glob("step-*")):
            discard(path, final)
        raise
    except InputError:
        # The same call would fail again, and another one is another run.
        if main_process():
            discard(path, final)
        raise


def _opened(path: Path, manifest: Mapping[str, Any], overwrite: bool) -> None:
    """The run directory, made, found, or started afresh."""
    try:
        RunDirectory(path, manifest)
    except RunDirectoryError:
        if not overwrite:
            raise
        shutil.rmtree(path / _STATES, ignore_errors=True)
        shutil.rmtree(path / _MODEL, ignore_errors=True)
        RunDirectory(path, manifest, overwrite=True)


def _job(
    checkpoint: Checkpoint,
    data: Path,
    objective: Objective,
    run: TuneRun,
    adapter: Adapter | None,
    reference: Checkpoint | None,
    dtype: torch.dtype | None,
    encoder: str | None,
    inplace: bool,
    directory: Path,
    progress: Progress | None,
) -> Job:
    slow = checkpoint.model.device.type == "cpu"
    if reference is None and objective.needs_reference and adapter is None:
        reference = checkpoint
        if inplace:
            reference = dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    if reference is not None:
        reference = dataclasses.replace(reference, model=frozen(reference.model))
    model = checkpoint.model if inplace else copy.deepcopy(checkpoint.model)
    wide = dtype
    if (
        wide is None
        and model.dtype in (torch.float16, torch.bfloat16)
        and (slow or adapter is None)
    ):
        wide = torch.float32
    if wide is not None:
        model = cast(model, wide)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    work = dataclasses.replace(checkpoint, model=model)
    with seeded(run.seed):
        trained = model if adapter is None else adapters.attach(work, adapter, encoder)
    hold_fixed(work, encoder, adapters=adapter is not None)
    return Job(work, trained, data, run, reference, directory, progress)
