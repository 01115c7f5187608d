"""Layers with a low-rank branch: what they compute, store and become when they are described and rebuilt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from postlude.numerics.formats import Integer
from postlude.numerics.low_rank import BranchFormat, one_shot
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery import kernels
from postlude.surgery.huggingface import describe
from postlude.surgery.layers import LowRankBranch, QuantizedLinear, quantized_linears
from postlude.surgery.transforms import InputScale

FORMATS = ["16", "w8a8", "w6a6", "w4a8", "w8a16"]
FOUR = Scheme(Integer(4), Granularity("group", 32))
WIDTH, OUT, RANK = 76, 40, 9  # nothing divides anything


def made(
    text: str, *, activations: int = 4, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedLinear, Tensor]:
    """A layer with a branch, and the weight it stands for."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    linear = nn.Linear(WIDTH, OUT, bias=bias, dtype=dtype)
    format = BranchFormat.parse(text)
    fit = one_shot(weight, RANK, format, FOUR.encode)
    branch = LowRankBranch(WIDTH, OUT, RANK, format)
    branch.store(fit.up, fit.down)
    inputs = None if activations == 16 else Scheme(Integer(activations), Granularity("token"))
    layer = QuantizedLinear.like(linear, weight=FOUR, input=inputs, branch=branch)
    layer.store(fit.main)
    return layer, fit.decode()


@pytest.mark.parametrize("text", FORMATS)
def test_it_computes_both_products(text: str) -> None:
    layer, _ = made(text)
    x = torch.randn(5, WIDTH)
    format = BranchFormat.parse(text)
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(1))
    fit = one_shot(weight, RANK, format, FOUR.encode)
    up, down = (
        part.float() if isinstance(part, Tensor) else part.decode() for part in (fit.up, fit.down)
    )

    def rounded(values: Tensor) -> Tensor:
        scheme = format.input_scheme
        return values if scheme is None else scheme.round_trip(values)

    main = Scheme(Integer(4), Granularity("token")).round_trip(x) @ fit.main.decode().T
    assert layer.bias is not None
    expected = main + rounded(rounded(x) @ down.T) @ up.T + layer.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("text", ["16", "w8a16"])
def test_without_rounded_inputs_it_is_one_matrix(text: str) -> None:
    layer, weight = made(text, activations=16)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))


@pytest.mark.parametrize("text", FORMATS)
def test_what_it_stores_is_what_it_says(text: str) -> None:
    layer, _ = made(text)
    stored = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    assert layer.stored_bits() == sum(8 * t.numel() * t.element_size() for t in stored.values())
    assert layer.branch is not None
    expected = BranchFormat.parse(text).stored_bits(OUT, WIDTH, RANK)
    assert layer.branch.stored_bits() == expected
    kinds = {t.dtype for name, t in stored.items() if name.startswith("branch.")}
    assert kinds == ({torch.float16} if text == "16" else {torch.uint8, torch.float16})


@pytest.mark.parametrize("text", FORMATS)
def test_described_and_rebuilt_it_is_the_same_layer(text: str) -> None:
    layer, _ = made(text)
    again = QuantizedLinear.from_spec(layer.spec(), torch.float32)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(4, WIDTH)
    assert torch.equal(again(x), layer(x))
    assert again.spec() == layer.spec()


def test_a_model_is_described_without_the_factors() -> None:
    layer, _ = made("w8a8")
    plain = QuantizedLinear.like(nn.Linear(WIDTH, OUT), weight=FOUR)
    model = nn.ModuleDict({"a": layer, "b": plain})
    described = describe(model)
    assert set(described["modules"]) == {"a", "b"}
    assert [path for path, _ in quantized_linears(model)] == ["a", "b"]
    assert "branch" in described["kinds"][0] and "branch" not in described["kinds"][1]


def test_casting_leaves_what_is_stored_alone() -> None:
    layer, _ = made("16")
    branch = layer.branch
    assert branch is not None
    before = branch.down.weight.clone()
    layer.to(torch.float64).to(torch.bfloat16)
    assert branch.down.weight.dtype == torch.float16
    assert torch.equal(branch.down.weight, before)
    assert layer(torch.randn(2, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_smoothing_is_undone_in_the_input() -> None:
    scale = InputScale(WIDTH)
    scale.factor.copy_(torch.rand(WIDTH) + 0.5)
    x = torch.randn(3, WIDTH)
    assert torch.equal(scale(x), x * scale.factor)
    assert scale.to(torch.bfloat16).factor.dtype == torch.float32
    layer = QuantizedLinear.like(nn.Linear(WIDTH, OUT), weight=FOUR, transform=scale)
    again = QuantizedLinear.from_spec(layer.spec(), torch.float32)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


# Kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activations", [4, 16])
@pytest.mark.parametrize("text", FORMATS)
def test_kernels_compute_what_is_simulated(text: str, activations: int, dtype: torch.dtype) -> None:
    layer, _ = made(text, activations=activations, dtype=dtype)
    model = nn.Sequential(layer)
    found = {one.layer: one for one in kernels.assignments(model, dtype=dtype)}
    assert set(found) == {"0", "0.branch.down", "0.branch.up"}
    for rows in (1, 33):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)
        with torch.no_grad():
            expected = model(x)
            kernels.use(model)
            out = model(x)
            kernels.use(model, "simulate")
        # Codes on the edge between two values may fall to either side.
        error = (out - expected).float().norm() / expected.float().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    if text == "16":
        assert found["0.branch.up"].decode == found["0.branch.up"].prefill == "dense"
        assert not found["0.branch.up"].simulated
    elif text == "w8a8":
        assert found["0.branch.down"].kernels[0] != "simulate"


def test_a_layer_on_kernels_is_saved_as_stored() -> None:
    layer, _ = made("w8a8")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    kernels.use(nn.Sequential(layer))
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
