"""Make a smaller checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import postlude
from postlude import registry
from postlude._front_door.calibration import Calibrating, Data
from postlude._front_door.opening import Path_, open_checkpoint
from postlude._front_door.text import CALIBRATION_SAMPLES
from postlude.errors import InputError, OutputExistsError, SettingsError
from postlude.quantization.engine import Quantizer, Unit, check_kind, compute_unit
from postlude.quantization.engine import quantize as _quantize
from postlude.runs.atomic import check_replaceable, discard
from postlude.runs.checkpoint import MARKERS, Checkpoint
from postlude.runs.directory import RunDirectory, run_beside
from postlude.runs.processes import Processes
from postlude.runs.progress import Progress

__all__ = ["quantize"]


def quantize(
    checkpoint: Path_ | Checkpoint,
    method: str | Quantizer,
    *,
    calibration: Data | None = None,
    samples: int = CALIBRATION_SAMPLES,
    length: int | None = None,
    timesteps: str = "uniform",
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
        calibration: for methods that learn from data. Of a language model, text: a path, or documents. Of a vision
            model, a folder of images. Of a denoiser, nothing: it samples its own inputs; or a .safetensors file of
            inputs. Of either of these, also a list of batches (keyword arguments of the model's forward).
        samples, length: calibration sequences (images, inputs), and tokens of each (512, or the context if shorter).
        timesteps: how the inputs that a denoiser samples spread over them: ``uniform``, or ``skewed`` to the small
            ones (PTQ4DM).
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
        check_replaceable(Path(os.path.realpath(out)), overwrite, MARKERS)
    opened = open_checkpoint(checkpoint)
    if out is not None and opened.path is not None and opened.path == Path(os.path.realpath(out)):
        raise OutputExistsError(
            f"{out} is the model itself, which would be lost: choose another output."
        )
    check_kind(settings, opened)
    source = None
    if settings.needs_calibration:
        source = Calibrating(opened, calibration, samples, length, timesteps, seed)
    directory = run_beside(out) if run is None and out is not None else run
    with Processes() as all_processes:
        unit: Unit = compute_unit
        # Without a directory ranks have nowhere to find each other's work: each does it all.
        processes = Processes() if directory is None else all_processes
        if directory is not None:
            manifest = _manifest(opened, settings, source, seed)
            elsewhere = "output (-o)" if run is None else "run directory (--run)"
            open_run = functools.partial(RunDirectory, directory, manifest, elsewhere=elsewhere)
            kept = processes.first(lambda: open_run(overwrite=overwrite), open_run)
            unit = kept.unit
            if progress is not None and kept.finished():
                progress.log(f"resuming: {len(kept.finished())} finished steps in {kept.path}")
        work = opened if inplace or opened is not checkpoint else _copy(opened)
        try:
            data = None if source is None else source.read(processes.once(unit), progress)
            small = _quantize(
                work, settings, data, seed=seed, progress=progress, unit=unit, processes=processes
            )
        except InputError:
            # The same call would fail again, and another one is another run.
            if out is not None and run is None and all_processes.is_first:
                discard(run_beside(out), out)
            raise

        def save(place: Path_) -> None:
            small.save(place, overwrite=overwrite, check=check)
            if run is None:
                discard(run_beside(place), place)

        if out is not None:
            # The first is done before the others have read its last units, which saving takes away.
            all_processes.wait()
            all_processes.first(lambda: save(out), lambda: None)
            small.path = Path(os.path.realpath(out))
    return small


def _manifest(
    checkpoint: Checkpoint, settings: Quantizer, source: Calibrating | None, seed: int
) -> dict[str, Any]:
    """Everything that decides the result."""
    return {
        "postlude": postlude.__version__,
        "verb": "quantize",
        "method": registry.info_of(settings).name,
        "settings": dataclasses.asdict(settings),
        "model": checkpoint.fingerprint(),
        "device": checkpoint.model.device.type,
        "calibration": None if source is None else source.manifest(),
        "seed": seed,
    }


def _copy(checkpoint: Checkpoint) -> Checkpoint:
    return dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model))
