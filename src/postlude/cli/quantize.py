"""``postlude quantize``: a smaller checkpoint by one of the registered methods."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, tables

__all__ = ["quantize"]


def quantize(
    checkpoint: options.Checkpoint,
    output: options.NewDirectory,
    method: options.Method = "rtn",
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            metavar="w4a4kv4",
            help="Bits of weights, activations and KV cache; a part left out stays at 16, in floating "
            "point. Without this option, the method's own defaults.",
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="channel|tensor|N",
            help="Weights that share a scale: an output channel, the tensor, or N inputs of a channel.",
        ),
    ] = None,
    activation_group: Annotated[
        str | None,
        typer.Option(
            "--activation-group",
            metavar="token|tensor|N",
            help="Activations that share a scale: a token, the tensor, or N channels of a token.",
        ),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option(
            "--branch",
            metavar="16|w8a8|w4a8g64",
            help="Format of the low-rank branch, in methods that have one: bits of its factors and of what they "
            "multiply, in groups of 32 unless said.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="Rank of the low-rank branch.")
    ] = None,
    bytes_as: Annotated[
        str | None,
        typer.Option(
            "--bytes-as",
            metavar="METHOD:RANK",
            help="Choose the rank of every layer so that its branch, scales included, takes no more bytes than that "
            "of METHOD at RANK (svdquant:32).",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text to calibrate on: .txt, .jsonl with a `text` field, or a directory of them. For a vision "
            "model, a directory of images. A denoiser samples its own inputs where nothing is given; else "
            ".safetensors with arguments of its forward.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=1, help="Calibration sequences (images, inputs) to draw."),
    ] = 128,
    timesteps: Annotated[
        str,
        typer.Option(
            "--timesteps",
            metavar="uniform|skewed",
            help="How the inputs that a denoiser samples for itself spread over its timesteps.",
        ),
    ] = "uniform",
    length: Annotated[
        int | None,
        typer.Option(
            "--length", min=1, help="Tokens per calibration sequence; fits the model otherwise."
        ),
    ] = None,
    set_: options.Set = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="DIRECTORY",
            help="Keep finished blocks here, also afterwards; beside the output until it is written "
            "otherwise. The same command started again after a kill resumes from them.",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    check: options.Check = True,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Quantize a checkpoint into a directory.

    A language model is then loaded by transformers after `import postlude`, any other model by `postlude.load`.
    """
    from postlude import registry
    from postlude.cli._settings import make_settings, parse_bits, parse_granularity

    given: dict[str, object] = {}
    if bits is not None:
        given |= parse_bits(bits)
    if group is not None:
        given["group"] = parse_granularity("--group", group, ("channel", "tensor"))
    if activation_group is not None:
        words = ("token", "tensor")
        given["activation_group"] = parse_granularity("--activation-group", activation_group, words)
    parts = {"branch": branch, "rank": rank, "bytes_as": bytes_as}
    given |= {name: value for name, value in parts.items() if value is not None}
    settings = make_settings(registry.find("quantize", method), given, set_ or [])
    if calibration is None and getattr(settings, "needs_calibration", False):
        from postlude.quantization.engine import check_calibrated

        check_calibrated(settings, checkpoint)

    from postlude import _front_door
    from postlude.errors import SettingsError
    from postlude.evaluation.size import size_of
    from postlude.runs.progress import Progress

    model = _front_door.load(checkpoint, dtype=dtype, device=device)
    asked = "kv" in given or any(word.startswith("kv=") for word in set_ or [])
    if asked and not getattr(model, "reads_tokens", True) and settings.kv < 16:
        raise SettingsError(
            f"{settings.kv} bits are asked for the KV cache, and a {model.kind} model has none: leave kv out "
            f"(--bits w{settings.weights}a{settings.activations})"
        )
    whole = size_of(model)["bytes"]
    small = _front_door.quantize(
        model,
        settings,
        calibration=calibration,
        samples=samples,
        length=length,
        timesteps=timesteps,
        seed=seed,
        out=output,
        overwrite=overwrite,
        run=run,
        inplace=True,
        check=check,
        progress=Progress(show=True),
    )
    result: dict[str, object] = {"output": output, "method": method, **size_of(small)}
    result |= {"float_bytes": whole, "seed": seed}
    reload = getattr(small, "reload", None)
    if reload is not None:
        result["reload_max_difference"] = reload.max_difference
    made_by = getattr(small, "made_by", None)
    sites = None if made_by is None else made_by().get("bits")
    if sites:
        result["bits"] = sites
    notes = _notes(result)
    if notes:
        result["notes"] = notes
    result["settings"] = settings
    return Result(result, None if json or not sites else _view(result))


def _view(result: dict[str, Any]) -> object:
    """As ever, but sites with the same bits in one line: the first words of a path are those of all."""
    from rich.console import Group

    by_bits: dict[int, list[str]] = {}
    for site, bits in result["bits"].items():
        by_bits.setdefault(bits, []).append(_short(site))
    short = {str(bits): ", ".join(by_bits[bits]) for bits in sorted(by_bits)}
    return Group(*tables({**result, "bits": short}))


def _short(path: str) -> str:
    """``vit.layers.3.mlp.fc1`` as ``3.mlp.fc1``."""
    words = path.split(".")
    first = next((i for i, word in enumerate(words) if word.isdigit()), 0)
    return ".".join(words[first:])


def _notes(result: dict[str, Any]) -> list[str]:
    """Where little was saved."""
    notes = []
    bits, share = result.get("bits_per_weight", 0.0), result["bytes"] / result["float_bytes"]
    if bits > 16:
        notes.append(
            f"{bits:.3g} bits a weight, more than 16: what is stored beside the codes (scales, low-rank branch) "
            "outweighs what they save"
        )
    if share > 0.5:
        notes.append(f"{share:.0%} of the bytes of the model that it was made from")
    return notes
