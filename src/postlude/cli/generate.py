"""``postlude generate``: continue a text, and say how fast and in how much memory."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["generate"]


class _Generated(Result):
    """The text has been printed as it came; the rest goes to stderr, so that a pipe gets the text alone."""

    def show(self, console: Console) -> None:
        from rich.console import Console

        from postlude.cli._output import plain

        value = {name: item for name, item in plain(self.value).items() if name != "text"}
        Result(value).show(Console(file=sys.stderr, highlight=False))


def generate(
    checkpoint: options.Checkpoint,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "-n", metavar="N", help="Stop after so many tokens."),
    ] = 50,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="T",
            help="0 takes the most probable token; 1 samples what the model says.",
        ),
    ] = 0.0,
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel",
            metavar="NAME",
            help="What computes quantized layers: auto, simulate, or a name from "
            "`postlude inspect kernels`.",
        ),
    ] = "auto",
    kv_recent: Annotated[
        int,
        typer.Option(
            "--kv-recent",
            metavar="N",
            help="Tokens at the end of a quantized KV cache that stay in floating point.",
        ),
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Continue a text; quantized layers run packed. Statistics go to stderr, with --json the text does."""
    from postlude import _front_door

    def stream(piece: str) -> None:
        print(piece, end="", flush=True)

    result = _front_door.generate(
        _front_door.load(checkpoint, dtype=dtype, device=device),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        kernel=kernel,
        kv_recent=kv_recent,
        seed=seed,
        stream=stream,
    )
    # Ended here: where both go into one file, the numbers begin on a line of their own.
    print(flush=True)
    return _Generated(result)
