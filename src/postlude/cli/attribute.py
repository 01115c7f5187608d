"""``postlude attribute``: which training examples made a model say something."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, refuse_existing

if TYPE_CHECKING:
    from postlude.attribution.answers import Answer

__all__ = [
    "Index",
    "Keep",
    "Method",
    "Moved",
    "app",
    "build",
    "learn_weights",
    "opened_index",
    "plan",
    "query",
    "verify",
]

app = typer.Typer(
    no_args_is_help=True,
    help="Trace what a model says to what it learned: build an index of its training examples, then ask it.",
)

Index = Annotated[
    str, typer.Argument(metavar="INDEX", help="A directory that `build` made.", show_default=False)
]
Method = Annotated[
    str | None,
    typer.Option("--method", "-m", metavar="NAME", help="`postlude methods` lists them."),
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


@app.command("build")
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
    method: Method = "lorif",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Columns of the factors kept of a gradient.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="fp32|bf16|int8", help="Type of the stored numbers."),
    ] = None,
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

    info = registry.find("attribute", method or "lorif")
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


@app.command("query")
def query(
    index: Index,
    source: Annotated[
        str,
        typer.Argument(
            metavar="TEXT|FILE|IMAGES",
            help="The text to explain, or a .jsonl file with one query a line (as in the training data). For a "
            "diffusion model a .png file, or images as in the training data.",
            show_default=False,
        ),
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="Examples to show.")] = 10,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also the part of every layer in each score.")
    ] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also the part of every token, of example and query.")
    ] = False,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write a page, with layers and tokens."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="FILE", help="What layers count for: `learn-weights`."),
    ] = None,
    method: Method = None,
    set_: options.Set = None,
    checkpoint: Moved = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="The training examples, if they were moved."),
    ] = None,
    keep: Keep = True,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Rank the training examples that support a text, or an image, most.

    With --json a text or .png gives {"results": [{"id", "score", "text", ...}], ...}; several queries give
    {"queries": [...]} with such an object each. Nothing here is random: --seed is taken for uniformity.
    """
    refuse_existing(html, overwrite=overwrite)
    from postlude import _front_door
    from postlude.runs.progress import Progress

    opened, asked, changes, loaded = opened_index(index, method, set_, checkpoint, dtype, device)
    with Progress(show=True) as progress:
        answers = _front_door.attribution_query(
            opened,
            source,
            method=asked,
            changes=changes,
            weights=weights,
            checkpoint=loaded,
            data=data,
            top=top,
            layers=layers,
            tokens=tokens,
            html=html,
            keep=keep,
            command=shlex.join(["postlude", *sys.argv[1:]]),
            progress=progress,
        )
    from postlude.attribution.query import single

    several = not single(source, opened.data_kind)
    found = [answer.to_dict() for answer in answers]
    value: dict[str, Any] = {"queries": found} if several else found[0]
    value |= {"index": str(opened.path), "html": html, "weights": weights}
    return Result(value, None if json else _view(answers, layers, html))


@app.command("learn-weights")
def learn_weights(
    index: Index,
    source: Annotated[
        str,
        typer.Argument(
            metavar="QUERIES|IMAGES",
            help="What to learn from: a .jsonl file with one query a line, or images. Queries that share a style or "
            "a background teach weights for just that.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to write; INDEX/weights.safetensors."
        ),
    ] = None,
    k: Annotated[
        int,
        typer.Option(
            "--k", min=0, help="Best examples of a query that count as found; 0: 1 %, at least 10."
        ),
    ] = 0,
    regularizer: Annotated[
        float, typer.Option("--regularizer", min=0.0, help="Pull towards equal weights.")
    ] = 0.01,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Of Adam.")] = 200,
    center: Annotated[
        bool, typer.Option("--center", help="Subtract the mean score of a query first.")
    ] = False,
    method: Method = None,
    set_: options.Set = None,
    checkpoint: Moved = None,
    keep: Keep = True,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Learn what each layer should count for, from queries alone, for `query --weights`."""
    target = output or os.path.join(index, "weights.safetensors")
    refuse_existing(target, overwrite=overwrite)
    from postlude import _front_door
    from postlude.attribution.layer_weights import Learning
    from postlude.runs.progress import Progress

    learning = Learning(k=k, regularizer=regularizer, steps=steps, center=center, seed=seed)
    opened, asked, changes, loaded = opened_index(index, method, set_, checkpoint, dtype, device)
    with Progress(show=True) as progress:
        found = _front_door.attribution_learn_weights(
            opened,
            source,
            out=target,
            learning=learning,
            method=asked,
            changes=changes,
            checkpoint=loaded,
            keep=keep,
            overwrite=overwrite,
            progress=progress,
        )
    value = {"output": target, "method": found.method["name"], **found.learned}
    value["weights"] = found.named()
    if json:
        return Result({**value, "notes": found.notes()})
    from rich.console import Group

    from postlude.cli._output import tables

    return Result(value, Group(*tables(value), "", *found.notes()))


def opened_index(
    index: str,
    method: str | None,
    set_: list[str] | None,
    checkpoint: str | None,
    dtype: str,
    device: str | None,
) -> tuple[Any, Any, dict[str, Any], Any]:
    """An index, the method to ask it with, what to change in its settings, and the model."""
    from postlude import _front_door, registry
    from postlude.attribution.index import Index as Opened
    from postlude.attribution.query import method_of
    from postlude.cli._settings import make_settings

    opened = Opened(index)
    asked = method_of(opened) if method is None else registry.find("attribute", method).settings()
    changes: dict[str, Any] = {}
    if set_:
        parsed = make_settings(registry.info_of(asked), {}, set_)
        names = [word.partition("=")[0].strip().replace("-", "_") for word in set_]
        changes = {name: getattr(parsed, name) for name in names}
    model = checkpoint or opened.manifest["model"]["path"]
    loaded = None if model is None else _front_door.load(model, dtype=dtype, device=device)
    return opened, asked, changes, loaded


@app.command("verify")
def verify(index: Index, seed: options.Seed = 0, json: options.Json = False) -> Result:
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


@app.command("plan")
def plan(
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="[CHECKPOINT]", help="The model; or say --parameters."),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option("--parameters", metavar="70B", help="Weights of a Llama-like model."),
    ] = None,
    examples: Annotated[
        str, typer.Option("--examples", metavar="5M", help="Training examples.")
    ] = "1M",
    tokens: Annotated[
        float | None,
        typer.Option(
            "--tokens", min=1, help="Mean tokens of each; the model's context otherwise, or 512."
        ),
    ] = None,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Asked together.")] = 1,
    factor: Annotated[
        int | None,
        typer.Option("--factor", min=1, help="Of the projection. Settings not given are lorif's."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Columns of the factors.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="fp32|bf16|int8", help="Of the stored numbers."),
    ] = None,
    curvature_rank: Annotated[
        int | None,
        typer.Option("--curvature-rank", min=0, help="Directions of the curvature."),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option("--hardware", metavar="this|h100|...", help="This machine is measured."),
    ] = "this",
    devices: Annotated[int, typer.Option("--devices", min=1, help="How many of them.")] = 1,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Predict what an index will take: bytes, operations, bytes read by a query, and time."""
    from postlude import _front_door
    from postlude.attribution.plan import parse_count

    given = {
        "tokens": tokens,
        "factor": factor,
        "rank": rank,
        "format": format,
        "curvature_rank": curvature_rank,
    }
    report = _front_door.attribution_plan(
        checkpoint=checkpoint,
        parameters=None if parameters is None else parse_count(parameters, "--parameters"),
        examples=parse_count(examples, "--examples"),
        hardware=hardware,
        devices=devices,
        sweep=True,
        queries=queries,
        **{name: value for name, value in given.items() if value is not None},
    )
    return Result(report, None if json else _plan_view(report))


def _view(answers: Sequence[Answer], layers: bool, html: str | None) -> object:
    """A table for each query; the page is named last."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for answer in answers:
        parts.append(Text(_short(answer.text, 300), style="bold"))
        if answer.truncated:
            parts.append(
                f"the last {answer.truncated} tokens lie beyond the context and were cut off"
            )
        table = Table(box=None, pad_edge=False)
        for name in ("", "id", "score", "deviations"):
            table.add_column(name, justify="left" if name == "id" else "right")
        if layers:
            table.add_column("strongest layer", overflow="fold")
        table.add_column("example", overflow="fold")
        for place, hit in enumerate(answer.results, 1):
            above = (hit.score - answer.mean) / answer.deviation if answer.deviation else 0.0
            cells = [str(place), str(hit.id), f"{hit.score:.4g}", f"{above:+.1f}"]
            if layers:
                found = hit.layers or {}
                cells.append(max(found, key=lambda name: found[name]) if found else "-")
            cut = f" [{hit.truncated} tokens cut off]" if hit.truncated else ""
            table.add_row(*map(Text, cells), Text(_short(hit.text, 140) + cut))
        parts += [table, ""]
    last = answers[-1]
    parts.append(
        f"{last.examples} example{'s' * (last.examples != 1)} in {last.seconds:.3g} s; "
        f"scores are {last.unit}; deviations are from the mean of "
        "all examples"
    )
    if html:
        parts.append(f"page: {html}")
    return Group(*parts)


def _short(text: str, letters: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= letters else line[:letters].rstrip() + " ..."


def _plan_view(report: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    chosen = Table(show_header=False, box=None, pad_edge=False)
    sizes, seconds, read = report["bytes"], report["seconds"], report["read"]
    hardware = report["hardware"]

    def where(index: float) -> str:
        return "in memory" if index <= hardware["memory"] else "from disk"

    for name, value in (
        ("model", report["model"]),
        ("layers", f"{report['layers']}, {report['parameters']:,} weights"),
        ("examples", f"{report['examples']:,} of {report['tokens']:,.0f} tokens"),
        (
            "settings",
            f"factor {report['factor']}, rank {report['rank']}, {report['format']}",
        ),
        ("hardware", f"{hardware['name']}, {_bytes(hardware['memory'])} of memory"),
        (
            "index",
            f"{_bytes(sizes['index'])}, {sizes['ratio']:.0f} times smaller than whole gradients",
        ),
        ("curvature, if kept", _bytes(sizes["curvature"])),
        ("of the largest layer", _bytes(sizes["curvature_layer"])),
        (
            "build",
            f"{sum(report['flops'][n] for n in _BUILD):.2g} operations, {_time(seconds['build'])} on an idle machine",
        ),
        ("fitting the curvature", _time(seconds["fit"])),
        (
            "a query reads",
            f"{_bytes(read['score'])} {where(sizes['index'])}, {_time(seconds['score'])}",
        ),
    ):
        chosen.add_row(name, str(value))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("factor", "rank", "format", "index", "ratio", "curvature", "build", "query", "read")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.get("table", []):
        table.add_row(
            str(row["factor"]),
            str(row["rank"]),
            row["format"],
            _bytes(row["index_bytes"]),
            f"{row['ratio']:.0f}",
            _bytes(row["curvature_bytes"]),
            _time(row["build_seconds"]),
            _time(row["score_seconds"]),
            where(row["index_bytes"]),
        )
    notes = []
    if seconds["build"] > _YEAR:
        measured = hardware["name"].endswith("measured")
        elsewhere = "; --hardware h100 --devices 64 for others" if measured else ""
        notes += ["", f"A build takes {_time(seconds['build'])} here{elsewhere}."]
    return Group(chosen, "", table, *map(Text, notes))


_BUILD = ("gradients", "projection", "outer", "factorisation")


def _bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


_YEAR = 365.25 * 86400


def _time(seconds: float) -> str:
    for size, unit in ((_YEAR / 2, "years"), (86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            number = seconds / (_YEAR if unit == "years" else size)
            # Three digits, and never an exponent.
            return f"{float(f'{number:.3g}'):,.{0 if number >= 100 else 1}f} {unit}"
    return f"{seconds:.2g} s"
