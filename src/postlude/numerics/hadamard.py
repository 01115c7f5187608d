"""Hadamard matrices of many orders, and the fast transform by one.

Row vectors throughout: a rotation ``A`` acts as ``x @ A`` on the last axis.

A *Hadamard matrix* ``H`` of order ``n`` has entries +-1 and ``H @ H.T = n I``; ``H / sqrt(n)`` is orthogonal. Here

    hadamard(n) = core(K) (x) sylvester(n / K)            (x) is the Kronecker product

with the smallest known core ``K``, so the result depends on ``n`` alone. Cores, in order of preference:

* ``1``: the order is a power of two (Sylvester);
* Paley I: order ``q + 1`` for a prime power ``q = 3 mod 4``;
* Paley II: order ``2 (q + 1)`` for a prime power ``q = 1 mod 4``;
* the orders 92, 116, 156, 172, 188 and 236, which neither gives, from the table that the ``compressed-tensors``
  library ships. Each is pinned by a checksum: a rotated checkpoint is only readable with the matrix it was made with.

The columns of a core are sign-flipped such that its first row is all ones. Hence the first row of every ``hadamard(n)``
is all ones, which turns channel 0 into the same constant on all channels (OffQ, arXiv:2606.07116; QuaRot,
arXiv:2404.00456). Flip rows, never columns, to randomise such a matrix. Cores are in general **not symmetric**: an
online transform and the inverse folded into a weight have to agree in orientation.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from postlude.errors import MissingDependencyError, SettingsError

__all__ = ["fast_hadamard", "hadamard", "hadamard_orders", "is_hadamard_order", "sylvester"]

# Order -> CRC-32 of the row-major int8 entries as the table holds them.
_TABLE_CHECKSUMS = {
    92: 0x2CE1524B,
    116: 0x807110A4,
    156: 0x8186E966,
    172: 0x51A9EA1A,
    188: 0x901EC12F,
    236: 0x8F46107E,
}

_DENSE_LIMIT = 128  # below this one small matrix product beats every factorisation
_FACTOR_LIMIT = 64
_THIN = 16  # batched products with fewer columns than this run many times below full speed
_CHUNK_BYTES = 1024 * 1024  # rows worked on together stay in a second-level cache


def sylvester(order: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Sylvester Hadamard matrix ``[order, order]``; symmetric, first row and column all ones.

    Raises:
        SettingsError: ``order`` is not a power of two.
    """
    if order < 1 or order & (order - 1):
        raise SettingsError(
            f"A Sylvester matrix of order {order} does not exist: the order must be a power of two. "
            "Use hadamard(order) for other orders."
        )
    matrix = torch.ones(order, order, dtype=dtype)
    half = 1
    while half < order:
        quarter = matrix[:half, :half]
        matrix[half : 2 * half, :half] = quarter
        matrix[:half, half : 2 * half] = quarter
        matrix[half : 2 * half, half : 2 * half] = -quarter
        half *= 2
    return matrix


def hadamard(order: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A Hadamard matrix ``[order, order]`` of +-1 whose first row is all ones.

    Deterministic: the same matrix for the same order, on every machine.

    Raises:
        SettingsError: no construction is known here for this order (it must be 1, 2 or a multiple of 4).
        MissingDependencyError: the order needs the table of ``compressed-tensors``, which is not installed.
    """
    core = _core_order(order)
    return torch.kron(_core(core).to(dtype), sylvester(order // core, dtype))


def is_hadamard_order(n: int) -> bool:
    """Whether ``hadamard(n)`` is known."""
    return n >= 1 and _find_core_order(n) is not None


def hadamard_orders(limit: int) -> list[int]:
    """All orders up to and including ``limit`` that ``hadamard`` knows, ascending."""
    return [n for n in range(1, limit + 1) if is_hadamard_order(n)]


def fast_hadamard(x: Tensor, order: int, normalize: bool = False) -> Tensor:
    """``x @ hadamard(order)`` along the last axis without building that matrix.

    The power of two splits into Sylvester factors of at most 64, each applied as one batch of small dense products:
    far fewer passes over the data than butterflies. The core ``K`` costs ``K`` multiplications per entry. On the CPU,
    rows are worked on in pieces that stay in cache, so the extra memory is one output and a piece. Differentiable
    (any order of derivative); the gradient saves nothing.

    Args:
        x: ``[..., order]``, float32, bfloat16, float64 or float16 (which may overflow unless ``normalize``).
        order: a Hadamard order, equal to the last dimension of ``x``.
        normalize: scale ``x`` by ``1 / sqrt(order)`` first, so that the transform is orthogonal.

    Returns:
        ``[..., order]`` in the dtype of ``x``.
    """
    if x.ndim < 1 or x.shape[-1] != order:
        raise SettingsError(
            f"fast_hadamard of order {order} got a tensor of shape {tuple(x.shape)}; "
            f"the last dimension must be {order}."
        )
    if not x.is_floating_point():
        raise SettingsError(f"fast_hadamard needs a floating-point tensor; got {x.dtype}.")
    _core_order(order)
    if normalize:
        x = x * order**-0.5
    if torch.is_inference_mode_enabled():
        # What autograd keeps for a function of its own takes longer than transforming one row.
        return _FastHadamard.forward(x, order, False)
    return _transform(x, order, False)


class _FastHadamard(torch.autograd.Function):
    """A linear map: the backward pass is the transposed transform of the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: int, transposed: bool) -> Tensor:
        factors = _factors(order, transposed, x.dtype, x.device)
        rows = x.reshape(-1, order)
        step = (
            max(1, _CHUNK_BYTES // (order * x.element_size()))
            if x.device.type == "cpu"
            else len(rows)
        )
        if len(rows) <= step:
            return _apply_factors(rows, factors).reshape(x.shape)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            out[piece] = _apply_factors(rows[piece], factors)
        return out.reshape(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
        _, ctx.order, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _transform(grad_outputs[0], ctx.order, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _transform(tangents[0], ctx.order, ctx.transposed)


# torch leaves Function.apply untyped.
_transform: Callable[[Tensor, int, bool], Tensor] = _FastHadamard.apply


def _apply_factors(rows: Tensor, factors: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """``rows [n, order]`` times the Kronecker product of ``factors``, the last one fastest varying."""
    shape, inner = rows.shape, 1
    if len(factors) == 2 and len(factors[1][0]) < _THIN:
        # A large core and a thin Sylvester factor, such as 172 x 2: put the long axis last.
        (core, _), (thin, thin_t) = factors
        stack = rows.reshape(-1, len(core), len(thin)).transpose(1, 2)
        stack = torch.bmm(thin_t.expand(len(stack), len(thin), len(thin)), stack)
        return (stack @ core).transpose(1, 2).reshape(shape)
    for matrix, matrix_t in reversed(factors):
        size = len(matrix)
        if inner == 1:
            rows = rows.reshape(-1, size) @ matrix
        else:
            stack = rows.reshape(-1, size, inner)
            rows = torch.bmm(matrix_t.expand(len(stack), size, size), stack)
        inner *= size
    return rows.reshape(shape)


@lru_cache(maxsize=64)
def _factors(
    order: int, transposed: bool, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Kronecker factors of ``hadamard(order)`` or its transpose, with their transposes, slowest varying first."""
    # A tensor made in inference mode could not take part in a later training step.
    with torch.inference_mode(False), torch.no_grad():
        core = _core_order(order)
        if order <= _DENSE_LIMIT:
            matrices = [hadamard(order)]
        else:
            matrices = [_core(core)] if core > 1 else []
            bits = (order // core).bit_length() - 1
            parts = math.ceil(bits / int(math.log2(_FACTOR_LIMIT)))
            matrices += [
                sylvester(2 ** (bits * (k + 1) // parts - bits * k // parts)) for k in range(parts)
            ]
        if transposed:
            matrices = [matrix.T for matrix in matrices]
        matrices = [matrix.to(device=device, dtype=dtype).contiguous() for matrix in matrices]
        return tuple((matrix, matrix.T.contiguous()) for matrix in matrices)


def _core_order(order: int) -> int:
    core = _find_core_order(order) if order >= 1 else None
    if core is None:
        raise SettingsError(
            f"No Hadamard matrix of order {order} is known here; the order must be 1, 2 or a multiple of 4 that the "
            "constructions reach (see hadamard_orders). Use constant_first_row or random_orthogonal, or split the "
            "width into groups of a power of two."
        )
    return core


@lru_cache(maxsize=4096)
def _find_core_order(order: int) -> int | None:
    odd = order
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    core = 4 * odd
    while order % core == 0:
        if _paley_field(core) is not None or core in _TABLE_CHECKSUMS:
            return core
        core *= 2
    return None


def _paley_field(order: int) -> tuple[int, int] | None:
    """``(q, kind)`` of the Paley construction of this order, kind 1 or 2."""
    for q, kind, residue in ((order - 1, 1, 3), (order // 2 - 1, 2, 1)):
        if q % 4 == residue and _prime_power(q) is not None:
            return q, kind
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p**k`` and ``p`` prime, else None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


@lru_cache(maxsize=32)
def _core(order: int) -> Tensor:
    """The Hadamard matrix of a core order, int8, first row all ones. Shared: callers must not write to it."""
    with torch.inference_mode(False):
        if order == 1:
            return torch.ones(1, 1, dtype=torch.int8)
        field = _paley_field(order)
        matrix = _table(order) if field is None else _paley(*field)
        return matrix * matrix[:1]


def _paley(q: int, kind: int) -> Tensor:
    """Paley's construction from the quadratic characters of the field of ``q`` elements."""
    characters = _character_differences(q)
    skew = torch.ones(q + 1, q + 1, dtype=torch.int8)
    skew[0, 0] = 0
    skew[1:, 1:] = characters
    if kind == 1:
        skew[1:, 0] = -1
        return skew + torch.eye(q + 1, dtype=torch.int8)
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(skew, plus) + torch.kron(torch.eye(q + 1, dtype=torch.int8), minus)


def _character_differences(q: int) -> Tensor:
    """``[q, q]`` int8: +1 where ``a - b`` is a non-zero square of GF(q), -1 where not a square, 0 on the diagonal."""
    power = _prime_power(q)
    if power is None:
        raise SettingsError(f"There is no field of {q} elements: {q} is not a prime power.")
    p, k = power
    weights = [p**i for i in range(k)]
    character = torch.zeros(q, dtype=torch.int8)
    # Even powers of a generator of the multiplicative group are the squares.
    for i, element in enumerate(_powers_of_generator(p, k)):
        character[sum(e * w for e, w in zip(element, weights, strict=True))] = (
            1 if i % 2 == 0 else -1
        )
    number = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for weight in weights:
        digit = number // weight % p
        difference += (digit[:, None] - digit[None, :]) % p * weight
    return character[difference]


def _powers_of_generator(p: int, k: int) -> list[tuple[int, ...]]:
    """All ``p**k - 1`` powers of a generator of GF(p**k)*, as coefficient tuples, from the power 0.

    A monic polynomial of degree ``k`` for which ``x`` has that multiplicative order is primitive, so trying
    polynomials in turn finds the field and a generator together. The first one found fixes the matrix.
    """
    one = (1,) + (0,) * (k - 1)
    for low in itertools.product(range(p), repeat=k):
        if low[0] == 0:
            continue
        powers, element = [one], one
        while len(powers) < p**k:
            top = element[-1]
            shifted = (0, *element[:-1])
            element = tuple((s - top * c) % p for s, c in zip(shifted, low, strict=True))
            if element == one:
                break
            powers.append(element)
        if len(powers) == p**k - 1:
            return powers
    raise SettingsError(f"No primitive polynomial of degree {k} over the integers modulo {p}.")


def _table(order: int) -> Tensor:
    """A core that only the table of ``compressed-tensors`` has, checked against its pinned checksum."""
    advice = "Install postlude[serve-formats], or group the width by a power of two."
    # find_spec of the top-level name locates the package without importing it (its import pulls in transformers).
    spec = importlib.util.find_spec("compressed_tensors")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"The Hadamard matrix of order {order} comes from the compressed-tensors library, which is not installed. "
            + advice
        )
    path = Path(spec.origin).parent / "transform" / "utils" / "hadamards.safetensors"
    if not path.is_file():
        raise MissingDependencyError(
            f"The installed compressed-tensors has no Hadamard table at {path}, needed for order {order}. "
            + advice
        )
    with safe_open(path, framework="pt") as table:
        matrix: Tensor = table.get_tensor(str(order))
    if zlib.crc32(matrix.to(torch.int8).contiguous().numpy().tobytes()) != _TABLE_CHECKSUMS[order]:
        raise MissingDependencyError(
            f"The matrix of order {order} in {path} is not the one this library is built on; checkpoints rotated with "
            "it would not be readable elsewhere. " + advice
        )
    return matrix.to(torch.int8)
