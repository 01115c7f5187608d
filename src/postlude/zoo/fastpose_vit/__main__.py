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

_SHAPE = {
    "model_type": "type of the vision transformer: vit, deit or dinov2",
    "image_size": "pixels of a side of the crops that it reads",
    "patch": "pixels of a side of a patch; divides --image-size",
    "width": "numbers of a token",
    "depth": "blocks",
    "heads": "heads of attention; divide --width",
}
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
        result |= {**recipe["validation"], "measured_on": str(beside)}
    save(model, options.out, recipe, overwrite=options.overwrite)
    return result


def _lines(result: dict[str, Any]) -> list[str]:
    """A result for a person."""
    if "measured_on" not in result:
        return [f"{name}: {value}" for name, value in result.items()]
    return [
        f"{result['out']}: trained in {result['seconds']} s",
        f"on {result['measured_on']}: score {result['score']:.4f}, e_t {result['e_t']:.4f} (translation error over "
        f"distance), rotation error {result['e_r_degrees']:.2f} degrees (median {result['e_r_degrees_median']:.2f})",
    ]


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
        "--size",
        type=int,
        default=96,
        help="pixels of a side of the stored windows (default %(default)s)",
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
    command.add_argument(
        "--epochs",
        type=int,
        default=Training().epochs,
        help="passes over the pictures (default %(default)s)",
    )
    command.add_argument(
        "--batch",
        type=int,
        default=Training().batch,
        help="pictures of a step (default %(default)s)",
    )
    command.add_argument(
        "--limit", type=int, default=None, help="use the first so many pictures (default: all)"
    )
    command.add_argument(
        "--target",
        choices=("apparent", "camera"),
        default="apparent",
        help="the rotation that is learned: the one a camera turned towards the body would see, or the camera's own "
        "(default %(default)s)",
    )
    command.add_argument(
        "--backbone",
        type=Path,
        help="directory of a pretrained image model; its shape then holds, and the options below do not",
    )
    for field in dataclasses.fields(Backbone):
        name, default = field.name.replace("_", "-"), field.default
        explained = f"{_SHAPE[field.name]} (default %(default)s)"
        command.add_argument(f"--{name}", type=type(default), default=default, help=explained)
    command.add_argument("--device", default="cpu", help="to train on (default %(default)s)")
    command.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is there already"
    )
    of = {"data": "folder of the three sets", "train": "directory of the checkpoint"}
    for name, command in commands.choices.items():
        command.add_argument("-o", "--out", type=Path, required=True, help=of[name])
        command.add_argument(
            "--seed", type=int, default=0, help="of every random choice (default %(default)s)"
        )
        command.add_argument("--json", action="store_true", help="print the result as JSON")
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
    print(json.dumps(result) if options.json else "\n".join(_lines(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
