"""Encode a recording once where several rows of a batch speak of it.

Calibration asks several questions about one recording. The encoder of an audio language model costs more than reading
a short question, and gives the same for each of them: rows of features that are equal are encoded once, and what comes
out is given to each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from postlude.surgery.anatomy import AudioAnatomy

__all__ = ["encode_once"]


@contextlib.contextmanager
def encode_once(model: nn.Module, anatomy: AudioAnatomy, recordings: Tensor) -> Iterator[None]:
    """Forward passes inside read every recording once.

    Args:
        model: an audio language model, or what wraps it in place (adapters).
        anatomy: of it.
        recordings: ``int64 [rows]``, for each row of features which recording (window of one) it is; rows of the same
            number hold the same features.
    """
    numbers, place = torch.unique(recordings, return_inverse=True)
    if len(numbers) == len(recordings):
        yield
        return
    first = torch.full((len(numbers),), len(recordings), dtype=torch.int64, device=place.device)
    first.scatter_reduce_(0, place, torch.arange(len(place), device=place.device), "amin")

    def chosen(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(recordings)
        return value.index_select(0, first.to(value.device)) if rows else value

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(chosen, args)), {name: chosen(value) for name, value in kwargs.items()}

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = output.last_hidden_state
        output.last_hidden_state = states.index_select(0, place.to(states.device))
        return output

    encoder = model.get_submodule(anatomy.encoder)
    with (
        encoder.register_forward_pre_hook(before, with_kwargs=True),
        encoder.register_forward_hook(after),
    ):
        yield
