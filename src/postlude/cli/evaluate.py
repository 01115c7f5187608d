"""``postlude evaluate``: how good a checkpoint is, and whether what attribution says of it is to be believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._group import PLAIN, PlainCommand, PlainFormGroup
from postlude.cli._output import Result, number_table, refuse_existing, write_json
from postlude.cli.pose import pose
from postlude.cli.samples import samples
from postlude.cli.speech import speech

__all__ = ["app", "evaluate", "lds", "retrieval"]

app = typer.Typer(
    cls=PlainFormGroup,
    help="Measure a checkpoint on a text; `evaluate samples` judges images, `evaluate pose` a "
    "network that reads poses, `evaluate speech` one that hears speech, `evaluate lds` and `evaluate retrieval` "
    "attribution methods.",
)
app.command("samples")(samples)
app.command("pose")(pose)
app.command("speech")(speech)


@app.command(
    PLAIN,
    cls=PlainCommand,
    hidden=True,
    epilog="Related: `postlude evaluate samples` judges the images of a diffusion model, `evaluate pose` a network "
    "that reads poses, `evaluate speech` one that hears speech, `evaluate lds` and `evaluate retrieval` attribution "
    "methods.",
)
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


Data = Annotated[
    str,
    typer.Argument(
        metavar="TRAIN.JSONL",
        help='Training examples, one object with "text" a line.',
        show_default=False,
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="A,B",
        help="Attribution methods, comma-separated; the controls bm25 and repsim are always added.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="METHOD.KEY=VALUE",
        help="A setting of a method, as in lorif.rank=4; repeat for more. `postlude methods NAME` lists them.",
    ),
]
Epochs = Annotated[
    int, typer.Option("--epochs", min=1, help="Passes over the examples of a training.")
]
Rate = Annotated[float, typer.Option("--rate", help="Learning rate of the first step; falls to 0.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences of a step.")]
MaxLength = Annotated[
    int,
    typer.Option("--max-length", min=0, help="Tokens at which an example is cut; 0: the context."),
]


@app.command("lds")
def lds(
    checkpoint: options.Checkpoint,
    data: Data,
    methods: Methods = "lorif,logra,graddot",
    set_: Set = None,
    queries: Annotated[
        str | None,
        typer.Option(
            "--queries",
            metavar="FILE",
            help="What to ask about (.jsonl); held out of the training examples otherwise.",
        ),
    ] = None,
    held_out: Annotated[
        int, typer.Option("--held-out", min=2, help="Examples to hold out, without --queries.")
    ] = 60,
    subsets: Annotated[
        int, typer.Option("--subsets", min=2, help="Random halves to train on.")
    ] = 100,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each half.")] = 1,
    epochs: Epochs = 2,
    rate: Rate = 5e-4,
    batch: Batch = 8,
    max_length: MaxLength = 0,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="DIRECTORY",
            help="Keep finished trainings here. The same command started again after a kill resumes from them.",
        ),
    ] = None,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Judge attribution methods by models trained on random halves of the data (LDS).

    The checkpoint is trained on all examples, and every method is asked which of them lower its loss on the
    queries. Then it is trained on random halves: the score is the rank correlation of what a method predicts for a half
    with what the model trained on it loses, mean over queries.
    """
    from postlude import _front_door
    from postlude.evaluation.lds import Retraining
    from postlude.runs.progress import Progress

    refuse_existing(output, overwrite=overwrite)
    chosen = _chosen(methods, set_ or [])
    settings = Retraining(epochs=epochs, rate=rate, batch=batch)
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    with Progress(show=True) as progress:
        result = _front_door.evaluate_lds(
            model,
            data,
            chosen,
            queries=held_out if queries is None else queries,
            subsets=subsets,
            seeds=seeds,
            training=settings,
            max_length=max_length,
            run=run,
            overwrite=overwrite,
            seed=seed,
            progress=progress,
        )
    write_json(result, output, overwrite=overwrite)
    return Result(result, None if json else _lds_view(result))


@app.command("retrieval")
def retrieval(
    checkpoint: options.Checkpoint,
    data: Data,
    methods: Methods = "lorif,logra,graddot",
    set_: Set = None,
    queries: Annotated[
        int, typer.Option("--queries", min=1, help="Examples to look for by copies of themselves.")
    ] = 60,
    share: Annotated[
        float,
        typer.Option("--share", min=0, max=1, help="Share of a copy's tokens that is replaced."),
    ] = 0.3,
    facts: Annotated[
        int,
        typer.Option("--facts", min=0, help="Invented facts to plant and look for; 0 for none."),
    ] = 20,
    epochs: Epochs = 2,
    rate: Rate = 5e-4,
    batch: Batch = 8,
    max_length: MaxLength = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Judge attribution methods by what they must find: noised copies, and sources of planted facts.

    The checkpoint is trained on the examples and the planted facts. Quick, and no evidence of influence by
    itself: where bm25 does as well, finding tokens is enough.
    """
    from postlude import _front_door
    from postlude.evaluation.lds import Retraining
    from postlude.runs.progress import Progress

    refuse_existing(output, overwrite=overwrite)
    chosen = _chosen(methods, set_ or [])
    settings = Retraining(epochs=epochs, rate=rate, batch=batch)
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    with Progress(show=True) as progress:
        result: dict[str, Any] = _front_door.evaluate_retrieval(
            model,
            data,
            chosen,
            queries=queries,
            share=share,
            facts=facts,
            training=settings,
            max_length=max_length,
            seed=seed,
            progress=progress,
        )
    write_json(result, output, overwrite=overwrite)
    return Result(result, None if json else _retrieval_view(result))


def _chosen(methods: str, assignments: list[str]) -> list[Any]:
    """Names of registered methods, settings objects of those that --set names; refused before a model is loaded."""
    from postlude import registry
    from postlude.cli._settings import make_settings
    from postlude.errors import SettingsError

    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        registry.find("attribute", name)
    given: dict[str, list[str]] = {}
    for word in assignments:
        left, equals, value = word.partition("=")
        name, dot, key = left.partition(".")
        name = name.strip()
        if not (equals and dot and name and key.strip()):
            raise SettingsError(
                f"--set {word!r} is not understood: expected METHOD.KEY=VALUE, as in lorif.rank=4."
            )
        registry.find("attribute", name)
        # The controls are always asked, named or not.
        if name in _CONTROLS and name not in names:
            names.append(name)
        if name not in names:
            raise SettingsError(
                f"--set {word!r}: {name} is not asked; expected one of {', '.join(names)}, or {name} among --methods."
            )
        given.setdefault(name, []).append(f"{key}={value}")
    return [
        make_settings(registry.find("attribute", name), {}, given[name]) if name in given else name
        for name in names
    ]


_CONTROLS = ("bm25", "repsim")


def _lds_view(result: dict[str, Any]) -> object:
    rows = [
        (row["method"], _interval(row, "lds", "", 3), _mark(row, "above_controls"), *_cost(row))
        for row in result["methods"]
    ]
    columns = ("method", "LDS [95 %]", "above\ncontrols", *_COST)
    counts = (
        f"{result['examples']} examples, {result['queries']} queries, {result['subsets']} halves, "
        f"{result['seeds']} training{'s' if result['seeds'] > 1 else ''} of each"
    )
    losses = (
        f"query loss {result['query_loss_before']:.3g} before training, {result['query_loss']:.3g} after it on "
        f"everything, {result['query_loss_of_halves']:.3g} on halves"
    )
    lines = [counts, losses]
    if result["seed_correlation"] is not None:
        lines.append(f"losses of one seed rank like another's: {result['seed_correlation']:.3g}")
    return _judged(columns, rows, lines, result)


def _retrieval_view(result: dict[str, Any]) -> object:
    planted = result["facts"] > 0
    rows = [
        (
            row["method"],
            f"{row['exact_top1']:.2f}",
            _interval(row, "noised_top1", "noised_top1_", 2),
            _mark(row, "noised_above_controls"),
            *(
                (
                    _interval(row, "planted_recall", "planted_recall_", 2),
                    _mark(row, "planted_above_controls"),
                )
                if planted
                else ()
            ),
        )
        for row in result["methods"]
    ]
    columns: tuple[str, ...] = ("method", "exact\ntop 1", "noised\ntop 1 [95 %]", "above\ncontrols")
    if planted:
        columns += ("planted\nrecall [95 %]", "above\ncontrols")
    lines = [
        f"{result['examples']} examples, {result['queries']} queries with {result['share']:.0%} of their tokens "
        f"replaced, {result['facts']} planted facts"
    ]
    costs = [(row["method"], *_cost(row)) for row in result["methods"]]
    return _judged(columns, rows, lines, result, number_table(("method", *_COST), costs), "")


_COST = ("bytes an\nexample", "build\nCPU s", "queries\nCPU s")


def _cost(row: dict[str, Any]) -> tuple[str, str, str]:
    seconds = (row[key] for key in ("build_cpu_seconds", "query_cpu_seconds"))
    return (f"{row['bytes_per_example']:,.0f}", *(f"{one:.3g}" for one in seconds))  # type: ignore[return-value]


def _interval(row: dict[str, Any], key: str, ends: str, digits: int) -> str:
    low, high = (row[f"{ends}{end}"] for end in ("low", "high"))
    return f"{row[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _mark(row: dict[str, Any], key: str) -> str:
    return "control" if row[key] is None else "yes" if row[key] else "no"


def _judged(
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    lines: list[str],
    result: dict[str, Any],
    *more: Any,
) -> object:
    from rich.console import Group
    from rich.text import Text

    training = result["training"]
    trained = (
        f"training: {training.epochs} epoch{'s' if training.epochs > 1 else ''}, rate {training.rate:g}, batch "
        f"{training.batch}; {result['seconds']:.3g} s in all"
    )
    notes = [Text(f"note: {one}", style="bold") for one in result.get("notes", [])]
    return Group(number_table(columns, rows), "", *more, *map(Text, [*lines, trained]), *notes)
