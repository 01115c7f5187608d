"""Seconds and peak memory of quantizing a random DiT of the shape of DiT-B/2, in ratios to what has to be paid anyway.

    python benchmarks/diffusion.py --threads 1

Two references in the same run: one forward pass of the float model over the calibration inputs, and one dense SVD in
fp64 of every weight that is rounded (Q, K and V as one matrix, as svdquant takes them). ``rtn`` is the floor: reading
and packing. Every job is a process of its own on the same files. Time starts when model and inputs are in memory and
stops when the model is quantized, before anything is saved; memory is the largest resident size of the process, and in
brackets what that is above the process with the model just loaded.

Blocks are alike and independent, so the times of ``--layers`` blocks scale to those of twelve; the memory does not
depend on them beyond the model itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Heads, head size, blocks, latent size.
SIZES = {"dit-b": (12, 64, 12, 32), "tiny": (2, 16, 2, 8)}


def make(directory: Path, size: str, layers: int | None, samples: int) -> None:
    """A random checkpoint and random inputs, the same for every job."""
    import torch
    from diffusers import DiTTransformer2DModel
    from safetensors.torch import save_file

    from postlude.surgery.anatomy import anatomy_of

    heads, head, blocks, latent = SIZES[size]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head,
        num_layers=layers or blocks,
        sample_size=latent,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    # Heavy tails, as trained weights have them: some columns are larger than others.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(torch.exp(0.5 * torch.randn(parameter.shape[1])))
    model.save_pretrained(directory / "model")
    save_file(anatomy_of(model).example(samples), directory / "inputs.safetensors")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"random DiT, {count / 1e6:.0f} M parameters, {layers or blocks} blocks, {samples} inputs",
        file=sys.stderr,
    )


def resident() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forward(checkpoint: Any, batches: list[Any]) -> None:
    """The float model over all inputs, once."""
    import torch

    with torch.inference_mode():
        for batch in batches:
            checkpoint.model(**batch)


def dense_svd(checkpoint: Any, batches: list[Any]) -> None:
    """One SVD in fp64 of the weights of every site, stacked."""
    import torch

    for _, site in checkpoint.anatomy.sites():
        stack = torch.cat([reader.weight(checkpoint.model) for reader in site.readers])
        torch.linalg.svd(stack.double(), full_matrices=False)


def by(method: str) -> Callable[[Any, list[Any]], None]:
    """A job that quantizes to W4A4 with the method's own defaults."""

    def quantized(checkpoint: Any, batches: list[Any]) -> None:
        from postlude import registry
        from postlude.quantization.engine import quantize

        info = registry.find("quantize", method)
        settings = info.settings(weights=4, activations=4)
        quantize(checkpoint, settings, batches if settings.needs_calibration else None)

    return quantized


JOBS = {
    "forward pass": forward,
    "dense svd": dense_svd,
    "rtn": by("rtn"),
    "gptq": by("gptq"),
    "loraq": by("loraq"),
    "svdquant": by("svdquant"),
}


def job(name: str, directory: Path) -> dict[str, float]:
    """Seconds of one job, and resident sizes before and after."""
    from safetensors.torch import load_file

    from postlude.runs.loading import load
    from postlude.surgery.batches import in_batches

    checkpoint = load(directory / "model", device="cpu")
    batches = in_batches(load_file(directory / "inputs.safetensors"), 8)
    before, started = resident(), time.perf_counter()
    cpu = time.process_time()
    JOBS[name](checkpoint, batches)
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "before": before,
        "peak": resident(),
    }


def run(name: str, directory: Path, threads: int) -> dict[str, float]:
    """One job in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--job",
        name,
        "--directory",
        str(directory),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{name}: {result['seconds']:.1f} s ({result['cpu']:.1f} of the CPU), "
        f"{result['peak'] / 2**20:.0f} MiB",
        file=sys.stderr,
        flush=True,
    )
    return result


def main() -> None:
    """Run every job in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="dit-b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the model has")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS))
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(options.job, options.directory)))
        return

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make(directory, options.size, options.layers, options.samples)
        results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
        for _ in range(options.repeat):
            for name in results:
                results[name].append(run(name, directory, options.threads))

    def median(name: str, key: str) -> float:
        return statistics.median(one[key] for one in results[name])

    references = [name for name in ("forward pass", "dense svd") if name in results]
    columns = "".join(f" x {name} |" for name in references)
    print(f"{options.size}, {options.samples} inputs, {options.threads} threads; CPU seconds")
    print(f"| job | CPU s |{columns} peak MiB (above the loaded model) |")
    print(f"| --- | ---: |{' ---: |' * len(references)} ---: |")
    for name in results:
        ratios = "".join(
            f" {median(name, 'cpu') / median(reference, 'cpu'):.2f} |" for reference in references
        )
        peak = median(name, "peak")
        above = (peak - median(name, "before")) / 2**20
        print(f"| {name} | {median(name, 'cpu'):.1f} |{ratios} {peak / 2**20:.0f} ({above:.0f}) |")


if __name__ == "__main__":
    main()
