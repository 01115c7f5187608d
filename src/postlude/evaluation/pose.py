"""How well a network reads the pose of a spacecraft: the scores of the SPEED challenges, also by distance.

The network sees crops of the boxes in the labels. The direction that turns its apparent rotation into the camera's is
that of the translation it predicts, so a wrong translation costs rotation too, as it does in use.

An exported network (.onnx) holds the same formulas; it is given crops and boxes, and runs in ONNX Runtime.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postlude.errors import CheckpointError, DataError, MissingDependencyError, NonFiniteError
from postlude.evaluation.size import size_of
from postlude.runs.checkpoint import Checkpoint
from postlude.zoo.fastpose_vit.augmentation import turned_crops
from postlude.zoo.fastpose_vit.data import PoseData, load
from postlude.zoo.fastpose_vit.metrics import SPEED_PLUS, PoseErrors, pose_errors
from postlude.zoo.fastpose_vit.network import pose_of
from postlude.zoo.fastpose_vit.training import predict

__all__ = ["EDGES", "constant_pose", "evaluate_pose", "onnx_poses", "summary"]

EDGES = (5.0, 10.0, 20.0, 30.0)
"""Where one range of distances ends and the next begins, in metres."""


def evaluate_pose(
    model: Checkpoint | str | os.PathLike[str],
    data: PoseData | str | os.PathLike[str],
    *,
    limit: int | None = None,
    edges: Sequence[float] = EDGES,
) -> dict[str, Any]:
    """Errors of the poses that a network predicts.

    Args:
        model: a loaded checkpoint, or the path of an exported ``.onnx`` file.
        data: a loaded set; or a folder or list of labels, see :func:`postlude.zoo.fastpose_vit.data.load`.
        limit: judge this many pictures, from the first one.
        edges: distances in metres at which ranges end.

    Returns:
        ``e_t`` (relative translation error) and ``e_r_degrees``, means and, with ``_median``, medians; ``metres``, the
        mean translation error; ``score`` (mean of ``e_t`` plus the rotation error in radians), ``score_speed_plus``
        (the same with errors below that challenge's thresholds counted as none); ``pictures``; ``target``, the
        rotation that the network predicts; ``constant_pose``, the ``score`` of always answering the mean position and
        the mean attitude of these pictures, which sees nothing; ``by_distance``, a row for each range; ``bytes`` and,
        of a checkpoint, ``bits_per_weight``.

    Raises:
        DataError: labels or images that cannot be used.
        ArchitectureError: the checkpoint predicts no poses.
        CheckpointError: the .onnx file is no exported pose network.
        NonFiniteError: the network computes NaN or infinity.
    """
    if isinstance(model, Checkpoint):
        found, camera = pose_of(model.model)
        target: str = found
        data = _read(data, limit)
        if data.camera != camera:
            raise DataError(
                f"the network was trained for {camera}, and the pictures are of {data.camera}: train one on pictures "
                "of this camera, or correct camera.json"
            )
        translation, rotation = predict(model.model, data)
        size: dict[str, Any] = {**size_of(model)}
    else:
        data = _read(data, limit)
        translation, rotation, target = onnx_poses(model, data)
        size = {"bytes": Path(model).stat().st_size}
    if not bool(translation.isfinite().all() and rotation.isfinite().all()):
        raise NonFiniteError("the network computes NaN or infinity: load it in float32")
    errors = pose_errors(translation, rotation, data.translations, data.rotations)
    return {
        **summary(errors),
        "score_speed_plus": errors.score(SPEED_PLUS),
        "constant_pose": constant_pose(data).score(),
        "pictures": len(data),
        "target": target,
        "by_distance": _by_distance(errors, edges),
        **size,
    }


def _read(data: PoseData | str | os.PathLike[str], limit: int | None) -> PoseData:
    if isinstance(data, PoseData):
        return data.take(slice(0, limit))
    return load(data, limit=limit)


def summary(errors: PoseErrors) -> dict[str, float]:
    """Means and medians of errors."""
    return {
        "e_t": float(errors.relative_translation.mean()),
        "e_t_median": float(errors.relative_translation.median()),
        "metres": float(errors.translation.mean()),
        "e_r_degrees": math.degrees(float(errors.rotation.mean())),
        "e_r_degrees_median": math.degrees(float(errors.rotation.median())),
        "score": errors.score(),
    }


def constant_pose(data: PoseData) -> PoseErrors:
    """Errors of one pose for all pictures: their mean position, and the rotation nearest to their mean attitude.

    The nearest rotation maximises the sum of ``trace(R_i^T R)``, the chordal mean of the attitudes.
    """
    u, _, vh = torch.linalg.svd(data.rotations.mean(0))
    sign = torch.ones(3, dtype=u.dtype)
    sign[2] = torch.det(u @ vh).sign()
    mean = data.translations.mean(0).expand_as(data.translations)
    attitude = ((u * sign) @ vh).expand_as(data.rotations)
    return pose_errors(mean, attitude, data.translations, data.rotations)


def _by_distance(errors: PoseErrors, edges: Sequence[float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    limits = [0.0, *edges, math.inf]
    for low, high in itertools.pairwise(limits):
        chosen = (errors.distance >= low) & (errors.distance < high)
        if not bool(chosen.any()):
            continue
        rows.append(
            {
                "from_metres": low,
                "to_metres": high if math.isfinite(high) else float(errors.distance.max()),
                "pictures": int(chosen.sum()),
                "e_t": float(errors.relative_translation[chosen].mean()),
                "metres": float(errors.translation[chosen].mean()),
                "e_r_degrees": math.degrees(float(errors.rotation[chosen].mean())),
            }
        )
    return rows


def onnx_poses(
    path: str | os.PathLike[str], data: PoseData, batch: int = 64
) -> tuple[Tensor, Tensor, str]:
    """Translations, rotations and the target of an exported pose network.

    Raises:
        CheckpointError: the file is not there, or is another graph.
        MissingDependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors
    except ImportError as error:
        raise MissingDependencyError(
            "a .onnx file runs in onnxruntime: pip install 'postlude[edge]'"
        ) from error
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}; expected an exported pose network (.onnx)")
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
    ) as error:
        raise CheckpointError(f"ONNX Runtime cannot load {file}: {error}") from error
    inputs = {one.name: one for one in session.get_inputs()}
    outputs = [one.name for one in session.get_outputs()]
    if set(inputs) != {"pixel_values", "boxes"} or outputs != ["translation", "rotation"]:
        raise CheckpointError(
            f"{file} reads {', '.join(inputs)} and computes {', '.join(outputs)}; expected an exported pose network, "
            "which reads pixel_values and boxes and computes translation and rotation (postlude export --to onnx)"
        )
    size = int(inputs["pixel_values"].shape[-1])
    narrow = np.float16 if "float16" in inputs["pixel_values"].type else np.float32
    found: list[list[Any]] = []
    for part in torch.arange(len(data)).split(batch):
        chosen = data.take(part)
        feed = {
            "pixel_values": turned_crops(chosen, size).pixels.numpy().astype(narrow),
            "boxes": chosen.boxes.float().numpy(),
        }
        found.append(session.run(outputs, feed))
    translation, rotation = (
        torch.from_numpy(np.concatenate([part[i] for part in found])).double() for i in (0, 1)
    )
    target = session.get_modelmeta().custom_metadata_map.get("target", "")
    return translation, rotation, target
