"""``postlude export``: a checkpoint in the format of another engine."""

from __future__ import annotations

from typing import Annotated

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result

__all__ = ["export"]


def export(
    checkpoint: options.Checkpoint,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Where to write: a directory for a language model (compressed-tensors, onnx), a file for gguf "
            "(FILE.gguf) and for onnx of a vision model (FILE.onnx).",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="compressed-tensors (vLLM, transformers), gguf (llama.cpp) or onnx (ONNX Runtime).",
            show_default=False,
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the format; repeat for more. `postlude methods NAME` lists them.",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    check: options.Check = True,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Write a checkpoint for another engine; what that cannot hold is refused, with what to do instead."""
    from postlude import registry
    from postlude.cli._settings import make_settings

    settings = make_settings(registry.find("export", to), {}, set_ or [])

    from postlude import _front_door

    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    result = _front_door.export(model, settings, output, overwrite=overwrite, check=check)
    return Result({**result, "seed": seed})
