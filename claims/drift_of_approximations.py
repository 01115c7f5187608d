"""Q-Drift around any approximate denoiser: does the correction made for quantization help pruned or cached ones?

Q-Drift (arXiv:2603.18095) corrects the sampler of a quantized model by statistics of its error. Nothing in the rule
asks where an error comes from. Here the same models of digits are approximated in ways that have nothing to do with
rounding, and the sampler is corrected by what ``postlude sample calibrate`` measures:

- ``cached``: the blocks run at every second or third timestep (feature reuse, ``--reuse``);
- ``low rank``: every linear of the blocks replaced by the closest matrix of a fraction of its rank;
- ``pruned``: of every linear of the blocks the smallest weights are zero;
- ``bfloat16``: weights and arithmetic in half the bits.

W3A4 by rounding to nearest stands beside them. The seeds draw the paired runs and the noise that samples start from.
What is finished is kept in ``runs/claims``; a run that was stopped goes on from there.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import postlude as pl
from _claim import Claim, share, spread
from _drift import DIT_STEPS, SAMPLERS, drawn, drift, lengthened, numbers_of, table_of, wrapped
from postlude.numerics.factorize import truncated_svd
from postlude.quantization.rtn import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.sampling.q_drift import QDrift

BATCH = 16


@dataclasses.dataclass(frozen=True)
class Approximation:
    """A cheaper denoiser.

    Attributes:
        change: makes it of a model, in place.
        reuse: its blocks run at every so many timesteps.
    """

    change: Callable[[Checkpoint], Checkpoint] = lambda one: one
    reuse: int = 1


@torch.no_grad()
def of_linears(change: Callable[[Tensor], Tensor]) -> Callable[[Checkpoint], Checkpoint]:
    """A function of every weight of the blocks."""

    def run(checkpoint: Checkpoint) -> Checkpoint:
        for path in checkpoint.anatomy.linears():
            weight = checkpoint.model.get_submodule(path).weight
            weight.data.copy_(change(weight.data))
        return checkpoint

    return run


def low_rank(fraction: float) -> Callable[[Tensor], Tensor]:
    """The closest matrix of that fraction of the rank."""

    def run(weight: Tensor) -> Tensor:
        u, s, vh = truncated_svd(weight.double(), max(1, round(fraction * min(weight.shape))))
        return (u * s) @ vh

    return run


def pruned(fraction: float) -> Callable[[Tensor], Tensor]:
    """That fraction of the weights, the smallest, is zero."""

    def run(weight: Tensor) -> Tensor:
        limit = weight.abs().flatten().kthvalue(round(fraction * weight.numel())).values
        return weight * (weight.abs() > limit)

    return run


def halved(checkpoint: Checkpoint) -> Checkpoint:
    """In bfloat16."""
    checkpoint.model.to(torch.bfloat16)
    return checkpoint


APPROXIMATIONS = {
    "W3A4, rtn": Approximation(
        lambda one: pl.quantize(one, RTN(weights=3, activations=4, group=32))
    ),
    "cached, every 2nd": Approximation(reuse=2),
    "cached, every 3rd": Approximation(reuse=3),
    "low rank, a half": Approximation(of_linears(low_rank(0.5))),
    "low rank, a quarter": Approximation(of_linears(low_rank(0.25))),
    "pruned by 50 %": Approximation(of_linears(pruned(0.5))),
    "bfloat16": Approximation(halved),
}


def variants(sampler: str) -> dict[str, QDrift]:
    """What is compared with the plain sampler. The two modes of Euler are one."""
    found = {"corrected": QDrift(), "corrected, bias 1": QDrift(bias_scale=1.0)}
    return found if sampler == "euler" else {**found, "paper": QDrift(mode="paper")}


def measure(
    claim: Claim,
    kept: RunDirectory,
    models: Mapping[str, Checkpoint],
    sampler: str,
    seed: int,
    count: int,
) -> dict[str, dict[str, float]]:
    """Numbers of one sampler and seed, by approximation and variant."""
    source = SAMPLERS[sampler]
    labels = torch.arange(count) % 10
    shared: dict[str, Any] = {"sampler": sampler, "seed": seed}
    first = f"{sampler.replace('+', 'p')}-{seed}"
    exact = claim.measured(kept, f"{first}-float", lambda: drawn(models[source], count, **shared))
    numbers = {"float": numbers_of(exact["images"], labels)}
    for name, approximation in APPROXIMATIONS.items():
        model, reuse = models[f"{source} {name}"], {"reuse": approximation.reuse}
        key = f"{first}-{''.join(c if c.isalnum() else '-' for c in name)}"
        known = drift(
            claim, kept, f"{key}-drift", model, models[source], batch=BATCH, **shared, **reuse
        )
        for variant, settings in {"plain": None, **variants(sampler)}.items():
            wrap = None if settings is None else wrapped(known, settings)

            def draw(
                model: Checkpoint = model, wrap: Any = wrap, reuse: Any = reuse
            ) -> dict[str, Tensor]:
                return drawn(model, count, wrap=wrap, **shared, **reuse)

            unit = f"{key}-{variant.replace(', ', '-').replace(' ', '-')}"
            found = claim.measured(kept, unit, draw)
            numbers[f"{name}: {variant}"] = numbers_of(found["images"], labels, exact["images"])
        q, both, e = (known.covariance[:, i, j].mean(-1) for i, j in ((0, 0), (0, 1), (1, 1)))
        unseen = known.variance().mean(-1)
        numbers[f"{name}: plain"] |= {
            "share": float((e / (q - 2 * both + e)).mean()),
            "unseen": float((unseen / e.clamp_min(1e-30)).mean()),
            "longest": float(lengthened(model, sampler, known).max()),
        }
    return numbers


def main() -> None:
    """Frechet distances, accuracy and PSNR of every approximation, by sampler and correction."""
    claim = Claim("drift_of_approximations", __doc__ or "", seeds=3)
    torch.set_num_threads(1)
    count = 60 if claim.quick else 300
    models: dict[str, Checkpoint] = {}
    for source in dict.fromkeys(SAMPLERS.values()):
        models[source] = pl.load(source)
        for name, approximation in APPROXIMATIONS.items():
            models[f"{source} {name}"] = approximation.change(pl.load(source))
    kept = claim.directory(
        {
            "models": {name: model.fingerprint() for name, model in models.items()},
            "reuse": {name: one.reuse for name, one in APPROXIMATIONS.items()},
            "count": count,
            "steps": DIT_STEPS,
        }
    )
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in SAMPLERS}
    jobs = [(seed, sampler) for seed in claim.seeds for sampler in SAMPLERS]
    with claim.progress as progress:
        for seed, sampler in progress.iterate(jobs, "samplers"):
            found[sampler].append(measure(claim, kept, models, sampler, seed, count))
    for sampler, runs in found.items():
        table_of(claim, sampler, runs, count, "exact")
    claim.table(
        "What is corrected, mean over steps",
        ["", "error's share of the output's variance", "not told by the output", "longest step"],
        [
            [
                f"{sampler}, {name}",
                *(
                    f"{statistics.fmean(run[f'{name}: plain'][key] for run in runs):.2g}"
                    for key in ("share", "unseen", "longest")
                ),
            ]
            for sampler, runs in found.items()
            for name in APPROXIMATIONS
        ],
    )
    rows = []
    for name in APPROXIMATIONS:
        for variant in ("corrected", "corrected, bias 1"):
            cells = []
            for runs in found.values():
                for metric in ("frechet", "frechet_pixels"):
                    before, after = (
                        [run[f"{name}: {one}"][metric] for run in runs]
                        for one in ("plain", variant)
                    )
                    pairs = list(zip(before, after, strict=True))
                    cells.append(
                        f"{spread([b / a for a, b in pairs])} ({share([b < a for a, b in pairs])})"
                    )
            rows.append([f"{name}: {variant}", *cells])
    claim.table(
        "Frechet distance of the corrected sampler over the plain one, and seeds in which it is lower",
        ["", *(f"{one}{where}" for one in found for where in ("", ", pixels"))],
        rows,
    )
    claim.finish()


if __name__ == "__main__":
    main()
