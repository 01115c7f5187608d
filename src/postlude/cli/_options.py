"""The options that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Check",
    "Checkpoint",
    "Checkpoints",
    "Device",
    "Diffusion",
    "Drift",
    "DriftBias",
    "DriftMode",
    "Dtype",
    "Guidance",
    "Index",
    "Json",
    "Keep",
    "Method",
    "Moved",
    "NewDirectory",
    "NewFile",
    "OtherMethod",
    "Overwrite",
    "Reuse",
    "Sampler",
    "SamplerSteps",
    "Seed",
    "Set",
    "StoredFormat",
]

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A Hugging Face model directory (safetensors), or the built-in `zoo:tiny-lm`.",
        show_default=False,
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        help="Have a fresh process read the output and compare its logits before saying it is done.",
    ),
]
Checkpoints = Annotated[
    list[str],
    typer.Argument(metavar="CHECKPOINT CHECKPOINT...", help="Two or more.", show_default=False),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on the standard output; all else goes to stderr."
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Same seed, same result."),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Type to compute in: auto (the checkpoint's), float32, bfloat16, float16, float64.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="Device to compute on, for example cpu or cuda:0.", metavar="DEVICE"
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an output that is already there; start a run of something else afresh.",
    ),
]
NewDirectory = Annotated[
    str,
    typer.Option("--output", "-o", metavar="DIRECTORY", help="Where to write.", show_default=False),
]
NewFile = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE", help="Also write the result here, as JSON."),
]
Diffusion = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A diffusers directory (transformer/, scheduler/), or zoo:tiny-dit, zoo:tiny-dit-flow.",
        show_default=False,
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        metavar="NAME",
        help="euler, euler-a, ddim, heun, fm-euler, dpm++, dpm++1 or unipc; otherwise that of --drift, else the "
        "checkpoint's own.",
    ),
]
SamplerSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", metavar="N", help="Steps of the sampler; otherwise those of --drift, else 20."
    ),
]
Guidance = Annotated[
    float,
    typer.Option("--guidance", metavar="W", help="Classifier-free guidance, 0 or more; 1 is none."),
]
Reuse = Annotated[
    int,
    typer.Option(
        "--reuse",
        metavar="N",
        help="Run the model's blocks at every N-th timestep and reuse what they added in between; 1: at all.",
    ),
]
Drift = Annotated[
    str | None,
    typer.Option(
        "--drift",
        metavar="FILE",
        help="Correct the sampler by what `postlude sample calibrate` wrote here.",
    ),
]
DriftMode = Annotated[
    str | None,
    typer.Option(
        "--drift-mode",
        metavar="MODE",
        help="Of --drift: corrected (the default), or paper, the rule as published.",
    ),
]
DriftBias = Annotated[
    float,
    typer.Option(
        "--drift-bias",
        metavar="W",
        help="Of --drift: how much of the error that is to be expected of an output is subtracted from it, 0 to 1.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the method; repeat for more. `postlude methods NAME` lists them.",
    ),
]
_METHOD = typer.Option("--method", "-m", metavar="NAME", help="`postlude methods` lists them.")
Method = Annotated[str, _METHOD]
# Another than the one that an index was built for.
OtherMethod = Annotated[str | None, _METHOD]
Index = Annotated[
    str, typer.Argument(metavar="INDEX", help="A directory that `build` made.", show_default=False)
]
Moved = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", metavar="CHECKPOINT", help="The model, if it has been moved since."
    ),
]
Keep = Annotated[
    bool,
    typer.Option(
        "--keep/--no-keep", help="Keep the fitted curvature in the index for later queries."
    ),
]
StoredFormat = Annotated[
    str | None,
    typer.Option("--format", metavar="fp32|bf16|int8", help="Type of the stored numbers."),
]
