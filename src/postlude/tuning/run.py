"""One tuning run: what is trained, on what, for how long; and what an objective has to do.

An objective is a frozen dataclass registered with ``@method("tune", NAME, family="objective")`` that extends
:class:`Objective`. It is handed a :class:`Job`, trains ``job.model`` in place and returns an :class:`Outcome`.
Everything around it (adapters, the run directory, resuming, merging, checking, saving, the report) is done here,
once for every objective.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

import postlude
from postlude import registry
from postlude.errors import (
    DataError,
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
from postlude.tuning.output import MARKER, Report, finished, keep_model, plain, save
from postlude.tuning.prior import cast, frozen
from postlude.tuning.recordings import recordings_digest
from postlude.tuning.sharded import asked, check_shardable, is_sharded, whole

__all__ = [
    "Job",
    "Objective",
    "Outcome",
    "RewardError",
    "TuneRun",
    "Tuned",
    "data_files",
    "main_process",
    "tune",
]

SCHEDULES = ("constant", "cosine", "linear")
_STATES, _MODEL = "states", "model-before"


class RewardError(DataError):
    """A reward function that raised something."""


@dataclasses.dataclass(frozen=True)
class TuneRun:
    """How long, on how much at once and how fast.

    Defaults are those published for PriFT (arXiv:2606.09396) where it says something, but for the batch.

    Attributes:
        epochs: passes over the data; not looked at where ``steps`` is given.
        steps: optimiser steps.
        batch_size: sequences of one forward pass on one device.
        accumulate: forward passes of one optimiser step. The loss is a mean over the tokens of the whole step, on
            all devices, so only the product of batch size, accumulation and devices matters to it.
        learning_rate: highest.
        warmup: share of the steps in which the learning rate rises from 0.
        schedule: how it falls after: ``cosine``, ``linear`` or ``constant``.
        weight_decay: of AdamW, whose betas are 0.9 and 0.95.
        clip: largest norm of the gradient.
        max_length: longest sequence in tokens; None for the model's context, at most 2048. What is longer loses its
            end, which is counted and reported.
        packing: fill rows with several sequences, which do not see each other.
        seed: of the order of the data, of dropout and of new adapters.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-5
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int | None = None
    packing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise SettingsError(f"epochs is {self.epochs}; expected a number above 0")
        for name in ("steps", "batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; expected 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise SettingsError(
                f"learning_rate is {self.learning_rate}; expected 0 or more (0 changes nothing)"
            )
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"warmup is {self.warmup}; expected a share of the steps, 0 to 1")
        if self.schedule not in SCHEDULES:
            raise SettingsError(f"schedule is {self.schedule!r}; expected {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise SettingsError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if not self.clip > 0:
            raise SettingsError(f"clip is {self.clip}; expected a number above 0 (inf never clips)")
        if self.max_length is not None and self.max_length < 2:
            raise SettingsError(f"max_length is {self.max_length}; expected at least 2 tokens")


@dataclasses.dataclass(frozen=True)
class Job:
    """What an objective is given.

    Attributes:
        checkpoint: the model before tuning, its tokenizer and its anatomy.
        model: what to train, in place: a transformers model, or one of peft around it. Trainable parameters are in
            fp32, or in the type that was asked for.
        data: a .jsonl file.
        run: length, batch, rate, seed.
        reference: the frozen model; None where none was given. With adapters, ``model`` with its adapters off is
            the model before tuning.
        directory: where to keep what a killed run resumes from. It belongs to exactly this run.
        progress: where to show how far it is; None shows nothing.
        fingerprint: of the checkpoint as it was loaded.
        reference_fingerprint: of the reference that was given; None where none was.
    """

    checkpoint: Checkpoint
    model: Any
    data: Path
    run: TuneRun
    reference: Checkpoint | None
    directory: Path
    progress: Progress | None = None
    fingerprint: str = ""
    reference_fingerprint: str | None = None

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained rather than the weights."""
        return hasattr(self.model, "peft_config")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an objective hands back.

    Attributes:
        result: numbers for the caller, ``loss`` among them.
        log: one row for every optimiser step: ``step``, ``loss``, ``learning_rate`` and whatever else it measured.
    """

    result: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]


class Objective(abc.ABC):
    """What is minimised or maximised.

    Attributes:
        hears: whether lines may name recordings (``audio``), for audio language models.
    """

    hears: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model is run beside the one in training; without adapters a copy is then kept of it."""
        return False

    def describe(self) -> dict[str, Any]:
        """Everything of it that decides the result, as plain values."""
        settings = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"objective": registry.info_of(self).name, **settings}

    def check(self, job: Job) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse, before anything is computed, what cannot be done."""

    @abc.abstractmethod
    def train(self, job: Job) -> Outcome:
        """Train ``job.model`` in place."""


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
            adapters.check_mergeable(job.model)
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
    from postlude.tuning.trainer import seeded

    slow = checkpoint.model.device.type == "cpu"
    if reference is None and objective.needs_reference and adapter is None:
        reference = checkpoint if not inplace else adapters.copied(checkpoint)
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
