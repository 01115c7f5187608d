"""How much memory a fit will take, known before it starts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.signals.picture import POINTS
from postlude.zoo.smn.networks import build
from postlude.zoo.smn.settings import NetworkSettings

__all__ = ["available_memory", "check_memory", "predicted_memory"]

# What a step keeps is read off a small network and grows with the width.
_PROBE_WIDTH, _PROBE_POINTS = 32, 32
# The file as it is decoded, in the right mode, and as a tensor.
_COPIES = 3


def predicted_memory(settings: NetworkSettings, width: int, height: int, batch: int) -> int:
    """Bytes that a fit takes beyond the program itself, at its peak.

    What a step keeps for its gradient is read off a narrow network of the kind on a few points. Gradients on the way
    back, and what the allocator does not hand back at once, take up to two and a half times as much again
    (``benchmarks/signals.py``).
    A picture that is rendered afterwards takes less than a step of as many pixels.

    Args:
        settings: of the network, whose values are the channels of the picture.
        width, height: of the picture.
        batch: points of a step.
    """
    pixels = width * height * settings.out_features
    narrow = dataclasses.replace(settings, width=_PROBE_WIDTH)
    kept = _kept_for_gradient(narrow) / _PROBE_POINTS * max(1, settings.width / _PROBE_WIDTH)
    points = max(min(batch, width * height), min(POINTS, width * height) // 2)
    # Parameters, their gradients, two moments, and the state before and after a chunk: fp32.
    return round(_COPIES * pixels + 3.5 * kept * points + 10 * 4 * settings.numbers)


def _kept_for_gradient(settings: NetworkSettings) -> int:
    """Bytes that a forward pass of some points keeps, weights not counted."""
    network = build(settings, 0)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(torch.zeros(_PROBE_POINTS, settings.in_features))
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


def check_memory(settings: NetworkSettings, width: int, height: int, batch: int) -> int:
    """The prediction of :func:`predicted_memory`.

    Raises:
        SettingsError: it is more than there is; says which size would do.
    """
    wanted = predicted_memory(settings, width, height, batch)
    free = available_memory()
    if wanted > free:
        raise SettingsError(
            f"fitting {width} x {height} pixels of {settings.out_features} channels, {batch} a step, takes about "
            f"{wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: take a smaller picture or "
            "network, or fewer pixels a step (--batch)."
        )
    return wanted
