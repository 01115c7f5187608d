"""Q-Drift: does a longer step make up for the error that quantization adds to every step?

Q-Drift (arXiv:2603.18095) reports lower FID of seven quantized text-to-image models, from statistics of a few paired
runs, at no cost. Two parts:

- ``gaussian``: scalar Gaussian data with the exact prediction and added error, where the variance that a sampler ends
  with is known without drawing samples, for both modes. The seeds draw the paired runs.
- ``tiny-dit``: diffusion transformers on digits at W3A4, three samplers, both modes and four strengths. The seeds draw
  the paired runs and the noise that samples start from.

What is finished is kept in ``runs/claims``; a run that was stopped goes on from there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import postlude as pl
from _claim import Claim, spread
from _drift import (
    DIT_STEPS,
    RUNS,
    SAMPLERS,
    drawn,
    drift,
    lengthened,
    numbers_of,
    table_of,
    wrapped,
)
from postlude.numerics.diffusion import conditional_variance, fit_errors
from postlude.quantization.loraq import LoRaQ
from postlude.quantization.rtn import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.q_drift import QDrift, correct
from postlude.zoo.digits import digits
from postlude.zoo.gaussian_data import Bed, FlowBed, NoiseBed, SolverBed

PARTS = ("gaussian", "tiny-dit")
STEPS = 20
S2 = 0.5
VARIANCES = (0.05, 0.2, 0.5)
CORRELATIONS = (-0.5, 0.0, 0.5, 0.9)
NUMBERS = 64


# ---------------------------------------------------------------- Gaussian data


def toys() -> dict[str, tuple[Bed, Callable[[], Any]]]:
    """Samplers on data whose truth is known."""
    import diffusers

    def solver(order: int) -> Callable[[], Any]:
        return lambda: diffusers.DPMSolverMultistepScheduler(
            solver_order=order, final_sigmas_type="sigma_min"
        )

    return {
        "Euler": (NoiseBed(STEPS, S2), diffusers.EulerDiscreteScheduler),
        "DPM-Solver++ 1": (SolverBed(STEPS, S2), solver(1)),
        "DPM-Solver++ 2": (SolverBed(STEPS, S2), solver(2)),
        "flow Euler": (
            FlowBed(S2),
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ),
    }


def corrected(bed: Bed, make: Callable[[], Any], variance: Tensor | float, mode: str) -> Any:
    """A scheduler that is told the variance of the error."""
    base = make()
    bed.place(base)
    return correct(make(), DriftStatistics.of_variance(base, variance), QDrift(mode=mode))


def estimated(predictions: Tensor, injected: float, seed: int) -> Tensor:
    """``V [n, 1]`` as fitted to paired runs on the exact trajectory, of which the predictions have these variances."""
    source = torch.Generator().manual_seed(seed)
    found = []
    for variance in predictions:
        exact, error = (
            torch.randn(1, RUNS * NUMBERS, generator=source, dtype=torch.float64) for _ in range(2)
        )
        error = injected**0.5 * error
        fit = fit_errors(float(variance) ** 0.5 * exact + error, error)
        found.append(conditional_variance(fit.covariance))
    return torch.stack(found)


def gaussian(claim: Claim) -> None:
    """Output variance of every sampler, without and with error, without and with the correction."""
    rows = []
    for name, (bed, make) in toys().items():
        ideal, predictions = bed.output_variance(make()), bed.prediction_variance(make())
        for injected in VARIANCES:
            known = {
                mode: bed.output_variance(corrected(bed, make, injected, mode), injected)
                for mode in ("paper", "corrected")
            }
            fitted = [
                bed.output_variance(
                    corrected(bed, make, estimated(predictions, injected, seed), "corrected"),
                    injected,
                )
                for seed in claim.seeds
            ]
            rows.append(
                [
                    f"{name}, V = {injected}",
                    f"{ideal:.4f}",
                    f"{bed.output_variance(make(), injected):.4f}",
                    *(f"{known[mode]:.4f}" for mode in ("paper", "corrected")),
                    spread(fitted),
                ]
            )
    claim.table(
        f"Output variance, data of variance {S2}, {STEPS} steps (flow: 28)",
        ["", "no error", "error", "paper", "corrected", f"corrected, {RUNS} runs"],
        rows,
    )
    rows = []
    for name, (bed, make) in toys().items():
        ideal = bed.output_variance(make())
        for correlation in CORRELATIONS:
            plain = bed.output_variance(make(), 0.2, correlation) - ideal
            left = [
                bed.output_variance(corrected(bed, make, 0.2, mode), 0.2, correlation) - ideal
                for mode in ("paper", "corrected")
            ]
            rows.append(
                [
                    f"{name}, correlation {correlation}",
                    f"{plain:+.4f}",
                    *(f"{one:+.4f}" for one in left),
                ]
            )
    claim.table(
        "Output variance minus that without error, V = 0.2, errors of neighbouring steps correlated",
        ["", "error", "paper", "corrected"],
        rows,
    )


# ---------------------------------------------------------------- tiny-dit

QUANTIZERS = {
    "rtn": RTN(weights=3, activations=4, group=32),
    "loraq": LoRaQ(weights=3, activations=4, group=32, rank=8, branch="w8a8"),
}
SCALES = (0.5, 1.0, 2.0)


def variants(sampler: str, quantizer: str) -> dict[str, QDrift]:
    """What is compared with the plain sampler. The two modes of Euler are one."""
    modes = ("corrected",) if sampler == "euler" else ("corrected", "paper")
    if quantizer != "rtn":
        return {f"{mode}, 1": QDrift(mode=mode) for mode in modes}
    found = {
        f"{mode}, {scale:g}": QDrift(mode=mode, qdrift_scale=scale)
        for mode in modes
        for scale in SCALES
    }
    found["corrected, 1, not the last step"] = QDrift(skip_last=True)
    found["corrected, 1, bias 1"] = QDrift(bias_scale=1.0)
    return found


def measure(
    claim: Claim,
    kept: RunDirectory,
    models: Mapping[str, Checkpoint],
    sampler: str,
    seed: int,
    count: int,
) -> dict[str, dict[str, float]]:
    """Numbers of one sampler and seed, by variant."""
    source = SAMPLERS[sampler]
    labels = torch.arange(count) % 10
    shared = {"sampler": sampler, "seed": seed}
    name = f"{sampler.replace('+', 'p')}-{seed}"
    floats = claim.measured(kept, f"{name}-float", lambda: drawn(models[source], count, **shared))
    exact = floats["images"]
    numbers = {"float": numbers_of(exact, labels)}
    for quantizer in QUANTIZERS:
        model = models[f"{source} {quantizer}"]
        known = drift(claim, kept, f"{name}-{quantizer}-drift", model, models[source], **shared)
        for variant, settings in {"plain": None, **variants(sampler, quantizer)}.items():
            wrap = None if settings is None else wrapped(known, settings)
            key = f"{name}-{quantizer}-{''.join(c if c.isalnum() else '-' for c in variant)}"
            found = claim.measured(
                kept,
                key,
                lambda model=model, wrap=wrap: drawn(model, count, wrap=wrap, **shared),  # type: ignore[misc]
            )
            row = numbers_of(found["images"], labels, exact)
            if settings == QDrift():
                for place, c in enumerate(lengthened(model, sampler, known)[:, 0].tolist()):
                    row[f"c{place}"] = c
            numbers[f"{quantizer}: {variant}"] = row
    return numbers


def tiny_dit(claim: Claim) -> None:
    """Frechet distances, accuracy and PSNR of quantized transformers, by sampler and correction."""
    count = 60 if claim.quick else 300
    models: dict[str, Checkpoint] = {}
    for source in dict.fromkeys(SAMPLERS.values()):
        models[source] = pl.load(source)
        for name, settings in QUANTIZERS.items():
            models[f"{source} {name}"] = pl.quantize(pl.load(source), settings)
    kept = claim.directory(
        {
            "models": {name: model.fingerprint() for name, model in models.items()},
            "count": count,
            "steps": DIT_STEPS,
        }
    )
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in SAMPLERS}
    jobs = [(seed, sampler) for seed in claim.seeds for sampler in SAMPLERS]
    with claim.progress as progress:
        for seed, sampler in progress.iterate(jobs, "samplers"):
            found[sampler].append(measure(claim, kept, models, sampler, seed, count))
    images, _ = digits()
    claim.say(
        f"Variance of the real digits, summed over pixels: {float(images.flatten(1).var(0).sum()):.2f}."
    )
    for sampler, runs in found.items():
        table_of(claim, sampler, runs, count, "float")
    places = (0, DIT_STEPS // 2, DIT_STEPS - 3, DIT_STEPS - 2, DIT_STEPS - 1)
    claim.table(
        "How much longer each step becomes (rtn, corrected, 1; mean over seeds)",
        ["", "first", "middle", "third to last", "second to last", "last"],
        [
            [
                sampler,
                *(f"{statistics.fmean(one[_RTN][f'c{at}'] for one in runs):.2g}" for at in places),
            ]
            for sampler, runs in found.items()
        ],
    )


_RTN = "rtn: corrected, 1"


if __name__ == "__main__":
    measured = Claim("q_drift", __doc__ or "", PARTS)
    torch.set_num_threads(1)
    {"gaussian": gaussian, "tiny-dit": tiny_dit}[measured.part](measured)
    measured.finish()
