from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from postlude.signals.picture import Picture


def drawn(width: int, height: int, channels: int, seed: int = 0) -> Tensor:
    """Smooth colours with an edge, ``uint8 [height, width, channels]``."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    waves = 3 * torch.rand(channels, 3, generator=draw)
    value = torch.stack([torch.sin(a * x + b * y + c) for a, b, c in waves], dim=-1)
    value[: height // 2, : width // 2] *= -1
    return (127.5 + 127 * value).round().to(torch.uint8)


@pytest.fixture
def small() -> Picture:
    """12 x 10 pixels of 3 channels."""
    return Picture(drawn(12, 10, 3))


@pytest.fixture
def png(tmp_path: Path) -> Path:
    from postlude.signals.picture import write_picture

    write_picture(drawn(12, 10, 3), tmp_path / "small.png")
    return tmp_path / "small.png"
