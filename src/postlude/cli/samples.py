"""``postlude evaluate samples``: how good a diffusion model's images are."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, number_table, refuse_existing, write_json

__all__ = ["samples"]


def samples(
    checkpoint: options.Diffusion,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="The float model; it draws from the same noise.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", metavar="N", help="Samples of each model.")
    ] = 1500,
    sampler: options.Sampler = None,
    steps: options.SamplerSteps = None,
    guidance: options.Guidance = 1.0,
    reuse: options.Reuse = 1,
    drift: options.Drift = None,
    drift_mode: options.DriftMode = None,
    drift_bias: options.DriftBias = 0.0,
    real: Annotated[
        str | None,
        typer.Option(
            "--real",
            metavar="FILE",
            help="Real images in [-1, 1] to compare with: a .safetensors with `images` [n, c, h, w]. Of digits "
            "they are built in.",
        ),
    ] = None,
    output: options.NewFile = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> Result:
    """Frechet distance to real images, share of samples of the right class, and PSNR to the reference's samples."""
    refuse_existing(output, overwrite=overwrite)

    from postlude import _front_door
    from postlude.cli.sample import read_tensors
    from postlude.runs.progress import Progress

    tensors = read_tensors(real, needs="images")
    with Progress(show=True) as progress:
        result = _front_door.evaluate_samples(
            _front_door.load(checkpoint, dtype=dtype, device=device),
            reference=None
            if reference is None
            else _front_door.load(reference, dtype=dtype, device=device),
            count=count,
            sampler=sampler,
            steps=steps,
            seed=seed,
            guidance=guidance,
            reuse=reuse,
            drift=drift,
            drift_mode=drift_mode,
            drift_bias=drift_bias,
            real=None if tensors is None else tensors["images"],
            progress=progress,
        )
    write_json(result, output, overwrite=overwrite)
    return Result(result, _view(result))


_ROWS = (
    ("Frechet distance, features", "frechet", "_floor", "{:.4f}"),
    ("Frechet distance, pixels", "frechet_pixels", "_floor", "{:.4f}"),
    ("right class", "class_accuracy", "_real", "{:.1%}"),
)


def _view(result: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.text import Text

    rows: list[tuple[str, ...]] = []
    for title, key, real, shape in _ROWS:
        numbers = (result[key + end] for end in ("", "_reference", real))
        rows.append((title, *("-" if one is None else shape.format(one) for one in numbers)))
    if result["psnr_db"] is not None:
        cells = (
            ("equal", "")
            if math.isinf(result["psnr_db"])
            else (f"{result['psnr_db']:.2f} dB", f"(worst image {result['psnr_db_lowest']:.1f} dB)")
        )
        rows.append(("PSNR to the reference", *cells, ""))
    by_class = result["class_accuracy_by_class"] or {}
    sampler = result["sampler"]
    if result.get("sampler_reference") not in (None, sampler):
        sampler = f"{sampler} (the reference {result['sampler_reference']})"
    lines = [
        f"{result['count']} samples, {sampler}, {result['steps']} steps, seed {result['seed']}"
        + (f", corrected by {result['drift']}" if result["drift"] else "")
        + f"; {result['seconds']:.3g} s"
    ]
    if result["frechet_floor"] is not None:
        lines.append(
            "real: what as many real images would get; the classifier on real digits it was not trained on"
        )
    if by_class:
        lines.append("right by class: " + "  ".join(f"{k}: {v:.0%}" for k, v in by_class.items()))
    notes = [Text(f"note: {one}", style="bold") for one in result["notes"]]
    table = number_table(("", "model", "reference", "real"), rows)
    return Group(table, "", *map(Text, lines), *notes)
