"""How much memory a fit will take, known before it starts."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.signals.picture import POINTS

__all__ = ["available_memory", "check_memory", "predicted_memory"]

_PROBE = 32
# The file as it is decoded, in the right mode, and as a tensor.
_COPIES = 3


def predicted_memory(network: nn.Module, width: int, height: int, channels: int, batch: int) -> int:
    """Bytes that a fit takes beyond the program itself, at its peak.

    What a step keeps for its gradient is read off the network on a few points; gradients on the way back take up to
    half as much again. A picture that is rendered afterwards, by blocks of pixels, takes less than a step of as many.

    Args:
        network: to be fitted.
        width, height, channels: of the picture.
        batch: points of a step.
    """
    pixels = width * height * channels
    numbers = sum(p.numel() * p.element_size() for p in network.parameters())
    kept = _kept_for_gradient(network) / _PROBE
    points = max(min(batch, width * height), min(POINTS, width * height) // 2)
    # Parameters, their gradients, two moments, and the state before and after a chunk.
    return round(_COPIES * pixels + 1.5 * kept * points + 10 * numbers)


def _kept_for_gradient(network: nn.Module) -> int:
    """Bytes that a forward pass of ``_PROBE`` points keeps, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    first = next(network.parameters())
    inputs = network.settings.in_features  # type: ignore[union-attr]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.zeros(_PROBE, int(inputs), device=first.device)  # type: ignore[arg-type]
        out = network(x)
    del out
    return sum(kept.values())


def available_memory() -> int:
    """Bytes that programs may still take on this machine."""
    information = Path("/proc/meminfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(network: nn.Module, width: int, height: int, channels: int, batch: int) -> int:
    """The prediction of :func:`predicted_memory`.

    Raises:
        SettingsError: it is more than there is; says which size would do.
    """
    wanted = predicted_memory(network, width, height, channels, batch)
    free = available_memory()
    if wanted > free:
        raise SettingsError(
            f"fitting {width} x {height} pixels of {channels} channels, {batch} a step, takes about "
            f"{wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: take a smaller picture, or fewer pixels "
            "a step (--batch)."
        )
    return wanted
