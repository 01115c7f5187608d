"""``postlude attribute query`` and ``learn-weights``: ask an index, and learn what its layers count for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, refuse_existing, this_command

if TYPE_CHECKING:
    from postlude.attribution.answers import Answer

__all__ = ["learn_weights", "opened_index", "query"]


def query(
    index: options.Index,
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
    method: options.OtherMethod = None,
    set_: options.Set = None,
    checkpoint: options.Moved = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="The training examples, if they were moved."),
    ] = None,
    keep: options.Keep = True,
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
            command=this_command(),
            progress=progress,
        )
    from postlude.attribution.query import single

    several = not single(source, opened.data_kind)
    found = [answer.to_dict() for answer in answers]
    value: dict[str, Any] = {"queries": found} if several else found[0]
    value |= {"index": str(opened.path), "html": html, "weights": weights}
    return Result(value, None if json else _view(answers, layers, html))


def learn_weights(
    index: options.Index,
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
    method: options.OtherMethod = None,
    set_: options.Set = None,
    checkpoint: options.Moved = None,
    keep: options.Keep = True,
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
