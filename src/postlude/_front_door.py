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

from torch import Tensor

import postlude
from postlude import _judging, registry
from postlude.attribution.examples import Collection
from postlude.errors import DataError, InputError, OutputExistsError, SettingsError
from postlude.evaluation.lds import Retraining
from postlude.evaluation.perplexity import evaluate as _evaluate
from postlude.exporting.engine import Exporter
from postlude.exporting.engine import export as _export
from postlude.inspection.signature import compare as _compare
from postlude.inspection.update import Comparison, Update
from postlude.quantization.engine import Quantizer
from postlude.quantization.engine import quantize as _quantize
from postlude.runs.atomic import check_replaceable, discard
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.runs.documents import calibration_windows, read_documents
from postlude.runs.generation import Generation
from postlude.runs.generation import generate as _generate
from postlude.runs.loading import load
from postlude.runs.progress import Progress
from postlude.surgery.kernels import AUTO, assignments

__all__ = [
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
]

# Sequence length where the caller does not say; a model with a shorter context gets its context.
_INSPECT_LENGTH, _INSPECT_SAMPLES = 256, 32
_CALIBRATION_LENGTH, _CALIBRATION_SAMPLES = 512, 128

Path_ = str | os.PathLike[str]
Text = Path_ | Sequence[str]


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
    progress: Progress | None = None,
) -> Comparison:
    """Tell how checkpoints are related, and what was changed from the first to each of the others.

    Args:
        checkpoints: two or more, loaded or paths; the first is the base of the updates.
        text: what to run through the models for their signatures (arXiv:2502.07004); the help texts of Python
            otherwise.
        layers: blocks whose singular values are computed, the costly part of an update; all when None.
        seed: of the choice of text.
        progress: where to show it.

    Raises:
        SettingsError: fewer than two checkpoints, models of different hidden size, or blocks that there are not.
    """
    opened = [_open(one) for one in checkpoints]
    tokens = [_inspection_tokens(one, text, _INSPECT_SAMPLES, None, seed) for one in opened]
    signatures = _compare(opened, tokens, seed)
    names = list(signatures.reports)
    update = Update(layers=None if layers is None else tuple(layers))
    return Comparison(
        signatures,
        tuple(
            update.compare(opened[0], other, (names[0], name), progress)
            for name, other in zip(names[1:], opened[1:], strict=True)
        ),
    )


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
        kept = RunDirectory(directory, manifest, overwrite=overwrite)
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
        ``bytes_per_example`` of its index, ``build_cpu_seconds``, ``query_cpu_seconds`` (all queries), ``control``.
        Beside it ``query_loss_before``, ``query_loss`` of the explained model, ``query_loss_of_halves``, and with two
        seeds ``seed_correlation``, the rank correlation of the losses of one seed with those of another.

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
        facts what :func:`postlude.evaluation.retrieval.planted_sources` returns (``planted_...``), and the costs as in
        :func:`evaluate_lds`.
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
