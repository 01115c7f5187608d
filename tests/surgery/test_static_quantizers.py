from __future__ import annotations

import pytest
import torch
from torch import nn

from postlude.numerics.activation_grids import (
    AdaLog,
    LogSqrt2,
    ShiftLog,
    Tangent,
    TwoSided,
    Uniform,
)
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.static_quantizers import (
    AttentionOperands,
    StaticQuantizer,
    switch_static_quantizers,
)


def quantizer(bits: int = 4) -> StaticQuantizer:
    return StaticQuantizer.of(
        Uniform(bits), {"scale": torch.tensor([0.1]), "zero_point": torch.tensor([7.25])}
    )


@pytest.mark.parametrize(
    "grid", [Uniform(4), LogSqrt2(3), AdaLog(5, shift=0.1), ShiftLog(4), Tangent(6), TwoSided(3)]
)
def test_one_made_from_its_description_rounds_alike(grid: object) -> None:
    x = torch.rand(50, generator=torch.Generator().manual_seed(0))
    made = StaticQuantizer.of(grid, grid.fit(x))  # type: ignore[attr-defined, arg-type]
    again = StaticQuantizer.from_spec(made.spec())
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x)) and not torch.equal(made(x), x)


def test_parameters_stay_in_fp32_and_results_have_the_type_of_the_input() -> None:
    half = nn.Sequential(quantizer()).to(torch.bfloat16)
    assert half[0].get_buffer("scale").dtype == torch.float32
    assert half(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_layer_rounds_its_input_first_and_is_described_with_it() -> None:
    linear = nn.Linear(6, 4)
    layer = QuantizedLinear.like(linear, transform=quantizer())
    layer.weight.data.copy_(linear.weight.data)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), linear(quantizer()(x)))
    again = QuantizedLinear.from_spec(layer.spec(), torch.float32)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    switch_static_quantizers(layer, on=False)
    assert torch.equal(layer(x), linear(x))
    switch_static_quantizers(layer, on=True)
    assert torch.equal(layer(x), again(x))


def test_operands_are_rebuilt_from_their_description() -> None:
    heads = {"scale": torch.rand(3, 1, 1) + 0.1, "zero_point": torch.rand(3, 1, 1) * 8}
    parts = [StaticQuantizer.of(Uniform(4), heads) for _ in range(3)]
    operands = AttentionOperands(*parts, quantizer())  # type: ignore[call-arg]
    again = AttentionOperands.from_spec(operands.spec())
    again.load_state_dict(operands.state_dict())
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.query(x), operands.query(x))
    # Every head has its own range.
    alone = Uniform(4).round_trip(x[:, 1], {name: value[1] for name, value in heads.items()})
    assert torch.equal(operands.query(x)[:, 1], alone)
