"""Online transforms: their descriptions, and the types of what they hold."""

from __future__ import annotations

import pytest
import torch

from postlude.errors import CheckpointError
from postlude.numerics.activation_grids import Uniform
from postlude.surgery.static_quantizers import StaticQuantizer
from postlude.surgery.transforms import (
    BlockHadamard,
    HeadRotation,
    InputOrder,
    InputScale,
    Transform,
    build_transform,
)

TRANSFORMS: list[Transform] = [
    BlockHadamard(44, 16),
    BlockHadamard(48, 4, inner=6),
    HeadRotation(2, 8),
    InputOrder(20),
    InputScale(20),
    StaticQuantizer(Uniform(4), {"scale": (1,), "zero_point": (20,)}),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda one: type(one).__name__)
def test_the_description_makes_the_same_one_empty(transform: Transform) -> None:
    made = build_transform(transform.spec())
    assert type(made) is type(transform) and made is not None
    assert made.spec() == transform.spec()
    made.load_state_dict(transform.state_dict())


def test_nothing_and_the_unknown() -> None:
    assert build_transform(None) is None
    with pytest.raises(CheckpointError, match="online transform 'wavelet' is not known"):
        build_transform({"kind": "wavelet"})


@pytest.mark.parametrize("transform", TRANSFORMS[4:], ids=lambda one: type(one).__name__)
def test_what_is_stored_in_fp32_stays_so(transform: Transform) -> None:
    before = {name: buffer.clone() for name, buffer in transform.named_buffers()}
    transform.to(torch.bfloat16)
    for name, buffer in transform.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name])
