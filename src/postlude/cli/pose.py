"""``postlude evaluate pose``: how well a network reads the pose of a spacecraft."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postlude.cli import _options as options
from postlude.cli._output import Result, number_table, refuse_existing, write_json
from postlude.errors import SettingsError

__all__ = ["pose"]


def pose(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A pose network: the directory, float or quantized, or an exported .onnx file.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Pictures with poses: made by `python -m postlude.zoo.fastpose_vit data`, or in the layout of SPEED.",
            show_default=False,
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="Judge the first N pictures only."),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: options.NewFile = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> Result:
    """Translation and rotation errors of a network that reads a spacecraft's pose, and SPEED's score."""
    refuse_existing(output, overwrite=overwrite)

    from postlude import _front_door

    model: Any = checkpoint
    if checkpoint.endswith(".onnx"):
        if device not in (None, "cpu") or dtype != "auto":
            given = "--dtype" if device in (None, "cpu") else "--device"
            raise SettingsError(
                f"{given} does not apply to {checkpoint}: ONNX Runtime runs it on the CPU, in the types that were "
                "exported. Leave the option out, or give the checkpoint's directory."
            )
    else:
        model = _front_door.load(checkpoint, dtype=dtype, device=device)
    result = _front_door.evaluate_pose(model, data, limit=limit, seed=seed)
    write_json(result, output, overwrite=overwrite)
    return Result(result, _view(result))


def _view(result: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.text import Text

    rows = [
        (f"{row['from_metres']:.0f} to {row['to_metres']:.0f} m", row)
        for row in result["by_distance"]
    ]
    table = number_table(
        ("distance", "pictures", "e_t", "error in metres", "rotation error"),
        [
            (
                name,
                str(row["pictures"]),
                f"{row['e_t']:.4f}",
                f"{row['metres']:.3f}",
                f"{row['e_r_degrees']:.2f}°",
            )
            for name, row in (*rows, ("all", result))
        ],
    )
    lines = (
        f"score {result['score']:.4f} (mean of e_t and the rotation error in radians; SPEED+ thresholds: "
        f"{result['score_speed_plus']:.4f})",
        f"a constant pose (mean position and attitude of these pictures) scores {result['constant_pose']:.4f}",
        f"medians: e_t {result['e_t_median']:.4f}, rotation {result['e_r_degrees_median']:.2f}°",
        f"{result['bytes']:,} bytes; {result['seconds']:.3g} s",
    )
    return Group(table, "", *map(Text, lines))
