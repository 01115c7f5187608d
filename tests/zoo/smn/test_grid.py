from __future__ import annotations

import math

import pytest
import torch

from postlude.zoo.smn.grid import points, psnr


@pytest.mark.parametrize(("width", "height"), [(4, 3), (3, 4), (1, 5), (5, 1), (1, 1)])
def test_points_against_linspace(width: int, height: int) -> None:
    found = points(torch.arange(width * height), width, height).reshape(height, width, 2)
    across = torch.linspace(-1, 1, width) if width > 1 else torch.zeros(1)
    down = torch.linspace(-1, 1, height) if height > 1 else torch.zeros(1)
    torch.testing.assert_close(found[..., 0], across.expand(height, width))
    torch.testing.assert_close(found[..., 1], down[:, None].expand(height, width))


def test_every_other_point_of_a_finer_grid() -> None:
    coarse = points(torch.arange(9), 9, 1)
    fine = points(torch.arange(17), 17, 1)
    torch.testing.assert_close(fine[::2], coarse)


def test_psnr() -> None:
    expected = torch.tensor([0.0, 0.5, 1.0])
    assert psnr(expected, expected) == math.inf
    assert psnr(expected + torch.tensor([0.0, 0.1, 0.5]), expected) == pytest.approx(
        -10 * math.log10(0.01 / 3), abs=1e-4
    )
