"""Small diffusion transformers, approximated, sampled as they are and with Q-Drift's correction, and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from _claim import Claim, spread
from postlude.evaluation.samples import judge_samples
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.sampling.calibrate import calibrate
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.q_drift import QDrift, correct
from postlude.sampling.sample import sample
from postlude.sampling.samplers import build_scheduler

__all__ = [
    "DIT_STEPS",
    "RUNS",
    "SAMPLERS",
    "Numbers",
    "drawn",
    "drift",
    "lengthened",
    "numbers_of",
    "table_of",
    "wrapped",
]

SAMPLERS = {"euler": "zoo:tiny-dit", "dpm++": "zoo:tiny-dit", "fm-euler": "zoo:tiny-dit-flow"}
DIT_STEPS = 16
# Paired runs that statistics are fitted to.
RUNS = 5
_METRICS = ("frechet", "frechet_pixels", "class_accuracy", "psnr_db")

# By variant, what was measured with one sampler and seed.
Numbers = Mapping[str, Mapping[str, float]]


def drawn(model: Checkpoint, count: int, **settings: Any) -> dict[str, Tensor]:
    """Samples, to be judged when all are there."""
    return {
        "images": sample(model, count=count, steps=DIT_STEPS, batch_size=300, **settings).images
    }


def drift(
    claim: Claim,
    kept: RunDirectory,
    unit: str,
    approximate: Checkpoint,
    exact: Checkpoint,
    *,
    sampler: str,
    **settings: Any,
) -> DriftStatistics:
    """How an approximation errs, from paired runs that are kept as a unit of work."""

    def fit() -> dict[str, Tensor]:
        found = calibrate(
            approximate, exact, runs=RUNS, steps=DIT_STEPS, sampler=sampler, **settings
        )
        return {"mean": found.mean, "covariance": found.covariance}

    fitted = claim.measured(kept, unit, fit)
    base = build_scheduler(approximate.scheduler, sampler)
    base.set_timesteps(DIT_STEPS)
    return replace(DriftStatistics.of_variance(base, 0.0), **fitted)


def wrapped(known: DriftStatistics, settings: QDrift) -> Callable[[Any], Any]:
    """What makes a scheduler a corrected one."""
    return lambda scheduler: correct(scheduler, known, settings)


def lengthened(model: Checkpoint, sampler: str, known: DriftStatistics) -> Tensor:
    """By how much the correction lengthens each step, ``[n, C]``."""
    scheduler = correct(build_scheduler(model.scheduler, sampler), known)
    scheduler.set_timesteps(DIT_STEPS)
    found: Tensor = scheduler.coefficients()
    return found


def numbers_of(images: Tensor, labels: Tensor, reference: Tensor | None = None) -> dict[str, float]:
    """The metrics of some samples, and their variance summed over pixels."""
    found = judge_samples(images, labels, reference=reference)
    numbers = {name: float(found[name]) for name in _METRICS if found[name] is not None}
    return {**numbers, "variance": float(images.flatten(1).var(0).sum())}


def table_of(
    claim: Claim, sampler: str, runs: Sequence[Numbers], count: int, reference: str
) -> None:
    """Print a line a variant, of one sampler; ``reference`` is what its samples are compared with."""
    claim.table(
        f"{sampler}, {DIT_STEPS} steps, {count} samples",
        ["", "Frechet distance", "change", "in pixels", "change", "variance", "right class",
         f"PSNR to the {reference} samples (dB)"],
        [_row(variant, runs) for variant in runs[0]],
    )  # fmt: skip


def _row(variant: str, runs: Sequence[Numbers]) -> list[str]:
    """Means and spreads over seeds, and the paired change to the plain sampler."""
    cells = [variant]
    plain = f"{variant.partition(':')[0]}: plain"
    for metric in ("frechet", "frechet_pixels"):
        cells.append(spread([run[variant][metric] for run in runs]))
        if variant in ("float", plain):
            cells.append("")
            continue
        deltas = [run[variant][metric] - run[plain][metric] for run in runs]
        shown = spread(deltas, 2)
        cells.append(shown if shown.startswith("-") else f"+{shown}")
    cells.append(spread([run[variant]["variance"] for run in runs]))
    cells.append(spread([100 * run[variant]["class_accuracy"] for run in runs]) + " %")
    distances = [run[variant].get("psnr_db", float("nan")) for run in runs]
    cells.append("" if distances[0] != distances[0] else spread(distances))
    return cells
