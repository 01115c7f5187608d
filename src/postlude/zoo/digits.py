"""The 8 x 8 handwritten digits that come with scikit-learn (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.errors import MissingDependencyError

__all__ = ["digits"]


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 images ``[1797, 1, 8, 8]`` in [-1, 1], float32, and their labels ``[1797]``.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "The images of digits come with scikit-learn, which is not installed: "
            "pip install 'postlude[diffusion]'"
        ) from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    return images, torch.tensor(found.target, dtype=torch.long)
