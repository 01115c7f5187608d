"""The scores of the Spacecraft Pose Estimation Challenges (SPEED 2019, SPEED+ 2021).

    e_t = |t_hat - t| / |t|        E_R = 2 arccos |q_hat . q|        score = mean(e_t + E_R), E_R in radians

SPEED has no threshold. SPEED+ counts an ``e_t`` below 0.002173 and an ``E_R`` below 0.169 degrees as 0, the accuracy
of its own labels (second-hand; the values were not found in the organisers' code).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from postlude.zoo.fastpose_vit.rotation import angle_between

__all__ = ["SPEED_PLUS", "PoseErrors", "Thresholds", "pose_errors"]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Errors that count as none: relative translation, and rotation in degrees."""

    translation: float = 0.0
    rotation_degrees: float = 0.0


SPEED_PLUS = Thresholds(2.173e-3, 0.169)


@dataclasses.dataclass(frozen=True)
class PoseErrors:
    """Errors of poses, each ``[n]``.

    Attributes:
        relative_translation: ``e_t``.
        translation: in metres.
        rotation: ``E_R`` in radians.
        distance: of the true body, in metres.
    """

    relative_translation: Tensor
    translation: Tensor
    rotation: Tensor
    distance: Tensor

    def score(self, thresholds: Thresholds | None = None) -> float:
        """``mean(e_t + E_R)``, errors below the thresholds counted as 0."""
        limits = thresholds or Thresholds()
        shift, turn = self.relative_translation, self.rotation
        shift = torch.where(shift < limits.translation, 0.0, shift)
        turn = torch.where(turn < math.radians(limits.rotation_degrees), 0.0, turn)
        return float((shift + turn).mean())


def pose_errors(
    translation_hat: Tensor, rotation_hat: Tensor, translation: Tensor, rotation: Tensor
) -> PoseErrors:
    """Errors of predicted poses: translations ``[n, 3]`` in metres, rotations ``[n, 3, 3]``."""
    distance = translation.norm(dim=-1)
    off = (translation_hat - translation).norm(dim=-1)
    return PoseErrors(off / distance, off, angle_between(rotation_hat, rotation), distance)
