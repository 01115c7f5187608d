"""Sets of pictures with poses, in folders laid out as SPEED and SPEED+ are.

A set is a JSON list of labels beside a folder ``images``::

    {"filename": "img000001.png", "q_vbs2tango_true": [w, x, y, z], "r_Vo2To_vbs_true": [x, y, z]}

SPEED writes ``q_vbs2tango`` for the first, and has one folder of images for each list (``train.json``:
``images/train``). Two more keys are ours: ``box``, ``[x1, y1, x2, y2]`` in pixels of the camera's image (where it is
absent the box is the one around the projected key points), and ``window``, the part of the camera's image that the
file shows (where it is absent: all of it). What is made here stores windows, because 5,000 images of 1920 x 1200 would
be 11 GB of black.

``camera.json`` and ``keypoints.json``, beside the list or one folder up, describe camera and body.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postlude.errors import DataError, OutputExistsError
from postlude.zoo.fastpose_vit.camera import SPEED, Camera, box_of, check_boxes, project
from postlude.zoo.fastpose_vit.rotation import (
    matrix_of_quaternion,
    quaternion_of_matrix,
)
from postlude.zoo.fastpose_vit.spacecraft import find_tango, read_keypoints

__all__ = [
    "LABELS",
    "PoseData",
    "count",
    "holds_poses",
    "load",
    "whole_pixels",
    "window_of",
    "write",
]

LABELS = "labels.json"
_MARGIN = 1.3  # of the window around the box, so that a shaken or turned box stays inside
_QUATERNION = ("q_vbs2tango_true", "q_vbs2tango")
_TRANSLATION = ("r_Vo2To_vbs_true", "r_Vo2To_vbs")


@dataclasses.dataclass(frozen=True)
class PoseData:
    """Pictures with poses.

    Attributes:
        images: ``uint8 [n, size, size]``, square windows of the camera's image; what lies outside of it is 0.
        windows: ``float64 [n, 4]``, what each of them shows, in pixels of the camera's image.
        boxes: ``float64 [n, 4]``.
        rotations: ``float64 [n, 3, 3]``, body to camera.
        translations: ``float64 [n, 3]`` in metres.
        keypoints: ``float64 [points, 3]``, or None where boxes came with the labels and nobody knows the points.
        camera: of all of them.
        names: of the files.
    """

    images: Tensor
    windows: Tensor
    boxes: Tensor
    rotations: Tensor
    translations: Tensor
    keypoints: Tensor | None
    camera: Camera
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int] | Tensor | slice) -> PoseData:
        """Some of the pictures."""
        chosen = torch.arange(len(self))[
            indices if isinstance(indices, slice) else torch.as_tensor(indices)
        ]
        tensors = {
            name: getattr(self, name)[chosen]
            for name in ("images", "windows", "boxes", "rotations", "translations")
        }
        return dataclasses.replace(
            self, **tensors, names=tuple(self.names[i] for i in chosen.tolist())
        )


def whole_pixels(box: Tensor) -> Tensor:
    """Boxes ``[..., 4]`` that end at whole pixels."""
    return torch.cat([box[..., :2].floor(), box[..., 2:].ceil()], dim=-1)


def window_of(box: Tensor) -> Tensor:
    """The square windows ``[n, 4]`` that are kept of the image around boxes."""
    middle = (box[:, :2] + box[:, 2:]) / 2
    half = (box[:, 2:] - box[:, :2]).amax(-1, keepdim=True) * _MARGIN / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def write(data: PoseData, out: Path, name: str = "") -> None:
    """Write a set as ``out/labels.json`` and ``out/images``.

    Raises:
        OutputExistsError: ``out`` holds labels.
    """
    from PIL import Image

    if (out / LABELS).exists():
        raise OutputExistsError(f"{out} holds a data set; choose another folder or remove it")
    (out / "images").mkdir(parents=True, exist_ok=True)
    quaternions = quaternion_of_matrix(data.rotations)
    labels = []
    for i, file in enumerate(data.names):
        Image.fromarray(data.images[i].numpy()).save(out / "images" / file, compress_level=1)
        labels.append(
            {
                "filename": file,
                "q_vbs2tango_true": quaternions[i].tolist(),
                "r_Vo2To_vbs_true": data.translations[i].tolist(),
                "box": data.boxes[i].tolist(),
                "window": data.windows[i].tolist(),
            }
        )
    camera = data.camera
    described = {
        "Nu": camera.width,
        "Nv": camera.height,
        "cameraMatrix": camera.matrix().tolist(),
        "distCoeffs": [0.0] * 5,
    }
    (out / "camera.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    if data.keypoints is not None:
        points = {"name": name, "keypoints": data.keypoints.tolist()}
        (out / "keypoints.json").write_text(json.dumps(points) + "\n", encoding="utf-8")
    # The labels last: a folder with labels is whole.
    lines = ",\n".join(json.dumps(label) for label in labels)
    (out / LABELS).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- reading


def holds_poses(path: str | os.PathLike[str]) -> bool:
    """Whether a folder or file looks like a set, a list of labels beside images, or like a folder of sets.

    :func:`load` refuses the second, naming the sets: which of them is meant is not for it to choose.
    """
    folder = Path(path)
    listed = (folder / LABELS).is_file() or folder.suffix == ".json" or bool(_lists(folder))
    return listed or bool(_inner(folder))


def load(
    path: str | os.PathLike[str],
    *,
    size: int = 96,
    limit: int | None = None,
    drawn: Sequence[int] | None = None,
) -> PoseData:
    """Read a set.

    Args:
        path: a list of labels, or a folder that holds one (``labels.json``, or a single other ``.json`` list).
        size: pixels of a side of the windows that are kept of every image.
        limit: read this many, from the first one.
        drawn: read the images of these labels only; by default of all.

    Raises:
        DataError: no labels, a label that lacks a field or whose quaternion has not length 1 (by its index), an image
            that cannot be read, a box that is empty, wholly outside the image or beside the body, or boxes that cannot
            be made for want of key points.
    """
    file = _labels_file(Path(path))
    labels = _read_json(file)
    if not isinstance(labels, list) or not labels:
        raise DataError(f"{file} holds no list of labels; expected a JSON list of objects")
    labels = labels[:limit]
    camera = _camera(file.parent)
    rotations, translations = _poses(labels, file)
    points = _keypoints(file.parent)
    boxes = _boxes(labels, rotations, translations, points, camera, file)
    images, windows = [], []
    chosen = range(len(labels)) if drawn is None else drawn
    for index in chosen:
        picture, window = _picture(labels[index], boxes[index], camera, file, index, size)
        images.append(picture)
        windows.append(window)
    return PoseData(
        torch.from_numpy(np.stack(images)),
        torch.stack(windows),
        boxes[list(chosen)],
        rotations[list(chosen)],
        translations[list(chosen)],
        points,
        camera,
        tuple(str(labels[index]["filename"]) for index in chosen),
    )


def count(path: str | os.PathLike[str]) -> int:
    """How many labels a set has."""
    labels = _read_json(_labels_file(Path(path)))
    return len(labels) if isinstance(labels, list) else 0


def _labels_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"there is no folder or file {path}; expected a data set with {LABELS}")
    if (path / LABELS).is_file():
        return path / LABELS
    lists = _lists(path)
    if len(lists) == 1:
        return lists[0]
    if lists:
        names = ", ".join(f.name for f in lists)
        raise DataError(f"{path} holds several lists of labels ({names}); give the path of one")
    inner = _inner(path)
    advice = (
        f"; it has data sets below it: {', '.join(inner)}. Give the path of one" if inner else ""
    )
    raise DataError(f"{path} holds no {LABELS}{advice}")


def _inner(folder: Path) -> list[str]:
    return [file.parent.name for file in sorted(folder.glob(f"*/{LABELS}"))]


def _lists(folder: Path) -> list[Path]:
    found = [f for f in sorted(folder.glob("*.json")) if f.stem not in ("camera", "keypoints")]
    return found if (folder / "images").is_dir() else []


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error


def _beside(folder: Path, name: str) -> Path | None:
    return next((f for f in (folder / name, folder.parent / name) if f.is_file()), None)


def _camera(folder: Path) -> Camera:
    """``camera.json`` as SPEED+ writes it; SPEED's camera where there is none."""
    file = _beside(folder, "camera.json")
    if file is None:
        return SPEED
    found = _read_json(file)
    try:
        matrix = found["cameraMatrix"]
        fx, fy, cx, cy = (float(matrix[r][c]) for r, c in ((0, 0), (1, 1), (0, 2), (1, 2)))
        return Camera(fx, fy, cx, cy, int(found["Nu"]), int(found["Nv"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} does not describe a camera ({type(error).__name__}: {error}); expected Nu, Nv and cameraMatrix"
        ) from error


def _keypoints(folder: Path) -> Tensor | None:
    file = _beside(folder, "keypoints.json")
    if file is not None:
        try:
            points = torch.tensor(_read_json(file)["keypoints"], dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file} holds no key points ({error}); expected keypoints [n][3]"
            ) from error
        if points.ndim != 2 or points.shape[1] != 3:
            raise DataError(f"{file}: key points have shape {list(points.shape)}; expected [n, 3]")
        return points
    tango = find_tango()
    return None if tango is None else torch.from_numpy(read_keypoints(tango).keypoints)


def _numbers(label: Any, names: Sequence[str], length: int, file: Path, index: int) -> list[float]:
    where = f"label {index} of {file}"
    if not isinstance(label, dict):
        raise DataError(f"{where} is a {type(label).__name__}; expected an object")
    name = next((name for name in names if name in label), None)
    if name is None:
        raise DataError(
            f"{where} has no {names[0]}; it has {', '.join(map(repr, label)) or 'nothing'}"
        )
    value = label[name]
    numbers = isinstance(value, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )
    if not numbers or len(value) != length:
        raise DataError(f"{where}: {name} is {value!r}; expected {length} finite numbers")
    return [float(v) for v in value]


def _poses(labels: list[Any], file: Path) -> tuple[Tensor, Tensor]:
    quaternions, translations = [], []
    for index, label in enumerate(labels):
        quaternion = _numbers(label, _QUATERNION, 4, file, index)
        length = math.sqrt(math.fsum(v * v for v in quaternion))
        if abs(length - 1) > 1e-3:
            raise DataError(
                f"label {index} of {file}: the quaternion {quaternion} has length {length:.6g}; expected 1"
            )
        quaternions.append([v / length for v in quaternion])
        translation = _numbers(label, _TRANSLATION, 3, file, index)
        if translation[2] <= 0:
            raise DataError(
                f"label {index} of {file}: the body is {translation[2]:g} m before the camera; expected more than 0"
            )
        translations.append(translation)
        if not isinstance(label.get("filename"), str):
            raise DataError(
                f"label {index} of {file} has no filename; expected the name of its image"
            )
    rotations = matrix_of_quaternion(torch.tensor(quaternions, dtype=torch.float64))
    return rotations, torch.tensor(translations, dtype=torch.float64)


def _boxes(
    labels: list[Any],
    rotations: Tensor,
    translations: Tensor,
    points: Tensor | None,
    camera: Camera,
    file: Path,
) -> Tensor:
    if all("box" in label for label in labels):
        found = [_numbers(label, ("box",), 4, file, i) for i, label in enumerate(labels)]
        boxes = torch.tensor(found, dtype=torch.float64)
        check_boxes(boxes, camera, [str(label["filename"]) for label in labels])
        if points is not None:
            _check_shows(boxes, box_of(project(points, rotations, translations, camera)), file)
        return boxes
    if points is None:
        raise DataError(
            f"{file} has labels without a box, and the key points it could be made of are not there: put "
            "keypoints.json beside it, or set POSTLUDE_DATA to a folder with space/tangoPoints.mat"
        )
    boxes = whole_pixels(box_of(project(points, rotations, translations, camera)))
    shown = torch.tensor([camera.width, camera.height], dtype=torch.float64)
    clipped = torch.cat([boxes[:, :2].clamp(min=0), torch.minimum(boxes[:, 2:], shown)], dim=-1)
    # What lies outside altogether stays as it is, to be refused below in its own numbers.
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(-1, keepdim=True)
    boxes = torch.where(empty, boxes, clipped)
    check_boxes(boxes, camera, [str(label["filename"]) for label in labels])
    return boxes


def _check_shows(boxes: Tensor, bodies: Tensor, file: Path) -> None:
    """Refuse boxes of labels that share no pixel with the boxes around the projected key points."""
    low, high = (
        torch.maximum(boxes[:, :2], bodies[:, :2]),
        torch.minimum(boxes[:, 2:], bodies[:, 2:]),
    )
    misses = (low > high).any(-1)
    if not bool(misses.any()):
        return
    index = int(misses.nonzero()[0])
    box, body = (", ".join(f"{v:.6g}" for v in part[index].tolist()) for part in (boxes, bodies))
    raise DataError(
        f"label {index} of {file}: the box ({box}) misses the body, whose key points lie within ({body}) by its "
        "pose; expected a box around the body. Correct box or pose, or leave the label out."
    )


def _picture(
    label: dict[str, Any], box: Tensor, camera: Camera, file: Path, index: int, size: int
) -> tuple[np.ndarray[Any, Any], Tensor]:
    """A window of ``size`` pixels around the box, and where it is."""
    from PIL import Image, UnidentifiedImageError

    name = label["filename"]
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(
            f"label {index} of {file} names the image {name!r}; expected one in {file.parent}"
        )
    places = [
        file.parent / "images" / name,
        file.parent / "images" / file.stem / name,
        file.parent / name,
    ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(f"label {index} of {file}: there is no image {name} in {places[0].parent}")
    try:
        with Image.open(found) as opened:
            image = opened.convert("L")
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(
            f"label {index} of {file}: {found} cannot be read as an image: {error}"
        ) from error
    if "window" in label:
        window = torch.tensor(_numbers(label, ("window",), 4, file, index), dtype=torch.float64)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BOX)
        return np.asarray(image), window
    if image.size != (camera.width, camera.height):
        raise DataError(
            f"label {index} of {file}: {name} has {image.size[0]} x {image.size[1]} pixels, and the camera "
            f"{camera.width} x {camera.height}; expected whole images, or a window in the label"
        )
    window = window_of(box[None])[0]
    # Cropping fills what lies outside of the image with 0.
    corners = [math.floor(v) for v in window[:2].tolist()] + [
        math.ceil(v) for v in window[2:].tolist()
    ]
    side = max(corners[2] - corners[0], corners[3] - corners[1])
    corners = [corners[0], corners[1], corners[0] + side, corners[1] + side]
    square = image.crop((corners[0], corners[1], corners[2], corners[3]))
    resampling = Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    picture = np.asarray(square.resize((size, size), resampling))
    return picture, torch.tensor(corners, dtype=torch.float64)
