"""``python -m postlude.zoo.fastpose_vit``: make pictures with poses, train a network on them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from postlude.errors import DataError, PostludeError, SettingsError
from postlude.zoo.fastpose_vit import data as sets
from postlude.zoo.fastpose_vit.making import make
from postlude.zoo.fastpose_vit.metrics import PoseErrors
from postlude.zoo.fastpose_vit.network import Backbone, build
from postlude.zoo.fastpose_vit.spacecraft import (
    Spacecraft,
    find_tango,
    own_spacecraft,
    read_keypoints,
)
from postlude.zoo.fastpose_vit.training import Training, fit, measure, save

__all__ = ["main"]

# Parts of a set, in tenths.
_SPLITS = (("train", 8), ("validation", 1), ("test", 1))


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _spacecraft(choice: str) -> Spacecraft:
    if choice == "own":
        return own_spacecraft()
    if choice != "auto":
        return read_keypoints(choice)
    found = find_tango()
    return own_spacecraft() if found is None else read_keypoints(found)


def make_sets(options: argparse.Namespace) -> dict[str, Any]:
    """Write train, validation and test sets below one folder."""
    if options.n < 10:
        raise SettingsError(f"--n is {options.n}; expected 10 pictures or more, for three sets")
    if options.size < 16:
        raise SettingsError(f"--size is {options.size}; expected 16 pixels or more")
    body = _spacecraft(options.keypoints)
    _log(f"key points: {body.name}")
    begun = time.monotonic()

    def progress(done: int) -> None:
        if done % 500 == 0:
            _log(f"{done} of {options.n} pictures, {time.monotonic() - begun:.0f} s")

    whole = make(
        body,
        options.n,
        options.seed,
        size=options.size,
        attitudes=options.attitudes,
        progress=progress,
    )
    written, start = {}, 0
    for name, tenths in _SPLITS:
        stop = options.n if name == "test" else start + options.n * tenths // 10
        sets.write(whole.take(slice(start, stop)), options.out / name, body.name)
        written[name] = stop - start
        start = stop
    return {"out": str(options.out), "keypoints": body.name, "seed": options.seed, **written}


def _summary(errors: PoseErrors) -> dict[str, float]:
    return {
        "e_t": float(errors.relative_translation.mean()),
        "e_r_degrees": math.degrees(float(errors.rotation.mean())),
        "e_r_degrees_median": math.degrees(float(errors.rotation.median())),
        "score": errors.score(),
    }


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train on ``DATA/train``, or on DATA itself if it holds labels, and write a checkpoint."""
    folder: Path = options.data
    if (folder / "train" / sets.LABELS).is_file():
        folder = folder / "train"
    settings = dataclasses.replace(Training(), epochs=options.epochs, batch=options.batch)
    shape = Backbone(
        options.model_type,
        options.image_size,
        options.patch,
        options.width,
        options.depth,
        options.heads,
    )
    data = sets.load(folder, limit=options.limit)
    model = build(
        options.backbone or shape, options.seed, target=options.target, camera=data.camera
    )
    _log(f"{len(data)} pictures, {sum(p.numel() for p in model.parameters()):,} parameters")
    begun = time.monotonic()
    fit(model, data, settings, options.seed, device=options.device, log=_log)
    recipe = {
        "data": str(folder),
        "pictures": len(data),
        "seed": options.seed,
        "target": options.target,
        "training": dataclasses.asdict(settings),
        "seconds": round(time.monotonic() - begun),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    result = {"out": str(options.out), "seconds": recipe["seconds"]}
    beside = folder.parent / "validation"
    if (beside / sets.LABELS).is_file():
        recipe["validation"] = _summary(measure(model.to("cpu"), sets.load(beside)))
        result |= recipe["validation"]
    save(model, options.out, recipe, overwrite=options.overwrite)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m postlude.zoo.fastpose_vit", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "data", help="render pictures with poses: train, validation, test"
    )
    command.add_argument(
        "--n", type=int, default=5000, help="pictures in all (default %(default)s)"
    )
    command.add_argument(
        "--size", type=int, default=96, help="pixels of a side of the stored windows"
    )
    command.add_argument(
        "--attitudes",
        type=float,
        default=60.0,
        help="largest angle to one nominal attitude, in degrees (default %(default)s, which a tiny network learns in "
        "minutes; 180: every attitude)",
    )
    command.add_argument(
        "--keypoints",
        default="auto",
        help="own, or the path of tangoPoints.mat; auto (default): Tango where POSTLUDE_DATA has it, else own",
    )
    command = commands.add_parser("train", help="train a network and write a checkpoint")
    command.add_argument(
        "data", type=Path, help="folder of `data`, or a set in the layout of SPEED"
    )
    command.add_argument("--epochs", type=int, default=Training().epochs)
    command.add_argument("--batch", type=int, default=Training().batch)
    command.add_argument("--limit", type=int, default=None, help="use this many pictures")
    command.add_argument("--target", choices=("apparent", "camera"), default="apparent")
    command.add_argument("--backbone", type=Path, help="directory of a pretrained image model")
    for field in dataclasses.fields(Backbone):
        name, default = field.name.replace("_", "-"), field.default
        command.add_argument(f"--{name}", type=type(default), default=default)
    command.add_argument("--device", default="cpu")
    command.add_argument("--overwrite", action="store_true")
    for command in commands.choices.values():
        command.add_argument("-o", "--out", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_flush_denormal(True)
    try:
        if (
            options.command == "train"
            and (options.out / "config.json").exists()
            and not options.overwrite
        ):
            raise DataError(f"{options.out} holds a checkpoint; give --overwrite to replace it")
        result = (make_sets if options.command == "data" else train)(options)
    except PostludeError as error:
        print(f"postlude: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
