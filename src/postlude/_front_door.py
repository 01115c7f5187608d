"""The verbs. Each loads what it is given, calls one noun, and hands the result back."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import postlude
from postlude import _judging, registry
from postlude.attribution import plan as _plan
from postlude.attribution.build import build as _build
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection, Records
from postlude.attribution.forecast import forecast
from postlude.attribution.index import Index
from postlude.attribution.query import Answer, method_of, model_of
from postlude.attribution.query import query as _query
from postlude.errors import (
    DataError,
    InputError,
    OutputExistsError,
    SettingsError,
    UnknownNameError,
)
from postlude.evaluation.lds import Retraining
from postlude.evaluation.perplexity import evaluate as _evaluate
from postlude.exporting.engine import Exporter
from postlude.exporting.engine import export as _export
from postlude.inspection.signature import compare as _compare
from postlude.inspection.update import Comparison, Update
from postlude.quantization.engine import Quantizer
from postlude.quantization.engine import quantize as _quantize
from postlude.runs.atomic import atomic_write, check_replaceable, discard
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.runs.documents import calibration_windows, read_documents
from postlude.runs.generation import Generation
from postlude.runs.generation import generate as _generate
from postlude.runs.loading import dtype_of
from postlude.runs.loading import load as _load
from postlude.runs.progress import Progress
from postlude.surgery.kernels import AUTO, assignments
from postlude.tuning.adapters import Adapter, is_adapter, load_adapter
from postlude.tuning.examples import read_examples
from postlude.tuning.prior import compute_prior
from postlude.tuning.run import Tuned, TuneRun
from postlude.tuning.run import tune as _tune
from postlude.tuning.supervised import Goal, length_of, objective_of

__all__ = [
    "attribute",
    "attribution_plan",
    "attribution_query",
    "attribution_verify",
    "calibration_tokens",
    "compare",
    "demo",
    "evaluate",
    "evaluate_lds",
    "evaluate_retrieval",
    "export",
    "generate",
    "inspect",
    "kernels",
    "load",
    "quantize",
    "tune",
    "tune_prior",
]

# Sequence length where the caller does not say; a model with a shorter context gets its context.
_INSPECT_LENGTH, _INSPECT_SAMPLES = 256, 32
_CALIBRATION_LENGTH, _CALIBRATION_SAMPLES = 512, 128

Path_ = str | os.PathLike[str]
Text = Path_ | Sequence[str]
Examples = Path_ | Sequence[Mapping[str, Any] | str]


def load(
    path: Path_,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Load a language model from a Hugging Face directory; never from the network.

    Args:
        path: the directory, or ``zoo:NAME`` for a model that comes with Postlude. An adapter of peft is merged into the
            model that its configuration names, in fp32 where ``dtype`` is ``"auto"``.
        dtype: ``"auto"`` for the checkpoint's own, or float64, float32, float16, bfloat16.
        device: where to put the model; None for the accelerator if there is one (under torchrun that of the rank),
            else the CPU.

    Raises:
        CheckpointError: not a checkpoint, a damaged one, or one in a refused format.
        NonFiniteError: a tensor holds NaN or infinity.
        ArchitectureError: no anatomy describes the model.
        SettingsError: an unknown dtype or device.
    """
    rank = os.environ.get("LOCAL_RANK")
    if device is None and rank is not None and torch.cuda.is_available():
        device = f"cuda:{rank}"
    if is_adapter(path):
        return load_adapter(path, dtype, device)
    return _load(path, dtype, device)


def _open(checkpoint: Path_ | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint)


def _documents(text: Text) -> list[str]:
    if isinstance(text, str | os.PathLike):
        return read_documents(text)
    return list(text)


def built_in_text() -> list[str]:
    """The English help texts that every Python carries (PSF licence)."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def calibration_tokens(
    checkpoint: Checkpoint,
    text: Text,
    samples: int = _CALIBRATION_SAMPLES,
    length: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Random crops of a text, ``[samples, length]``; every second one starts as the tokenizer starts a text.

    Raises:
        DataError: no text, too little of it, or a checkpoint without tokenizer.
        SettingsError: a length beyond the model's context.
    """
    if checkpoint.tokenizer is None:
        raise DataError(
            f"{checkpoint.path or 'this checkpoint'} has no tokenizer, so text cannot be read with it; "
            "put its tokenizer files beside the weights"
        )
    chosen = min(_CALIBRATION_LENGTH, checkpoint.context) if length is None else length
    return calibration_windows(
        checkpoint.tokenizer, _documents(text), samples, chosen, seed, checkpoint.context
    )


def inspect(
    checkpoint: Path_ | Checkpoint,
    methods: Sequence[str | object] | None = None,
    *,
    text: Text | None = None,
    samples: int = _INSPECT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look inside a checkpoint.

    Args:
        checkpoint: loaded, or a path.
        methods: names or settings objects; every inspection when None.
        text: what to run through the model; the help texts of Python otherwise.
        samples, length: sequences and tokens of each (256, or the context if shorter).
        seed: of every random choice.
        progress: where to show it.

    Returns:
        One report per method, by name.
    """
    chosen: list[Any] = [
        registry.find("inspect", one).settings() if isinstance(one, str) else one
        for one in (
            [info.name for info in registry.available("inspect")] if methods is None else methods
        )
    ]
    opened = _open(checkpoint)
    tokens = _inspection_tokens(opened, text, samples, length, seed)
    return {
        registry.info_of(settings).name: settings.inspect(opened, tokens, seed, progress)
        for settings in chosen
    }


def _inspection_tokens(
    checkpoint: Checkpoint, text: Text | None, samples: int, length: int | None, seed: int
) -> Tensor:
    chosen = min(_INSPECT_LENGTH, checkpoint.context) if length is None else length
    return calibration_tokens(
        checkpoint, built_in_text() if text is None else text, samples, chosen, seed
    )


def compare(
    checkpoints: Sequence[Path_ | Checkpoint],
    *,
    text: Text | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    html: Path_ | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Tell how checkpoints are related, and what was changed from the first to each of the others.

    Args:
        checkpoints: two or more, loaded or paths; the first is the base of the updates.
        text: what to run through the models for their signatures (arXiv:2502.07004); the help texts of Python
            otherwise.
        layers: blocks whose singular values are computed, the costly part of an update; all when None.
        seed: of the choice of text.
        html: file to write a page with plots to.
        command: that makes the page again, to be printed on it.
        progress: where to show it.

    Raises:
        SettingsError: fewer than two checkpoints, models of different hidden size, or blocks that there are not.
    """
    opened = [_open(one) for one in checkpoints]
    tokens = [_inspection_tokens(one, text, _INSPECT_SAMPLES, None, seed) for one in opened]
    signatures = _compare(opened, tokens, seed)
    names = list(signatures.reports)
    update = Update(layers=None if layers is None else tuple(layers))
    result = Comparison(
        signatures,
        tuple(
            update.compare(opened[0], other, (names[0], name), progress)
            for name, other in zip(names[1:], opened[1:], strict=True)
        ),
    )
    if html is not None:
        from postlude.report.comparison import render

        Path(html).resolve().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as temporary:
            temporary.write_text(render(result.to_dict(), command), encoding="utf-8")
    return result


def kernels(checkpoint: Path_ | Checkpoint, kernel: str = AUTO) -> dict[str, Any]:
    """Tell which kernel computes each quantized layer when it runs packed, and why others do not.

    Args:
        checkpoint: loaded, or a path.
        kernel: ``"auto"``, or the one kernel to ask for.

    Returns:
        ``dtype`` of the activations, ``device``, how many layers are ``simulated`` because no kernel takes
        them, and ``layers``: one :class:`postlude.surgery.kernels.Assignment` each.

    Raises:
        UnknownNameError: no kernel of that name.
    """
    model = _open(checkpoint).model
    layers = assignments(model, kernel)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "simulated": sum(one.simulated for one in layers),
        "layers": layers,
    }


def quantize(
    checkpoint: Path_ | Checkpoint,
    method: str | Quantizer,
    *,
    calibration: Text | None = None,
    samples: int = _CALIBRATION_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    out: Path_ | None = None,
    overwrite: bool = False,
    run: Path_ | None = None,
    inplace: bool = False,
    check: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Make a smaller checkpoint.

    Args:
        checkpoint: loaded, or a path.
        method: a settings object such as ``OffQ(weights=4)``, or a name for its defaults.
        calibration: text for methods that learn from some: a path, or documents.
        samples, length: calibration sequences, and tokens of each (512, or the context if shorter).
        seed: of every random choice.
        out: where to save the result. Finished blocks are kept beside it (``.NAME.run``) until it is saved: the
            same call after a kill resumes from them and ends with the same bits.
        overwrite: replace ``out``, and start a run of something else afresh.
        run: keep finished blocks in this directory instead, also afterwards.
        inplace: rewrite the given model rather than a copy of it.
        check: read what is saved again in a fresh process, see :meth:`Checkpoint.save`.
        progress: where to show it.

    Returns:
        The quantized checkpoint; ``save`` writes it where ``out`` was not given.

    Raises:
        SettingsError: settings that the method, or this model, cannot do.
        DataError: no calibration text, or too little.
        OutputExistsError: ``out`` exists.
        RunDirectoryError: the run directory belongs to another model, method or text.
    """
    settings = registry.find("quantize", method).settings() if isinstance(method, str) else method
    if not isinstance(settings, Quantizer):
        raise SettingsError(
            f"quantize takes the name or the settings of a quantize method, got {type(method).__name__}"
        )
    if out is not None:
        check_replaceable(Path(os.path.realpath(out)), overwrite, "config.json")
    opened = _open(checkpoint)
    if out is not None and opened.path is not None and opened.path == Path(os.path.realpath(out)):
        raise OutputExistsError(
            f"{out} is the model itself, which would be lost: choose another output."
        )
    tokens = None
    if settings.needs_calibration and calibration is not None:
        tokens = calibration_tokens(opened, calibration, samples, length, seed)
    unit: dict[str, Callable[[str, Callable[[], Mapping[str, Tensor]]], dict[str, Tensor]]] = {}
    directory = _run_beside(out) if run is None and out is not None else run
    if directory is not None:
        manifest = _manifest(opened, settings, tokens, seed)
        elsewhere = "output (-o)" if run is None else "run directory (--run)"
        kept = RunDirectory(directory, manifest, overwrite=overwrite, elsewhere=elsewhere)
        unit["unit"] = kept.unit
        if progress is not None and kept.finished():
            progress.log(f"resuming: {len(kept.finished())} finished steps in {kept.path}")
    work = opened if inplace or opened is not checkpoint else _copy(opened)
    try:
        small = _quantize(work, settings, tokens, seed=seed, progress=progress, **unit)
    except InputError:
        # The same call would fail again, and another one is another run.
        if out is not None and run is None:
            discard(_run_beside(out), out)
        raise
    if out is not None:
        small.save(out, overwrite=overwrite, check=check)
        if run is None:
            discard(_run_beside(out), out)
    return small


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
    opened = _open(checkpoint)
    return _tune(
        opened,
        data,
        objective,
        TuneRun() if run is None else run,
        adapter=Adapter(adapter) if isinstance(adapter, str) else adapter,
        merge=merge,
        reference=None if reference is None else _open(reference),
        dtype=chosen if isinstance(chosen, torch.dtype) else None,
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
    opened = _open(reference)
    length = length_of(max_length, opened.context)
    examples = read_examples(data, opened.tokenizer, length, progress)
    return compute_prior(
        opened,
        examples,
        out,
        max_length=length,
        dtype=chosen if isinstance(chosen, torch.dtype) else None,
        overwrite=overwrite,
        progress=progress,
    )


def _run_beside(out: Path_) -> Path:
    final = Path(os.path.realpath(out))
    return final.with_name(f".{final.name}.run")


def _manifest(
    checkpoint: Checkpoint, settings: Quantizer, tokens: Tensor | None, seed: int
) -> dict[str, Any]:
    """Everything that decides the result."""
    return {
        "postlude": postlude.__version__,
        "verb": "quantize",
        "method": registry.info_of(settings).name,
        "settings": dataclasses.asdict(settings),
        "model": checkpoint.fingerprint(),
        "device": checkpoint.model.device.type,
        "calibration": None
        if tokens is None
        else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "seed": seed,
    }


def _copy(checkpoint: Checkpoint) -> Checkpoint:
    return dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model))


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
        data: a ``.jsonl`` file with ``text``, or ``prompt`` and ``completion``, a line; or such records; or texts.
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
        StoreError: ``out`` holds something else, or the disk is full.
    """
    settings = _attributor(method)
    chosen = collection or Collection()
    opened = _open(checkpoint)
    if progress is not None and progress.shown and opened.tokenizer is not None:
        expected = forecast(opened, Records(data), settings, chosen, _plan.this_machine())
        if expected is not None:
            progress.log(str(expected))
    index, report = _build(
        opened, data, settings, out, collection=chosen, overwrite=overwrite, progress=progress
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
        checkpoint, data: the model and the examples, where they are no longer where they were.
        top, layers, tokens: see :func:`postlude.attribution.query.query`.
        html: file to write the page to, with layers and tokens.
        keep: keep the fitted curvature in the index for later queries.
        command: that makes the page again, to be printed on it.
        progress: where to show it.
    """
    opened = index if isinstance(index, Index) else Index(index)
    settings = method_of(opened) if method is None else _attributor(method)
    if changes:
        settings = dataclasses.replace(settings, **changes)
    settings.check(opened)
    model = model_of(opened) if checkpoint is None else _open(checkpoint)
    answers = _query(
        opened,
        source,
        top=top,
        layers=layers or html is not None,
        tokens=tokens or html is not None,
        method=settings,
        checkpoint=model,
        data=data,
        keep=keep,
        progress=progress,
    )
    if html is not None:
        from postlude.report.attribution import page_of

        page = page_of(opened, answers, settings, command)
        Path(html).resolve().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as temporary:
            temporary.write_text(page, encoding="utf-8")
    return answers


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
    elif not os.path.isfile(given):
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


def attribution_plan(
    *,
    checkpoint: Path_ | Checkpoint | None = None,
    parameters: float | None = None,
    hardware: str = "this",
    devices: int = 1,
    examples: float,
    sweep: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """What an index will cost: bytes, operations, bytes read and time.

    Args:
        checkpoint: the model; or
        parameters: how many it has.
        hardware: ``this`` machine, measured, or a name in ``postlude.attribution.plan.HARDWARE``.
        devices: how many of them.
        examples: of the training set.
        sweep: add a table over factors, ranks and formats.
        settings: of :func:`postlude.attribution.plan.plan`.

    Raises:
        SettingsError: neither or both of checkpoint and parameters, or a number out of range.
        UnknownNameError: hardware or format that is not known.
    """
    if (checkpoint is None) == (parameters is None):
        raise SettingsError(
            "a plan is for a checkpoint or for a number of parameters: give one of them"
        )
    shape = (
        _plan.shape_of(_open(checkpoint))
        if checkpoint is not None
        else _plan.assumed_shape(float(parameters or 0))
    )
    if hardware != "this" and hardware not in _plan.HARDWARE:
        raise UnknownNameError("hardware", hardware, ["this", *_plan.HARDWARE])
    machine = _plan.this_machine() if hardware == "this" else _plan.HARDWARE[hardware]
    machine = machine.times(devices)
    count = int(examples)
    chosen = _plan.plan(shape, machine, examples=count, **settings)
    result = {
        "model": shape.description,
        "parameters": shape.parameters,
        "layers": shape.count,
        "examples": count,
        "hardware": dataclasses.asdict(machine),
        **dataclasses.asdict(chosen),
    }
    if sweep:
        fixed = {k: v for k, v in settings.items() if k not in ("factor", "rank", "format", "side")}
        rows = _plan.table(shape, machine, examples=count, **fixed)
        result["table"] = [
            {
                "factor": one.factor,
                "rank": one.rank,
                "format": one.format,
                "index_bytes": one.bytes["index"],
                "ratio": one.bytes["ratio"],
                "curvature_bytes": one.bytes["curvature"],
                "build_seconds": one.seconds["build"],
                "score_seconds": one.seconds["score"],
            }
            for one in rows
        ]
    return result


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
    base = None if reference is None else _open(reference)
    started = time.perf_counter()
    result = _evaluate(
        _open(checkpoint), text, reference=base, max_length=max_length, progress=progress
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
        _open(checkpoint),
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
        _open(checkpoint),
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


def export(
    checkpoint: Path_ | Checkpoint,
    to: str | Exporter,
    out: Path_,
    *,
    overwrite: bool = False,
    check: bool = True,
) -> dict[str, Any]:
    """Write a checkpoint in another engine's format, and read it again before saying so.

    Args:
        checkpoint: loaded, or a path; float or quantized.
        to: a settings object such as ``GGUF()``, or a name for its defaults.
        out: a directory, or a file where the format is one.
        overwrite: replace an output that is already there.
        check: compare logits with those that a fresh process computes from the output.

    Returns:
        See :func:`postlude.exporting.engine.export`.

    Raises:
        SettingsError: the format cannot hold this checkpoint; says why, and what to do instead.
        OutputExistsError: ``out`` exists.
        VerificationError: the output is another model; nothing is left of it.
    """
    settings = registry.find("export", to).settings() if isinstance(to, str) else to
    if not isinstance(settings, Exporter):
        raise SettingsError(
            f"export takes the name or the settings of a format, got {type(to).__name__}"
        )
    return _export(_open(checkpoint), settings, out, overwrite=overwrite, check=check)


def generate(
    checkpoint: Path_ | Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    kernel: str = AUTO,
    kv_recent: int = 0,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt; quantized layers run packed, and keys and values are kept packed.

    Args:
        checkpoint: loaded, or a path; float or quantized.
        prompt: the text to continue.
        max_new_tokens: where to stop if the model does not end the text.
        temperature: 0 takes the most probable token; 1 samples from the model's distribution.
        kernel: what computes quantized layers: ``"auto"``, ``"simulate"`` (the reference) or one by name.
        kv_recent: tokens at the end of a quantized cache that stay in floating point.
        seed: of sampling.
        stream: called with every new piece of text.

    Returns:
        The text, and what it took: see :class:`postlude.runs.generation.Generation`.

    Raises:
        DataError: no tokenizer, or a prompt that gives no tokens.
        SettingsError: a number out of range, or more tokens than the model's context holds.
        UnknownNameError: no kernel of that name.
    """
    return _generate(
        _open(checkpoint),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        kernel=kernel,
        kv_recent=kv_recent,
        seed=seed,
        stream=stream,
    )


def demo(
    out: Path_,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Inspect the built-in model, quantize it by five methods, measure each and write a report.

    Returns:
        See :func:`postlude.report.demo.demo`.

    Raises:
        OutputExistsError: ``out`` exists.
    """
    from postlude.report.demo import Verbs
    from postlude.report.demo import demo as _demo

    verbs = Verbs(load, inspect, quantize, evaluate)
    return _demo(verbs, out, seed=seed, overwrite=overwrite, progress=progress)
