"""What networks of coordinates are made of: a linear layer with a gain, its complex twin, an encoding of positions.

Weights are drawn from a generator that is given; nothing reads a global state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ComplexDense", "Dense", "PositionEncoding", "siren_layer"]


class Dense(nn.Module):
    """``y = gain * (W x + b)``.

    The gain is in the forward pass and not in the stored weight, so the step of an optimiser acts on numbers of
    the stored size: that is how SIREN (arXiv:2006.09661) and SMN (arXiv:2602.16337) are trained.

    Args:
        in_features, out_features: sizes.
        generator: draws the weights.
        gain: factor in front of everything.
        bound: weights are drawn from ``U(-bound, bound)``; ``1 / sqrt(in_features)`` (PyTorch's) by default.
        bias: bound of the biases, 0 to start at zero; None for a layer without.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
        *,
        gain: float = 1.0,
        bound: float | None = None,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        self.gain = gain
        usual = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(
            _uniform((out_features, in_features), usual if bound is None else bound, generator)
        )
        self.bias = (
            None if bias is None else nn.Parameter(_uniform((out_features,), bias, generator))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        y = functional.linear(x, self.weight, self.bias)
        return y if self.gain == 1 else self.gain * y

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, gain={self.gain:g}, bias={self.bias is not None}"


class ComplexDense(nn.Module):
    """``y = W x + b`` with complex ``W``, ``b``, kept as real tensors of their real and imaginary parts.

    Args:
        in_features, out_features: sizes.
        generator: draws both parts from ``U(-1/sqrt(in_features), ..)``, as PyTorch does for complex layers.
    """

    def __init__(self, in_features: int, out_features: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(_uniform((2, out_features, in_features), bound, generator))
        self.bias = nn.Parameter(_uniform((2, out_features), bound, generator))

    def forward(self, x: Tensor) -> Tensor:
        """Complex ``[..., in_features]`` to complex ``[..., out_features]``."""
        weight, bias = (torch.complex(part[0], part[1]) for part in (self.weight, self.bias))
        return functional.linear(x, weight, bias)


class PositionEncoding(nn.Module):
    """``x -> [x, sin(2^k x), cos(2^k x)]``, ``k = 0 .. frequencies - 1`` (NeRF, arXiv:2003.08934; no factor pi).

    Args:
        in_features: of ``x``.
        frequencies: how many octaves; 0 hands ``x`` through.
    """

    def __init__(self, in_features: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.out_features = in_features * (1 + 2 * frequencies)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        waves = [x]
        for k in range(self.frequencies):
            waves += [torch.sin(2**k * x), torch.cos(2**k * x)]
        return torch.cat(waves, dim=-1)


def siren_layer(inputs: int, outputs: int, omega: float, generator: torch.Generator) -> Dense:
    """A hidden layer of SIREN with its start: outputs before the sine have unit variance."""
    bound = math.sqrt(6 / inputs) / omega
    return Dense(inputs, outputs, generator, gain=omega, bound=bound, bias=1 / math.sqrt(inputs))


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator) - 1) * bound
