"""``postlude evaluate``: how good a checkpoint is, alone or against the model it was made from."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, refuse_existing, write_json

__all__ = ["evaluate"]


def evaluate(
    checkpoint: options.Checkpoint,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to predict. A .txt is cut into windows that do not overlap; every line of a .jsonl "
            "is a document of its own.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="CHECKPOINT",
            help="The float model: adds KL divergence, top-1 agreement and its own loss.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, help="Tokens per sequence; the model's own otherwise."),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Measure loss and perplexity on a text, and the distance to a reference model."""
    from postlude import _front_door
    from postlude.runs.progress import Progress

    refuse_existing(output, overwrite=overwrite)
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    base = _front_door.load(reference, dtype=dtype, device=device) if reference else None
    with Progress(show=True) as progress:
        result = _front_door.evaluate(
            model, text, reference=base, max_length=max_length, seed=seed, progress=progress
        )
    write_json(result, output, overwrite=overwrite)
    return Result(result)
