"""Fitting a picture: seconds per 1,000 steps and peak memory of every network, as ratios to SIREN in the same run.

    python benchmarks/signals.py                     # 66 thousand numbers, 16,384 pixels a step, about two minutes
    python benchmarks/signals.py --width 256 --batch 65536

Networks have as many real numbers as SMN of the given width. Every network is fitted in a process of its own, one
thread; times are CPU seconds of that process, of the steps alone. Memory is the growth of the largest resident
set over what the process had before the fit, beside what ``postlude fit`` predicts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from postlude.signals.memory import predicted_memory
from postlude.signals.picture import Picture, fit
from postlude.signals.training import Training
from postlude.zoo.smn.networks import NETWORKS, build, settings_for, width_for

BASELINE = "siren"


def _resident() -> int:
    """Bytes that are resident now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(name: str, width: int, side: int, batch: int, steps: int) -> dict[str, float]:
    """Fit one network in this process."""
    torch.set_num_threads(1)
    budget = settings_for("smn", {"width": width}).numbers
    settings = settings_for(name, {"width": width_for(name, budget)})
    pixels = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(0))
    picture = Picture(pixels.to(torch.uint8))
    network = build(settings, 0)
    # The first steps load libraries.
    fit(build(settings_for(name, {"width": 4}), 0), picture, Training(2, 1e-4, 16))
    before = _resident()
    started = time.process_time()
    fit(network, picture, Training(steps, 1e-4, batch))
    taken = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "width": settings.width,
        "numbers": settings.numbers,
        "gflop": 3 * settings.flops(batch) / 1e9,
        "seconds": 1000 * taken / steps,
        "peak": peak,
        "predicted": predicted_memory(settings, side, side, batch),
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=128, help="of SMN")
    parser.add_argument("--side", type=int, default=256, help="pixels of a side of the picture")
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--turns", type=int, default=3, help="of every network; the median is shown"
    )
    parser.add_argument("--one", choices=NETWORKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.width, args.side, args.batch, args.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NETWORKS}
    for _ in range(args.turns):
        for name in NETWORKS:
            command = [sys.executable, *sys.argv, "--one", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found[name].append(json.loads(done.stdout))
    print(
        f"{args.side} x {args.side} pixels, {args.batch} a step, one thread, {args.turns} turns of {args.steps} steps, "
        f"PyTorch {torch.__version__}\n"
    )
    columns = ["network", "width", "numbers", "CPU s per 1,000 steps", f"x {BASELINE}"]
    columns += ["peak MiB", f"x {BASELINE}", "predicted MiB"]
    print("| " + " | ".join(columns) + " |\n| --- |" + " ---: |" * (len(columns) - 1))
    seconds, peak = (
        {name: statistics.median(one[key] for one in rows) for name, rows in found.items()}
        for key in ("seconds", "peak")
    )
    for name, rows in found.items():
        one = rows[0]
        cells = [
            f"{one['width']:.0f}",
            f"{one['numbers']:,.0f}",
            f"{seconds[name]:.0f}",
            f"{seconds[name] / seconds[BASELINE]:.2f}",
            f"{peak[name] / 2**20:.0f}",
            f"{peak[name] / peak[BASELINE]:.2f}",
            f"{one['predicted'] / 2**20:.0f}",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
