"""Networks that are a signal, coordinates in and values out: one row of ``NETWORKS`` each.

A row is a settings class with its sizes, counts and the learning rate that a search found (``claims/smn.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from postlude.errors import UnknownNameError
from postlude.zoo.smn.baselines import GaussSettings, ReLUSettings, SirenSettings, WireSettings
from postlude.zoo.smn.settings import NetworkSettings
from postlude.zoo.smn.subtractive import SMNSettings

__all__ = ["NETWORKS", "build", "settings_for", "width_for"]

NETWORKS: dict[str, type[NetworkSettings]] = {
    kind.name: kind
    for kind in (SMNSettings, SirenSettings, WireSettings, GaussSettings, ReLUSettings)
}


def settings_for(name: str, values: Mapping[str, Any]) -> NetworkSettings:
    """The settings of a network by its name, from plain values.

    Raises:
        UnknownNameError: no network, or no setting, has this name.
        SettingsError: a value that the network cannot do.
    """
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    kind = NETWORKS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise UnknownNameError(f"setting of {name}", key, known)
    return kind(**values)


def build(settings: NetworkSettings, seed: int) -> nn.Module:
    """A network with weights drawn from a seed."""
    return settings.build(torch.Generator().manual_seed(seed))


def width_for(name: str, numbers: int, **values: Any) -> int:
    """The largest width of a network that has at most so many real numbers; at least 1.

    Args:
        name: of the network.
        numbers: limit.
        values: its other settings.
    """
    low, high = 1, 2
    while settings_for(name, {**values, "width": high}).numbers <= numbers:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if settings_for(name, {**values, "width": middle}).numbers <= numbers:
            low = middle
        else:
            high = middle
    return low
