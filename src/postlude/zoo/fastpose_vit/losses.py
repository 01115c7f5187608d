"""The loss of FastPose-ViT (arXiv:2512.09792): relative distances, one of the rotation and one of the translation.

    L = mean |r_hat - r| / |r| + mean |U_hat - U| / |U|

``r`` are the six numbers of the rotation before Gram-Schmidt, ``U`` the encoded translation. That the second acts on
``U`` and that both weigh the same is our choice; the authors' training loop was not read.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["pose_loss"]


def pose_loss(predicted: Tensor, encoded: Tensor, six: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms, of predictions ``[n, 9]`` (``U``, then the six) for ``[n, 3]`` and ``[n, 6]``."""
    translation = (predicted[:, :3] - encoded).norm(dim=-1) / encoded.norm(dim=-1)
    rotation = (predicted[:, 3:] - six).norm(dim=-1) / six.norm(dim=-1)
    return rotation.mean(), translation.mean()
