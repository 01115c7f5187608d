"""``postlude tune``: train on demonstrations, preferences or rewards; ``tune prior``: store what a reference says."""

from __future__ import annotations

import json as json_
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._group import PLAIN, PlainCommand, PlainFormGroup
from postlude.cli._output import Result

__all__ = ["app", "prior", "tune"]

app = typer.Typer(
    cls=PlainFormGroup,
    help="Train a model on demonstrations, preferences or rewards; `tune prior` stores what a frozen reference says.",
)

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA.jsonl",
        help="One JSON object a line: `prompt` and `completion`, `messages`, or `text`; `prompt`, `chosen` and "
        "`rejected` for dpo; `prompt` and what the reward asks for, for grpo.",
        show_default=False,
    ),
]
# Of a result, what is shown to a person; an objective has some of them.
_MAIN = (
    "loss",
    "final_loss",
    "mean_loss",
    "final_reward",
    "accuracy",
    "margin",
    "steps",
    "skipped_steps",
    "response_tokens",
    "effective_tokens",
    "kept_share",
    "eos_share",
    "trained_parameters",
    "seconds",
)

Demonstrations = Annotated[
    str,
    typer.Argument(
        metavar="DATA.jsonl",
        help="The demonstrations to tune on, one JSON object a line: `prompt` and `completion`, `messages`, or `text`.",
        show_default=False,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=2,
        help="Tokens at which a sequence is cut; the model's context otherwise, at most 2048.",
    ),
]


@app.command(
    PLAIN,
    cls=PlainCommand,
    hidden=True,
    epilog="Related: `postlude tune prior CHECKPOINT data.jsonl -o prior/` computes a reference's columns once.",
)
def tune(
    checkpoint: options.Checkpoint,
    data: Data,
    output: options.NewDirectory,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="RULE",
            help="Rule that weights the tokens; `postlude methods --verb tune` lists them. Plain `sft` otherwise.",
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", metavar="sft|dpo|grpo", help="What to train for.")
    ] = "sft",
    signal: Annotated[
        str | None,
        typer.Option(
            "--signal",
            metavar="online|reference",
            help="Whose probabilities the rule reads; the paper's otherwise.",
        ),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            "--prior", metavar="DIRECTORY", help="Written by `tune prior`: no extra forward pass."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="CHECKPOINT", help="Frozen model; the one to tune otherwise."
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="MODULE:FUNCTION",
            help="A Python function, or a name such as speech-verifiable, for --objective grpo; repeat for a sum, =0.5 "
            "behind one is its weight.",
        ),
    ] = None,
    keep_eos: Annotated[
        bool,
        typer.Option(
            "--keep-eos", help="The token that ends a text weighs 1 whatever the rule says of it."
        ),
    ] = False,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="Train an adapter of the peft library (lora, loha, vera, ...) beside frozen weights.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Of the adapter; 8 otherwise.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Scale of the adapter; twice the rank otherwise."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="A,B",
            help="Layers to adapt, such as q_proj,v_proj; all linear layers of the blocks otherwise.",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to the weights and save a whole model.")
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="trained|frozen",
            help="Of an audio language model: train its encoder whole, also beside an adapter, or leave it.",
        ),
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 1.0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimiser steps, instead of --epochs.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Sequences of one forward pass.")
    ] = 8,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Forward passes of one optimiser step.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Highest.")] = 5e-5,
    warmup: Annotated[
        float, typer.Option("--warmup", help="Share of the steps in which the learning rate rises.")
    ] = 0.1,
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="cosine|linear|constant", help="After warm-up.")
    ] = "cosine",
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.01,
    clip: Annotated[float, typer.Option("--clip", help="Largest norm of the gradient.")] = 1.0,
    max_length: MaxLength = None,
    packing: Annotated[
        bool,
        typer.Option("--packing", help="Several sequences in a row; they do not see each other."),
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every",
            min=1,
            help="Steps from one kept state to the next; at most one a minute otherwise. The same command started "
            "again after a kill resumes from the last.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the rule, the objective or the adapter; repeat for more.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Type to train and to store in; auto trains in float32 and stores as the checkpoint does.",
        ),
    ] = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Tune a model: on demonstrations with token weights, on preferences (dpo), or by rewards (grpo)."""
    from postlude import registry
    from postlude.cli._settings import make_settings, read_fields
    from postlude.errors import SettingsError
    from postlude.tuning.adapters import Adapter
    from postlude.tuning.objective import TuneRun
    from postlude.tuning.run import main_process
    from postlude.tuning.weighting import TokenWeighting

    supervised = objective == "sft"
    info = registry.find("tune", (weights or "sft") if supervised else objective)
    if supervised and info.family == "objective":
        raise SettingsError(f"{info.name} is no rule but an objective: --objective {info.name}.")
    if not supervised and info.family != "objective":
        raise SettingsError(f"{info.name} is no objective but a rule: --weights {info.name}.")
    if not supervised and weights is not None:
        raise SettingsError(f"--weights is for --objective sft; leave it out of {objective}.")
    if reward and "reward" not in info.options:
        raise SettingsError(f"--reward is for --objective grpo; leave it out of {info.name}.")
    if adapter is None and not (rank is alpha is target is None):
        raise SettingsError(
            "--rank, --alpha and --target are of an adapter: choose one, for example --adapter lora."
        )
    words = _divided(set_ or [], list(info.options), supervised, adapter)
    given: dict[str, object] = {} if not reward else {"reward": tuple(reward)}
    goal: Any = make_settings(info, given, words["method"])
    if supervised:
        goal = TokenWeighting(
            goal, signal, **read_fields("token weights", TokenWeighting, words["weighting"])
        )
    elif signal is not None:
        raise SettingsError(f"--signal is for --objective sft; leave it out of {objective}.")

    from postlude import _front_door
    from postlude.runs.progress import Progress

    run = TuneRun(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        clip=clip,
        max_length=max_length,
        packing=packing,
        seed=seed,
    )
    layers = target if target is None or "," not in target else _list(target)
    tuned = _front_door.tune(
        _front_door.load(checkpoint, device=device),
        data,
        goal,
        run,
        prior=prior,
        reference=None if reference is None else _front_door.load(reference, device=device),
        keep_eos=keep_eos,
        adapter=None
        if adapter is None
        else Adapter(adapter, rank, alpha, layers, words["adapter"]),
        merge=merge,
        dtype=dtype,
        encoder=encoder,
        out=output,
        overwrite=overwrite,
        save_every=save_every,
        inplace=True,
        progress=Progress(show=main_process()),
    )
    if json:
        return Result(tuned.result)
    told = {**tuned.result, "checkpoint": checkpoint, "clips": _clips_beside(data)}
    return Result(tuned.result, _view(told, tuned.log))


@app.command("prior")
def prior(
    checkpoint: options.Checkpoint,
    data: Demonstrations,
    output: options.NewDirectory,
    max_length: MaxLength = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Compute once what a frozen model says about every token to be learned; `tune --prior` reads it for free."""
    from postlude import _front_door
    from postlude.runs.progress import Progress

    # As it is stored, whatever it computes in: that is what `tune` compares.
    model = _front_door.load(checkpoint, device=device)
    with Progress(show=True) as progress:
        manifest = _front_door.tune_prior(
            model,
            data,
            output,
            max_length=max_length,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    return Result({"output": output, **manifest})


def _clips_beside(data: str) -> str | None:
    """The labelled clips that a model was not tuned on: ``test`` beside the folder of its data."""
    from pathlib import Path

    from postlude.runs.clips import LABELS

    test = Path(data).parent.parent / "test"
    return str(test) if (test / LABELS).is_file() and test != Path(data).parent else None


def _view(result: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> object:
    """What was done, what came of it, where it is and what to do next; then the main numbers."""
    import os.path

    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from postlude.cli._output import plain
    from postlude.report.tuning import PAGE, evaluation, headline

    output = str(result["output"])
    model = "Adapter" if result["adapter"] and not result["merged"] else "Model"
    places = [
        f"{model}: {output}",
        f"Curves: {os.path.join(output, PAGE)}",
        f"All numbers: {os.path.join(output, 'tune.json')}, or --json",
        "What was learned:" if result.get("encoder") else "What was forgotten:",
        f"  {evaluation(result)}",
    ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in _MAIN:
        value = plain(result.get(name))
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            table.add_row(Text(name, style="dim"), Text(shown))
    said = [Text(line) for line in headline(result, log)]
    # To be copied, so in one piece.
    whole = [Text(line, no_wrap=True, overflow="ignore") for line in places]
    return Group(*said, Text(), *whole, Text(), table)


def _divided(
    words: Iterable[str], method: list[str], supervised: bool, adapter: str | None
) -> dict[str, Any]:
    """The words of ``--set`` by whose setting they are; ``adapter.KEY`` says so where two have one of that name."""
    from postlude.errors import UnknownNameError
    from postlude.tuning.adapters import adapter_fields

    weighting = ["floor", "ceil", "normalize", "always_keep_ids"] if supervised else []
    of_adapter = [] if adapter is None else adapter_fields(adapter)
    divided: dict[str, Any] = {"method": [], "weighting": [], "adapter": {}}
    for word in words:
        name, _, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if name.startswith("adapter.") or name not in [*method, *weighting, *of_adapter]:
            name = name.removeprefix("adapter.")
            if name not in of_adapter:
                known = [*method, *weighting, *of_adapter]
                raise UnknownNameError(
                    "setting of the rule, the objective or the adapter", name, known
                )
            divided["adapter"][name] = _value(text.strip())
        elif name in method:
            divided["method"].append(word)
        elif name in weighting:
            divided["weighting"].append(word)
        else:
            divided["adapter"][name] = _value(text.strip())
    return divided


def _value(text: str) -> Any:
    """A setting of another library: JSON where it is some, words divided by commas, or one word."""
    try:
        return json_.loads(text)
    except ValueError:
        return _list(text) if "," in text else text


def _list(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
