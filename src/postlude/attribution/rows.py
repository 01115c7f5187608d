"""Gradients of one layer of some examples in memory, with the few products that scoring is made of.

Either low-rank factors (:class:`FactorRows`) or the matrices themselves (:class:`DenseRows`), in fp32 or fp64; products
of either with either.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

__all__ = ["DenseRows", "FactorRows", "Rows"]


class Rows(ABC):
    """Gradients of one layer of some examples, ``n`` matrices ``G [d1, d2]`` in fp32 or fp64."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def dense(self) -> Tensor:
        """``[n, d1, d2]``."""

    @abstractmethod
    def against(self, matrices: Tensor) -> Tensor:
        """``[m, n]`` Frobenius products with ``[m, d1, d2]``."""

    @abstractmethod
    def products(self, other: Rows) -> Tensor:
        """``[len(self), len(other)]`` Frobenius products."""

    @abstractmethod
    def energies(self) -> Tensor:
        """``[n]`` squared Frobenius norms."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """Times a number."""

    def double(self) -> Self:
        """The same in fp64."""
        return self._map(Tensor.double)

    def flat(self) -> Tensor:
        """``[n, d1 * d2]``, row-major."""
        return self.dense().flatten(1)

    def take(self, which: slice | Sequence[int]) -> Self:
        """Some of them."""
        chosen = which if isinstance(which, slice) else list(which)
        return self._map(lambda one: one[chosen])

    def followed_by(self, others: Sequence[Self]) -> Self:
        """These and others of the same kind, in order."""
        fields = [vars(one) for one in (self, *others)]
        return type(self)(
            **{
                name: None if value is None else torch.cat([one[name] for one in fields])
                for name, value in vars(self).items()
            }
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            **{name: None if x is None else change(x) for name, x in vars(self).items()}
        )


@dataclasses.dataclass(frozen=True)
class FactorRows(Rows):
    """``G_i = sum_x scale[i, x] * outer(u[i, x], v[i, x])``.

    Attributes:
        u: ``[n, c, d1]``.
        v: ``[n, c, d2]``.
        scale: ``[n, c]``, or None for ones. Stored codes are multiplied by it after a product, not before.
    """

    u: Tensor
    v: Tensor
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.u)

    def dense(self) -> Tensor:
        return self._scaled().mT @ self.v

    def against(self, matrices: Tensor) -> Tensor:
        n, c, d1 = self.u.shape
        m, _, d2 = matrices.shape
        left, right = self.u.reshape(n * c, d1), self.v.reshape(n * c, d2)
        found = [torch.linalg.vecdot(left @ one, right) for one in matrices]
        stacked = torch.stack(found) if found else left.new_zeros(0, n * c)
        if self.scale is not None:
            stacked *= self.scale.flatten()
        return stacked if c == 1 else stacked.view(m, n, c).sum(-1)

    def products(self, other: Rows) -> Tensor:
        if not isinstance(other, FactorRows):
            return other.products(self).mT
        (n, c, d1), (m, k, _) = self.u.shape, other.u.shape
        found = self.u.reshape(n * c, d1) @ other.u.reshape(m * k, d1).mT
        found *= self.v.reshape(n * c, -1) @ other.v.reshape(m * k, -1).mT
        if self.scale is not None:
            found *= self.scale.reshape(n * c, 1)
        if other.scale is not None:
            found *= other.scale.reshape(1, m * k)
        return found if c == k == 1 else found.view(n, c, m, k).sum((1, 3))

    def energies(self) -> Tensor:
        u = self._scaled()
        return ((u @ u.mT) * (self.v @ self.v.mT)).sum((1, 2))

    def scaled(self, factor: float) -> FactorRows:
        return dataclasses.replace(self, u=self.u * factor)

    def _scaled(self) -> Tensor:
        return self.u if self.scale is None else self.u * self.scale.unsqueeze(-1)


@dataclasses.dataclass(frozen=True)
class DenseRows(Rows):
    """Gradients as they are, ``[n, d1, d2]``."""

    g: Tensor

    def __len__(self) -> int:
        return len(self.g)

    def dense(self) -> Tensor:
        return self.g

    def against(self, matrices: Tensor) -> Tensor:
        return matrices.flatten(1).to(self.g) @ self.g.flatten(1).mT

    def products(self, other: Rows) -> Tensor:
        if isinstance(other, DenseRows):
            return self.g.flatten(1) @ other.g.flatten(1).mT
        return other.against(self.g)

    def energies(self) -> Tensor:
        return self.g.square().sum((1, 2))

    def scaled(self, factor: float) -> DenseRows:
        return DenseRows(self.g * factor)
