"""Curvature of a linear layer in Kronecker factors, with its eigenvalues corrected (EK-FAC).

For a layer ``y = x W`` with ``x [in_features]`` and per-example gradients ``G [in_features, out_features]``:

    A = E[x x^T],  S = E[dy dy^T],  A = Q_A diag(alpha) Q_A^T,  S = Q_S diag(beta) Q_S^T
    Lambda_ij = mean over examples of ((Q_A^T G Q_S)_ij)^2
    (H + lam)^-1 G = Q_A [ (Q_A^T G Q_S) / (Lambda + lam) ] Q_S^T

K-FAC (arXiv:1503.05671) has ``alpha beta^T`` in place of ``Lambda``; the corrected eigenvalues are those of
arXiv:1806.03884, as influence functions use them in arXiv:2308.03296. The scales of ``A`` and ``S`` then do not matter:
only their eigenvectors are used. With a basis of one-hot vectors it is the diagonal of the Fisher matrix.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = ["KroneckerBasis", "KroneckerCurvature", "low_rank"]


@dataclasses.dataclass(frozen=True)
class KroneckerBasis:
    """The eigenvectors ``Q_A [in_features, in_features]`` and ``Q_S [out_features, out_features]``."""

    inputs: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, input_moment: Tensor, output_moment: Tensor) -> KroneckerBasis:
        """From ``A`` and ``S`` or any multiples of them; eigenvectors in fp64, kept in the factors' dtype.

        Raises:
            DataError: a factor that is not finite.
        """
        for name, moment in (("input", input_moment), ("output", output_moment)):
            if not bool(torch.isfinite(moment).all()):
                raise DataError(
                    f"The {name} factor of the curvature holds NaN or infinity: check the model's gradients."
                )
        return cls(_eigenvectors(input_moment), _eigenvectors(output_moment))

    def to(self, device: torch.device | str) -> KroneckerBasis:
        """The same on a device."""
        return KroneckerBasis(self.inputs.to(device), self.outputs.to(device))

    def rotate(self, gradients: Tensor) -> Tensor:
        """``Q_A^T G Q_S`` of ``[..., in_features, out_features]``."""
        return self.inputs.T @ gradients @ self.outputs

    def rotate_back(self, rotated: Tensor) -> Tensor:
        """``Q_A R Q_S^T``."""
        return self.inputs @ rotated @ self.outputs.T


@dataclasses.dataclass(frozen=True)
class KroneckerCurvature:
    """A basis with the second moments of gradients in it.

    Attributes:
        basis: ``Q_A``, ``Q_S``.
        eigenvalues: ``Lambda [in_features, out_features]``.
        damping: ``lam``, added to every eigenvalue.
    """

    basis: KroneckerBasis
    eigenvalues: Tensor
    damping: float

    @classmethod
    def of(
        cls, basis: KroneckerBasis, eigenvalues: Tensor, damping: float | None
    ) -> KroneckerCurvature:
        """With ``lam = 0.1 mean(Lambda)`` where the damping is None.

        Raises:
            SettingsError: nothing would be left to divide by.
        """
        chosen = 0.1 * float(eigenvalues.double().mean()) if damping is None else damping
        if not chosen > 0 and not bool((eigenvalues > 0).all()):
            raise SettingsError(
                f"A damping of {chosen:g} leaves eigenvalues of zero to divide by: choose one above 0, "
                "or look whether the layer has any gradient."
            )
        return cls(basis, eigenvalues, chosen)

    def precondition(self, gradients: Tensor) -> Tensor:
        """``(H + lam)^-1 G`` of ``[..., in_features, out_features]``."""
        rotated = self.basis.rotate(gradients)
        return self.basis.rotate_back(rotated / (self.eigenvalues + self.damping))


def low_rank(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrices of this rank, as ``U [..., rows, rank]``, ``V [..., columns, rank]`` with ``M ~ U V^T``."""
    rank = min(rank, *matrices.shape[-2:])
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :].mT


def _eigenvectors(moment: Tensor) -> Tensor:
    moment = moment.double()
    vectors: Tensor = torch.linalg.eigh((moment + moment.T) / 2)[1]
    return vectors.float()
