"""``postlude fit`` and ``postlude render``: a picture into a small network, and back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, refuse_existing, tables, this_command

__all__ = ["fit", "render"]


def fit(
    picture: Annotated[
        str,
        typer.Argument(
            metavar="PICTURE", help="Any 8-bit picture that Pillow reads.", show_default=False
        ),
    ],
    output: options.NewDirectory,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="`postlude methods --verb fit` lists them."
        ),
    ] = "smn",
    width: Annotated[int, typer.Option("--width", metavar="N", help="Of the hidden layers.")] = 128,
    bits: Annotated[
        float,
        typer.Option(
            "--bits",
            metavar="N",
            help="Of a stored weight: 2 to 8, 16 or 32; a fraction is a mean that goes where it helps most.",
        ),
    ] = 8,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Spend a whole number of bits as a mean, too.")
    ] = False,
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            metavar="nearest|learned",
            help="To the nearest code, or to the one that was learned on the picture.",
        ),
    ] = "nearest",
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Of training.")] = 2000,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="X", help="Learning rate; the network's own otherwise."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Pixels of a step.")] = 16384,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the network; repeat for more."
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write a page: PSNR against bytes of several codings, beside JPEG and WebP.",
        ),
    ] = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Fit a network to a picture and store it as an .inr directory; resumes after a kill."""
    from postlude import registry
    from postlude.cli._settings import make_settings

    refuse_existing(html, overwrite=overwrite)
    settings = make_settings(registry.find("fit", model), {"width": width}, set_ or [])

    from postlude import _front_door
    from postlude.runs.progress import Progress
    from postlude.signals.codec import Coding
    from postlude.signals.training import Training

    fitted = _front_door.fit(
        picture,
        settings,
        training=Training(
            steps=steps, learning_rate=settings.learning_rate if rate is None else rate, batch=batch
        ),
        coding=Coding(bits=bits, mixed=mixed, rounding=rounding),  # type: ignore[arg-type]
        seed=seed,
        out=output,
        overwrite=overwrite,
        html=html,
        command=this_command(),
        device=device,
        progress=Progress(show=True),
    )
    page = {} if html is None else {"html": html}
    value = {"output": output, **fitted.to_dict(), **page, "seed": seed, "settings": settings}
    return Result(value, _with_units(value))


def _with_units(value: dict[str, Any]) -> object:
    """What a person sees: single values with their units."""
    from rich.console import Group

    shown = dict(value)
    shown["size"] = "{} x {} pixels".format(*value["size"])
    shown["numbers"] = f"{value['numbers']:,}"
    for name in ("psnr_float", "psnr"):
        shown[name] = f"{value[name]:.2f} dB"
    shown["bits"] = f"{', '.join(f'{bits:g}' for bits in value['bits'])} a number, layer by layer"
    shown["bytes"] = f"{value['bytes']:,}"
    shown["predicted_memory"] = f"{value['predicted_memory'] / 2**20:.0f} MiB"
    return Group(*tables(shown))


def render(
    inr: Annotated[
        str, typer.Argument(metavar="INR", help="What `postlude fit` wrote.", show_default=False)
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A picture to write; .png keeps every pixel.",
            show_default=False,
        ),
    ],
    scale: Annotated[
        float,
        typer.Option("--scale", metavar="X", help="2 computes a pixel between every two."),
    ] = 1.0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Draw the picture that an .inr directory holds, at any size."""
    refuse_existing(output, overwrite=overwrite)

    from postlude import _front_door

    pixels = _front_door.render(inr, output, scale=scale, device=device)
    height, width, channels = pixels.shape
    return Result({"output": output, "size": [width, height], "channels": channels})
