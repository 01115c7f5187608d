"""Measure the error of an approximate diffusion model, for a sampler that corrects it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.errors import SettingsError
from postlude.runs.atomic import check_replaceable_file
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.sampling.calibrate import calibrate
from postlude.sampling.q_drift import correct
from postlude.sampling.samplers import build_scheduler

__all__ = ["sample_calibrate"]

_NOTHING = 1e-3


def sample_calibrate(
    checkpoint: Path_ | Checkpoint,
    reference: Path_ | Checkpoint,
    *,
    runs: int = 5,
    batch: int = 16,
    sampler: str | None = "dpm++",
    steps: int = 20,
    labels: Sequence[int] | Tensor | None = None,
    guidance: float = 1.0,
    conditions: Mapping[str, Tensor] | None = None,
    reuse: int = 1,
    channelwise: bool = False,
    seed: int = 0,
    out: Path_ | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Collect the statistics that ``sample(..., drift=...)`` corrects a sampler with (Q-Drift, arXiv:2603.18095).

    Args:
        checkpoint: the approximate model, loaded or a diffusers directory: quantized, pruned, of another width or type,
            or with ``reuse`` the exact one itself.
        reference: the exact model.
        runs, batch, sampler, steps, labels, guidance, conditions, reuse, channelwise, seed: see
            :func:`postlude.sampling.calibrate.calibrate`.
        out: a .safetensors file to write.
        overwrite: replace it.
        progress: where to show it.

    Returns:
        ``statistics`` (:class:`postlude.sampling.drift.DriftStatistics`), ``scheduler`` (its class), ``sampler``,
        ``steps``, ``runs``, ``samples``, ``guidance``, ``reuse``, ``error_variance`` (of each step, mean over
        channels), ``output_variance`` (of the reference's output, the same), ``coefficients`` (how much longer each
        step becomes), ``largest_coefficient``, ``output``, ``seconds``, and ``notes`` where the correction will do
        next to nothing.

    Raises:
        OutputExistsError: a file that may not be replaced.
        CheckpointError, SettingsError, UnknownNameError: see :func:`postlude.sampling.calibrate.calibrate`.
    """
    if out is not None and Path(out).suffix.lower() != ".safetensors":
        raise SettingsError(
            f"the output is {out}; expected a file that ends in .safetensors: it holds statistics, not images"
        )
    if out is not None:
        check_replaceable_file(Path(out), overwrite)
    model, exact = open_checkpoint(checkpoint), open_checkpoint(reference)
    started = time.perf_counter()
    statistics = calibrate(
        model,
        exact,
        runs=runs,
        batch=batch,
        sampler=sampler,
        steps=steps,
        labels=labels,
        guidance=guidance,
        conditions=conditions,
        reuse=reuse,
        channelwise=channelwise,
        seed=seed,
        progress=progress,
    )
    corrected = correct(build_scheduler(model.scheduler, sampler), statistics)
    corrected.set_timesteps(steps)
    coefficients = corrected.coefficients().mean(-1)
    largest = float(coefficients.max())
    # The reference's output is q - e: what the covariances of output and error say of its variance.
    q, both, e = (statistics.covariance[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    result = {
        "statistics": statistics,
        "scheduler": statistics.scheduler,
        "sampler": sampler,
        "steps": steps,
        "runs": runs,
        "samples": statistics.samples,
        "guidance": guidance,
        "reuse": reuse,
        "error_variance": statistics.variance().mean(-1).tolist(),
        "output_variance": (q - 2 * both + e).mean(-1).tolist(),
        "coefficients": coefficients.tolist(),
        "largest_coefficient": largest,
        "output": None if out is None else statistics.save(out, overwrite=overwrite),
        "seconds": time.perf_counter() - started,
    }
    if largest < _NOTHING:
        result["notes"] = [
            f"no step becomes longer by more than {100 * largest:.2g} %: the error is so small that correcting the "
            "sampler changes next to nothing"
        ]
    return result
