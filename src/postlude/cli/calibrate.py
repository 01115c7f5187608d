"""``postlude sample calibrate``: how an approximate model errs, for a sampler that makes up for it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, refuse_existing

__all__ = ["calibrate"]


def calibrate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="The approximate model: a diffusers directory, of a quantized or pruned model for example.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="The exact model, which with --reuse may be the same.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.safetensors",
            help="The statistics, for `postlude sample --drift`.",
            show_default=False,
        ),
    ],
    runs: Annotated[int, typer.Option("--runs", metavar="N", help="Paired runs.")] = 5,
    batch: Annotated[
        int,
        typer.Option("--batch", metavar="N", help="Images of a run; 1 is enough for large images."),
    ] = 16,
    sampler: Annotated[
        str,
        typer.Option(
            "--sampler",
            metavar="NAME",
            help="As it will be sampled with: euler, fm-euler, dpm++ or dpm++1.",
        ),
    ] = "dpm++",
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of the sampler.")] = 20,
    guidance: Annotated[
        float, typer.Option("--guidance", metavar="W", help="Classifier-free guidance; 1 is none.")
    ] = 1.0,
    reuse: options.Reuse = 1,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="3,7,...",
            help="Classes, repeated until there are enough; all in turn otherwise.",
        ),
    ] = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            "--conditions",
            metavar="FILE",
            help="Tensors that a model without classes is conditioned on, one row an image of all runs: .safetensors.",
        ),
    ] = None,
    channelwise: Annotated[
        bool,
        typer.Option("--channelwise", help="A statistic for each channel, instead of one for all."),
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> Result:
    """Run the sampler with the reference, ask both models at every step, and write how the outputs differ.

    The statistics hold for this model, this sampler, this number of steps and this guidance.
    """
    from postlude import _front_door
    from postlude.cli.sample import read_numbers, read_tensors
    from postlude.runs.progress import Progress

    refuse_existing(output, overwrite=overwrite)
    model, exact = (
        _front_door.load(one, dtype=dtype, device=device) for one in (checkpoint, reference)
    )
    with Progress(show=True) as progress:
        result = _front_door.sample_calibrate(
            model,
            exact,
            runs=runs,
            batch=batch,
            sampler=sampler,
            steps=steps,
            labels=read_numbers(labels),
            guidance=guidance,
            reuse=reuse,
            conditions=read_tensors(conditions),
            channelwise=channelwise,
            seed=seed,
            out=output,
            overwrite=overwrite,
            progress=progress,
        )
    shown = {key: value for key, value in result.items() if key != "statistics"}
    return Result(shown, None if json else _view(shown, checkpoint))


def _view(result: dict[str, Any], checkpoint: str) -> object:
    """What was measured, how much it changes, and the next command."""
    from rich.console import Group
    from rich.text import Text

    longer = result["coefficients"]
    pairs = zip(result["error_variance"], result["output_variance"], strict=True)
    shares = [100 * error / whole for error, whole in pairs]
    lines = [
        f"{result['runs']} paired runs, {result['samples']} images, {result['steps']} steps of {result['scheduler']}",
        f"variance of the error: {min(result['error_variance']):.2g} to {max(result['error_variance']):.2g} "
        f"({min(shares):.2g} % to {max(shares):.2g} % of the output's)",
        f"steps become longer by {100 * min(longer):.2g} to {100 * max(longer):.2g} %, the last one by "
        f"{100 * longer[-1]:.2g} %",
        f"{result['output']} written in {result['seconds']:.3g} s",
    ]
    words = [f"postlude sample {checkpoint}"]
    if result["sampler"] is not None:
        words.append(f"--sampler {result['sampler']}")
    words.append(f"--steps {result['steps']}")
    if result["guidance"] != 1.0:
        words.append(f"--guidance {result['guidance']:g}")
    if result["reuse"] != 1:
        words.append(f"--reuse {result['reuse']}")
    words.append(f"--drift {result['output']} -o grid.png")
    notes = [Text(f"note: {one}", style="bold") for one in result.get("notes", [])]
    return Group(*map(Text, lines), *notes, "", Text(" ".join(words), no_wrap=True))
