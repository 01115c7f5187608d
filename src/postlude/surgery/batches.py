"""Batches: what a model is called with, and how it is split, joined and placed.

A batch is a mapping of keyword arguments of the model's ``forward``; a tensor of token ids stands for
``{"input_ids": ids}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "TOKENS_PER_BATCH",
    "Batch",
    "Calibration",
    "copied_to_cpu",
    "device_of",
    "forward_batches",
    "in_batches",
    "joined",
    "placed_on",
    "rows_of",
    "token_batches",
]

Batch = Mapping[str, Any]
"""Keyword arguments of a model's ``forward``; tensors, or dictionaries of them."""

Calibration = Tensor | Sequence[Batch]
"""Tokens ``[sequences, length]``, or batches of whatever the model takes."""

# Tokens in one forward pass where the caller does not say.
TOKENS_PER_BATCH = 4096


def device_of(module: nn.Module) -> torch.device:
    """Device of the first parameter or buffer."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def token_batches(tokens: Tensor, tokens_per_batch: int = TOKENS_PER_BATCH) -> Iterator[Tensor]:
    """Split ``[sequences, length]`` into batches of at most ``tokens_per_batch`` tokens (at least a row)."""
    rows = max(1, tokens_per_batch // tokens.shape[1])
    yield from tokens.split(rows)


def forward_batches(calibration: Calibration) -> Iterator[Batch]:
    """Calibration data as batches; tokens are split as by :func:`token_batches`."""
    if isinstance(calibration, Tensor):
        for ids in token_batches(calibration):
            yield {"input_ids": ids}
    else:
        yield from calibration


def placed_on(batch: Tensor | Batch, model: nn.Module) -> dict[str, Any]:
    """A batch on the model's device, its floating-point tensors in the type of the model's parameters."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def place(value: Tensor) -> Tensor:
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return {name: _with_tensors(value, place) for name, value in given.items()}


def copied_to_cpu(batch: Batch) -> dict[str, Any]:
    """A batch of its own, apart from autograd, on the CPU."""
    return {
        name: _with_tensors(value, lambda tensor: tensor.detach().cpu().clone())
        for name, value in batch.items()
    }


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with each of its tensors changed."""
    if isinstance(value, Mapping):
        return {name: _with_tensors(part, change) for name, part in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def _is_shared(name: str, value: Any) -> bool:
    """Whether an argument belongs to all rows: numbers, and positions, which have no axis of rows."""
    return not isinstance(value, Tensor | Mapping) or (
        name.endswith("_ids") and name != "input_ids"
    )


def rows_of(batch: Batch, rows: slice) -> dict[str, Any]:
    """Some rows of a batch."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(key, part) for key, part in value.items()}
        return value if _is_shared(name, value) or value.ndim == 0 else value[rows]

    return {name: cut(name, value) for name, value in batch.items()}


def joined(batches: Sequence[Batch]) -> dict[str, Any]:
    """Batches of the same arguments as one."""

    def join(name: str, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return {key: join(key, [value[key] for value in values]) for key in first}
        return first if _is_shared(name, first) or first.ndim == 0 else torch.cat(values)

    return {name: join(name, [batch[name] for batch in batches]) for name in batches[0]}


def in_batches(batch: Batch, size: int) -> list[Batch]:
    """A batch as several of at most ``size`` rows."""
    count = next(
        len(v) for name, v in batch.items() if isinstance(v, Tensor) and not _is_shared(name, v)
    )
    return [rows_of(batch, slice(start, start + size)) for start in range(0, count, size)]
