"""``postlude attribute``: which training examples made a model say something; ``build`` and ``verify`` an index."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result
from postlude.cli.plan import plan
from postlude.cli.query import learn_weights, query
from postlude.cli.selection import damage, select

__all__ = ["app", "build", "verify"]

app = typer.Typer(
    no_args_is_help=True,
    help="Trace what a model says to what it learned: build an index of its training examples, then ask it.",
)


def build(
    checkpoint: options.Checkpoint,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help='Training examples: a .jsonl file, a line each with "text", or "prompt" and "completion", and '
            'an "id" if you like. For a diffusion model images: a folder of .png files with labels.jsonl, or a '
            ".npz or .safetensors file.",
            show_default=False,
        ),
    ],
    output: options.NewDirectory,
    method: options.Method = "lorif",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Columns of the factors kept of a gradient.")
    ] = None,
    format: options.StoredFormat = None,
    factor: Annotated[
        int | None,
        typer.Option(
            "--factor", min=1, help="How many times narrower the sides of a gradient become."
        ),
    ] = None,
    set_: options.Set = None,
    max_length: Annotated[
        int,
        typer.Option("--max-length", min=0, help="Tokens at which an example is cut; 0: context."),
    ] = 0,
    layers: Annotated[
        str,
        typer.Option("--layers", metavar="A,B", help="Patterns of linear layers, as in *.mlp.*"),
    ] = "*",
    loss: Annotated[
        Literal["sum", "mean"],
        typer.Option("--loss", help="Over the predicted tokens of an example."),
    ] = "sum",
    prompts: Annotated[
        Literal["mask", "train"],
        typer.Option("--prompts", help="Whether the tokens of a prompt are predicted too."),
    ] = "mask",
    timesteps: Annotated[
        int, typer.Option("--timesteps", min=1, help="That the loss of an image is averaged over.")
    ] = 10,
    noises: Annotated[
        int, typer.Option("--noises", min=1, help="Draws of noise at each timestep.")
    ] = 1,
    tokens_per_batch: Annotated[
        int, typer.Option("--batch-tokens", min=1, help="Tokens in one pass, padding included.")
    ] = 4096,
    shard_examples: Annotated[
        int,
        typer.Option("--shard-examples", min=1, help="Examples of one file; what a kill can cost."),
    ] = 1024,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Build an index of training examples; the same command after a kill goes on where it stopped."""
    from postlude import registry
    from postlude.cli._settings import make_settings

    info = registry.find("attribute", method)
    given = {"rank": rank, "format": format, "projection_factor": factor}
    settings = make_settings(
        info, {name: value for name, value in given.items() if value is not None}, set_ or []
    )
    from postlude import _front_door
    from postlude.attribution.examples import Collection
    from postlude.runs.progress import Progress

    collection = Collection(
        max_length=max_length,
        layers=layers,
        loss=loss,
        prompts=prompts,
        timesteps=timesteps,
        noises=noises,
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        shard_examples=shard_examples,
    )
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    with Progress(show=True) as progress:
        index = _front_door.attribute(
            model,
            data,
            settings,
            out=output,
            collection=collection,
            overwrite=overwrite,
            progress=progress,
        )
    report = {"output": output, "method": info.name, **index.report, "seed": seed}
    # The same as the output.
    report.pop("path", None)
    value = {**report, "settings": settings}
    if json or index.data_kind != "images":
        return Result(value)
    # An image has patches, and none is ever cut.
    shown = {
        "patches" if name == "tokens" else name: item
        for name, item in value.items()
        if name not in ("truncated", "truncated_tokens")
    }
    return Result(shown)


def verify(index: options.Index, seed: options.Seed = 0, json: options.Json = False) -> Result:
    """Read every byte of an index and compare it with its checksums; the training examples too.

    Damaged shards are named, with exit code 2; so are training examples that changed since the build.
    """
    from postlude import _front_door
    from postlude.errors import StoreError

    report = _front_door.attribution_verify(index)
    if report["damaged"]:
        named = "; ".join(
            f"shard {one['shard']} ({one['file']}): {one['reason']}" for one in report["damaged"]
        )
        raise StoreError(
            f"{report['path']} is damaged in {len(report['damaged'])} of {report['shards']} shards: {named}. Run the "
            "same build command again: it makes the damaged shards alone anew."
        )
    if not report["ok"]:
        raise StoreError(f"The shards of {report['path']} are whole, but: {report['data']}")
    shown = {name: value for name, value in report.items() if name != "damaged"}
    return Result(report if json else shown)


app.command("build")(build)
app.command("query")(query)
app.command("learn-weights")(learn_weights)
app.command("verify")(verify)
app.command("plan")(plan)
app.command("select")(select)
app.command("damage")(damage)
