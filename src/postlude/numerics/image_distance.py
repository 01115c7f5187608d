"""Distances between sets of images, or of their features: the Frechet distance, and the peak signal-to-noise ratio.

    d = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)

is the squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982), the one behind FID (arXiv:1706.08500).
"""

from __future__ import annotations

import torch
from torch import Tensor

from postlude.errors import DataError

__all__ = ["frechet_distance", "gaussian_of", "psnr"]


def gaussian_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and unbiased covariance ``[d, d]`` of the rows of ``[n, d]``, in fp64.

    Raises:
        DataError: fewer than two rows, or one that is not finite.
    """
    rows = features.double()
    if rows.ndim != 2 or len(rows) < 2:
        raise DataError(
            f"a covariance needs two rows or more of a matrix [n, d]; found the shape {list(features.shape)}"
        )
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(1).sum())
        raise DataError(
            f"{bad} of {len(rows)} samples hold NaN or infinity; the model or its sampler diverged"
        )
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Squared Wasserstein distance of two Gaussians, each a mean ``[d]`` and a covariance ``[d, d]``; 0 if equal.

    The trace of the square root comes from two symmetric eigen-decompositions in fp64, so singular covariances
    (pixels that never change) are no trouble and the result is real.

    Raises:
        DataError: the two are of different widths.
    """
    (mean_a, cov_a), (mean_b, cov_b) = (tuple(t.double() for t in one) for one in (first, second))
    if cov_a.shape != cov_b.shape:
        raise DataError(
            f"features of {len(mean_a)} and of {len(mean_b)} numbers have no distance; expected the same features"
        )
    root = _root(cov_a)
    between = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0.0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * between
    return max(0.0, float(distance))


def psnr(images: Tensor, reference: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of every image in decibel, ``10 log10(peak^2 / mse)``, ``[n]``, fp64.

    Args:
        images, reference: ``[n, ...]``.
        peak: the range of the values: 2 for images in [-1, 1].

    Returns:
        Infinity where the two are equal.
    """
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10.0 * (peak * peak / error).log10()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2.0)
    root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root
