"""``postlude evaluate``: how good a checkpoint is, and whether what attribution says of it is to be believed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._group import PLAIN, PlainCommand, PlainFormGroup
from postlude.cli._output import Result, refuse_existing, write_json

__all__ = ["app", "evaluate", "lds", "retrieval"]

app = typer.Typer(
    cls=PlainFormGroup,
    help="Measure a checkpoint on a text; `evaluate lds` and `evaluate retrieval` judge attribution methods.",
)


@app.command(
    PLAIN,
    cls=PlainCommand,
    hidden=True,
    epilog="Related: `postlude evaluate lds` and `postlude evaluate retrieval` judge attribution methods.",
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
    names = _names(methods)
    settings = Retraining(epochs=epochs, rate=rate, batch=batch)
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    with Progress(show=True) as progress:
        result = _front_door.evaluate_lds(
            model,
            data,
            names,
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
    return Result(result)


@app.command("retrieval")
def retrieval(
    checkpoint: options.Checkpoint,
    data: Data,
    methods: Methods = "lorif,logra,graddot",
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
    itself: where bm25 does as well, finding words is enough.
    """
    from postlude import _front_door
    from postlude.evaluation.lds import Retraining
    from postlude.runs.progress import Progress

    refuse_existing(output, overwrite=overwrite)
    names = _names(methods)
    settings = Retraining(epochs=epochs, rate=rate, batch=batch)
    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    with Progress(show=True) as progress:
        result: dict[str, Any] = _front_door.evaluate_retrieval(
            model,
            data,
            names,
            queries=queries,
            share=share,
            facts=facts,
            training=settings,
            max_length=max_length,
            seed=seed,
            progress=progress,
        )
    write_json(result, output, overwrite=overwrite)
    return Result(result)


def _names(methods: str) -> list[str]:
    """Names of registered methods, refused before a model is loaded."""
    from postlude import registry

    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        registry.find("attribute", name)
    return names
