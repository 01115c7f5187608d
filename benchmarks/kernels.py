"""One linear layer on every kernel, as ratios of the time of bf16 ``F.linear`` in the same run.

    python benchmarks/kernels.py                     # 2048 x 2048, one thread, about a minute
    python benchmarks/kernels.py --size 1024 --rows 1 64

Weights are cycled so that every call reads its own from memory, as decoding does. Every kernel takes turns with
the baseline, and the ratio of their lower quartiles is printed: what else the machine does falls on both, and
mostly beyond the quartile. Several threads on a shared machine measure the machine, so one is the default.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery import kernels
from postlude.surgery.layers import QuantizedLinear

# Bytes of the weights that are cycled through: more than any cache holds.
_CYCLE = 192 * 2**20


def scheme(bits: int, granularity: str | int, free: bool = False) -> Scheme:
    """Integers of so many bits."""
    form = Integer(bits, symmetric=not free, range="free" if free else "zero")
    return Scheme(form, Granularity.parse(granularity))


LAYERS: dict[str, tuple[Scheme, Scheme | None]] = {
    "W4 128, A16": (scheme(4, 128), None),
    "W4 channel, A16": (scheme(4, "channel"), None),
    "W8 channel, A16": (scheme(8, "channel"), None),
    "W8 channel, A8 token": (scheme(8, "channel"), scheme(8, "token")),
    "W4 channel, A8 token": (scheme(4, "channel"), scheme(8, "token")),
    "W4 channel, A4 free token": (scheme(4, "channel"), scheme(4, "token", free=True)),
    "W4 128, A4 128": (scheme(4, 128), scheme(4, 128)),
}


def make(size: int, weight: Scheme, input: Scheme | None) -> QuantizedLinear:
    """A layer with random codes."""
    layer = QuantizedLinear(
        size, size, bias=False, weight=weight, input=input, dtype=torch.bfloat16
    )
    layer.codes.random_(0, 256)
    layer.scale.uniform_(0.01, 0.02)
    return layer


def seconds(call: Callable[[], Tensor]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ratio(
    layers: list[torch.nn.Sequential], baseline: list[Tensor], x: Tensor, limit: float
) -> tuple[float, float]:
    """``baseline / layer`` of their lower quartiles, and that of the layer in milliseconds."""
    base: list[float] = []
    taken: list[float] = []
    started = time.perf_counter()
    turn = 0
    while turn < 9 or (time.perf_counter() - started < limit and turn < 400):
        layer, weight = layers[turn % len(layers)], baseline[turn % len(baseline)]
        first = seconds(lambda weight=weight: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
        second = seconds(lambda layer=layer: layer(x))  # type: ignore[misc]
        turn += 1
        if turn > 1:
            base.append(first)
            taken.append(second)
    low, own = (statistics.quantiles(values, n=4)[0] for values in (base, taken))
    return low / own, own * 1e3


def main() -> None:
    """Print one table a layer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="of every measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    torch.manual_seed(0)
    copies = max(2, _CYCLE // (args.size**2 * 2))
    baseline = [torch.randn(args.size, args.size).bfloat16() for _ in range(copies)]
    print(
        f"{args.size} x {args.size}, {args.threads} thread(s), PyTorch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}; times faster than bf16 F.linear (ms)\n"
    )
    for name, (weight, input) in LAYERS.items():
        print(f"{name:27s}" + "".join(f"{rows:>18d} rows" for rows in args.rows))
        for kernel in [*kernels.KERNELS, kernels.AUTO]:
            layers = []
            for _ in range(copies if kernel != "simulate" else 2):
                layer = torch.nn.Sequential(make(args.size, weight, input))
                layer.register_parameter("kind", torch.nn.Parameter(baseline[0][:1, :1]))
                layers.append(layer.requires_grad_(False))
            if kernel not in (kernels.AUTO, "simulate") and all(
                kernel in one.refused for one in kernels.assignments(layers[0])
            ):
                continue
            for one in layers:
                found = kernels.use(one, kernel)
            cells = ""
            with torch.inference_mode():
                for rows in args.rows:
                    x = torch.randn(rows, args.size, dtype=torch.bfloat16)
                    times, milliseconds = ratio(layers, baseline, x, args.seconds)
                    cells += f"{times:13.2f} x ({milliseconds:6.2f})"
            chosen = f" = {found[0].decode} / {found[0].prefill}" if kernel == "auto" else ""
            print(f"  {kernel + chosen:25s}{cells}", flush=True)
        print()


if __name__ == "__main__":
    main()
