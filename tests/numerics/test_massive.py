from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.numerics.massive import decay_layer, explosion_layer, find_massive


def story() -> Tensor:
    """Six layers: token 0 explodes in block 1 and decays in block 4; the stream grows throughout."""
    norms = torch.tensor([0.5, 6.0, 8.0, 10.0, 12.0, 14.0])[:, None] * torch.ones(6, 20)
    norms[:, 0] = torch.tensor([0.6, 7.0, 900.0, 900.0, 905.0, 20.0])
    return norms


def test_the_massive_token_and_its_layers_are_found() -> None:
    norms = story()
    mask, threshold = find_massive(norms)
    assert threshold == pytest.approx(90.5)
    assert mask.nonzero().tolist() == [[2, 0], [3, 0], [4, 0]]
    assert explosion_layer(norms, mask) == 1  # not block 0, which lifts all tokens alike
    assert decay_layer(norms, mask) == 4


def test_small_peaks_beside_a_large_one_are_left_out() -> None:
    norms = story()
    norms[0, 3] = 30.0  # 60 times its layer's median, but a thirtieth of the largest
    mask, _ = find_massive(norms)
    assert not mask[0].any()


def test_a_growing_stream_is_not_massive() -> None:
    norms = 20.0 ** torch.arange(5.0)[:, None] * torch.rand(5, 50).add(0.5)
    found = find_massive(norms)
    assert not found.any
    assert found.threshold == math.inf
    assert explosion_layer(norms, found.mask) is None
    assert decay_layer(norms.flip(0), found.mask) is None


def test_a_given_threshold_replaces_the_rule() -> None:
    mask, threshold = find_massive(story(), threshold=902)
    assert threshold == 902
    assert mask.nonzero().tolist() == [[4, 0]]


def test_layers_that_never_decay() -> None:
    norms = story()[:-1]
    mask, _ = find_massive(norms)
    assert decay_layer(norms, mask) is None


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="expected"):
        find_massive(torch.ones(1, 4))
    with pytest.raises(SettingsError, match="positive"):
        find_massive(story(), threshold=0)
    with pytest.raises(SettingsError, match="above 1"):
        find_massive(story(), ratio=1)
