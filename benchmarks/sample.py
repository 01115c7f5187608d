"""What the drift correction adds to a step of sampling, as a share of that step.

    python benchmarks/sample.py                # tiny-dit, and one block of DiT-B; a minute or two
    python benchmarks/sample.py --threads 2

A sampling step is a forward pass and a step of the scheduler. All schedulers take the same step in turns, right after
a forward pass, and the difference of the lower quartiles is set against forward pass and plain step. Times are of the
processor, so that what else the machine does is not in them. Setting the timesteps, once for all steps of a run, is
spread over its steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import Tensor

from postlude.sampling.drift import DriftStatistics
from postlude.sampling.q_drift import QDrift, correct
from postlude.zoo.tiny_dit import build

STEPS = 20
SAMPLERS: dict[str, Callable[[], Any]] = {
    "Euler": diffusers.EulerDiscreteScheduler,
    "flow Euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "DPM-Solver++ 2": diffusers.DPMSolverMultistepScheduler,
}
SETTINGS = {
    "pooled": (QDrift(), 1),
    "each channel": (QDrift(), 0),
    "pooled, bias too": (QDrift(bias_scale=1.0), 1),
}


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def known(make: Callable[[], Any], channels: int) -> DriftStatistics:
    """Some statistics."""
    base = make()
    base.set_timesteps(STEPS)
    found = DriftStatistics.of_variance(base, 0.1, channels=channels)
    return replace(found, mean=found.mean + 0.01)


def measure(
    model: Any, x: Tensor, schedulers: list[Any], limit: float
) -> tuple[float, list[float]]:
    """Lower quartiles of the forward pass and of a step of each scheduler, in seconds."""
    labels = torch.arange(len(x)) % 10
    forward: list[float] = []
    steps: list[list[float]] = [[] for _ in schedulers]
    places: list[list[float]] = [[] for _ in schedulers]
    u = torch.randn_like(x)
    started = time.perf_counter()
    rounds = 0
    while rounds < 3 or (time.perf_counter() - started < limit and rounds < 60):
        order = schedulers if rounds % 2 == 0 else schedulers[::-1]
        for scheduler in order:
            at = schedulers.index(scheduler)
            places[at].append(seconds(lambda scheduler=scheduler: scheduler.set_timesteps(STEPS)))  # type: ignore[misc]
        for timestep in schedulers[0].timesteps:
            forward.append(
                seconds(
                    lambda timestep=timestep: model(  # type: ignore[misc]
                        x, timestep=timestep.expand(len(x)), class_labels=labels
                    )
                )
            )
            for scheduler in order:
                scale = getattr(scheduler, "scale_model_input", None)
                if scale is not None:
                    scale(x, timestep)
                steps[schedulers.index(scheduler)].append(
                    seconds(
                        lambda scheduler=scheduler, timestep=timestep: scheduler.step(  # type: ignore[misc]
                            u, timestep, x, return_dict=False
                        )
                    )
                )
        rounds += 1
    taken = [low(step) + low(place) / STEPS for step, place in zip(steps, places, strict=True)]
    return low(forward), taken


def low(values: list[float]) -> float:
    """The lower quartile."""
    return statistics.quantiles(values, n=4)[0]


def main() -> None:
    """Print one table a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="of every measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    torch.manual_seed(0)
    models = {
        "tiny-dit, 16 images of 1 x 8 x 8": (build(), torch.randn(16, 1, 8, 8)),
        "tiny-dit, 128 images of 1 x 8 x 8": (build(), torch.randn(128, 1, 8, 8)),
        "one block of 12 of DiT-B, 1 latent of 4 x 32 x 32": (
            build(width=768, heads=12, layers=1, image_size=32, channels=4),
            torch.randn(1, 4, 32, 32),
        ),
    }
    print(
        f"{args.threads} thread(s), PyTorch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    for name, (model, x) in models.items():
        print(f"\n**{name}**\n")
        print(
            "| sampler | forward, ms | plain step, us | "
            + " | ".join(f"{one}, us" for one in SETTINGS),
            end="",
        )
        print(" | " + " | ".join(f"{one}, %" for one in SETTINGS) + " |")
        print("| --- |" + " ---: |" * (2 + 2 * len(SETTINGS)))
        for sampler, make in SAMPLERS.items():
            schedulers = [make()]
            for settings, channels in SETTINGS.values():
                schedulers.append(correct(make(), known(make, channels or x.shape[1]), settings))
            with torch.inference_mode():
                forward, (plain, *others) = measure(model, x, schedulers, args.seconds)
            added = [other - plain for other in others]
            cells = [
                f"{1e3 * forward:.2f}",
                f"{1e6 * plain:.0f}",
                *(f"{1e6 * one:+.0f}" for one in added),
            ]
            cells += [f"{100 * one / (forward + plain):+.2f}" for one in added]
            print(f"| {sampler} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
