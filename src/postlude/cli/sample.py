"""``postlude sample``: images from a diffusion model, as a picture and as tensors."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._group import PLAIN, PlainCommand, PlainFormGroup
from postlude.cli._output import Result
from postlude.cli.calibrate import calibrate

__all__ = ["app", "read_numbers", "read_tensors", "sample"]

app = typer.Typer(
    cls=PlainFormGroup, help="Draw images from a diffusion model, float or quantized."
)
_SHOWN = 5

app.command("calibrate")(calibrate)


@app.command(
    PLAIN,
    cls=PlainCommand,
    hidden=True,
    epilog="Related: `postlude sample calibrate CHECKPOINT --reference CHECKPOINT -o FILE` measures how a quantized "
    "model errs, for --drift.",
)
def sample(
    checkpoint: options.Diffusion,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A .png with the tensors beside it as .safetensors, or a .safetensors alone. Needed unless --compare "
            "is given, which prints how the two differ.",
        ),
    ] = None,
    sampler: options.Sampler = None,
    steps: options.SamplerSteps = None,
    count: Annotated[int, typer.Option("--count", "-n", metavar="N", help="How many images.")] = 64,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="3,7,...",
            help="Classes, repeated until there are enough; all in turn otherwise.",
        ),
    ] = None,
    guidance: options.Guidance = 1.0,
    reuse: options.Reuse = 1,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="CHECKPOINT", help="A second model, drawn from the same noise."
        ),
    ] = None,
    drift: options.Drift = None,
    drift_mode: options.DriftMode = None,
    drift_bias: options.DriftBias = 0.0,
    conditions: Annotated[
        str | None,
        typer.Option(
            "--conditions",
            metavar="FILE",
            help="Tensors that a model without classes is conditioned on (encoder_hidden_states, ...), one row an "
            "image or one for all: .safetensors.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="N", help="Images at a time; they are the same for any."
        ),
    ] = 250,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> Result:
    """Draw images; the same seed gives the same images, and every model the same noise."""
    from postlude import _front_door
    from postlude.errors import SettingsError
    from postlude.runs.progress import Progress

    if output is None and compare is None:
        raise SettingsError(
            "there is no output, and nothing would be left of the images: give a file for them "
            "(-o grid.png, or -o images.safetensors)"
        )
    with Progress(show=True) as progress:
        result = _front_door.sample(
            _front_door.load(checkpoint, dtype=dtype, device=device),
            count=count,
            sampler=sampler,
            steps=steps,
            labels=read_numbers(labels),
            seed=seed,
            guidance=guidance,
            reuse=reuse,
            conditions=read_tensors(conditions),
            compare=None
            if compare is None
            else _front_door.load(compare, dtype=dtype, device=device),
            drift=drift,
            drift_mode=drift_mode,
            drift_bias=drift_bias,
            batch_size=batch_size,
            out=output,
            overwrite=overwrite,
            progress=progress,
        )
    shown = {key: value for key, value in result.items() if key not in ("samples", "compared")}
    return Result(shown)


def read_numbers(words: str | None) -> list[int] | None:
    """Classes as written after ``--labels``."""
    from postlude.errors import SettingsError

    if words is None:
        return None
    try:
        return [int(word) for word in words.split(",")]
    except ValueError as error:
        raise SettingsError(
            f"--labels is {words!r}; expected classes with commas between, as in 3,7"
        ) from error


def read_tensors(file: str | None, needs: str | None = None) -> dict[str, Any] | None:
    """The tensors of a .safetensors file; ``needs`` one of this name.

    Raises:
        DataError: no such file, not one of tensors, or one without the tensor.
    """
    if file is None:
        return None
    from pathlib import Path

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from postlude.errors import DataError

    if not Path(file).is_file():
        raise DataError(f"There is no file {file}; expected tensors in a .safetensors file")
    try:
        found: dict[str, Any] = load_file(file)
    except SafetensorError as error:
        raise DataError(f"{file} is no .safetensors file: {error}") from error
    if needs is not None and needs not in found:
        names = list(found)[:_SHOWN]
        if len(found) > _SHOWN:
            names.append(f"... ({len(found)} tensors)")
        raise DataError(
            f"{file} holds {', '.join(names) or 'nothing'}; expected a tensor `{needs}`"
        )
    return found
