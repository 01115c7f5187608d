"""Judge a network that reads poses."""

from __future__ import annotations

import os
import time
from typing import Any

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.evaluation.pose import evaluate_pose as _evaluate_pose
from postlude.runs.checkpoint import Checkpoint

__all__ = ["evaluate_pose"]


def evaluate_pose(
    checkpoint: Path_ | Checkpoint, data: Path_, *, limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Errors of the poses that a FastPose-ViT network sees in the pictures of a set.

    Args:
        checkpoint: loaded, or its directory; float or quantized. Or an exported ``.onnx`` file.
        data: a folder that ``python -m postlude.zoo.fastpose_vit data`` wrote, or one in the layout of SPEED.
        limit: judge this many pictures, from the first one.
        seed: taken for uniformity; nothing here is random.

    Returns:
        See :func:`postlude.evaluation.pose.evaluate_pose`; ``seconds`` is added.

    Raises:
        DataError: labels or images that cannot be used.
        ArchitectureError: the checkpoint predicts no poses.
        CheckpointError: neither a checkpoint nor an exported pose network.
    """
    started = time.perf_counter()
    exported = not isinstance(checkpoint, Checkpoint) and os.fspath(checkpoint).endswith(".onnx")
    model = checkpoint if exported else open_checkpoint(checkpoint)
    result = _evaluate_pose(model, data, limit=limit)
    return {**result, "seconds": time.perf_counter() - started}
