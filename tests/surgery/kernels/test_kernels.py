"""Every kernel against the simulation, on its whole declared domain."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postlude.errors import SettingsError, UnknownNameError
from postlude.numerics.formats import Codebook, Integer, Minifloat
from postlude.numerics.schemes import Granularity, Scheme
from postlude.surgery import kernels
from postlude.surgery.kernels import KERNELS
from postlude.surgery.kernels.choice import _Execution
from postlude.surgery.layers import QuantizedLinear, hold_dense
from postlude.surgery.transforms import BlockHadamard

FREE4 = Integer(4, symmetric=False, range="free")
FREE8 = Integer(8, symmetric=False, range="free")
# Rounding to the activation type, a few times over; sums of 172 products in fp32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def scheme(form: Any, granularity: Any) -> Scheme:
    return Scheme(form, Granularity.parse(granularity))


def make(
    weight: Scheme | None,
    input: Scheme | None = None,
    *,
    width: int = 172,
    channels: int = 44,
    bias: bool = True,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    transform: nn.Module | None = None,
) -> QuantizedLinear:
    """A layer with random weights; ``shift`` moves them away from zero by so many standard deviations."""
    generator = torch.Generator().manual_seed(width * 1000 + channels)
    layer = QuantizedLinear(
        width, channels, bias=bias, weight=weight, input=input, transform=transform, dtype=dtype
    )
    values = torch.randn(channels, width, generator=generator) * 0.1 + shift * 0.1
    if weight is None:
        layer.weight.data.copy_(values)
    else:
        layer.store(weight.encode(values))
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(channels, generator=generator))
    return layer


def inputs(rows: int, width: int, dtype: torch.dtype, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, width, generator=generator) + shift).to(dtype)


def scale_of(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """``sqrt(sum x_hat^2 sum w_hat^2)``: what rounding errors of a product are measured against."""
    rounded = layer.quantized_input(x.float())
    weight = layer.dense_weight().float()
    return rounded.norm(dim=-1, keepdim=True) * weight.norm(dim=-1) + 1


def check(layer: QuantizedLinear, name: str, x: Tensor) -> None:
    """One kernel against the simulation in fp32 of the same codes, and in its own type."""
    exact = layer.simulate(x.float()) if layer.bias is None else None
    if exact is None:
        wide = copy.deepcopy(layer).float()
        exact = wide.simulate(x.float())
    simulated = layer.simulate(x)
    size = scale_of(layer, x)
    model = nn.Sequential(layer)
    model.register_parameter("kind", nn.Parameter(torch.zeros((), dtype=x.dtype)))
    (assigned,) = kernels.use(model, name)
    assert assigned.decode == assigned.prefill == name
    with torch.no_grad():
        got = model(x)
    assert got.dtype == x.dtype and got.shape == simulated.shape
    tolerance = TOLERANCE[x.dtype]
    assert ((got.float() - exact).abs() / size).max() < tolerance
    assert ((got.float() - simulated.float()).abs() / size).max() < 2 * tolerance
    # What was repacked comes back bit for bit.
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kernels.use(model, "simulate")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in after)
    assert torch.equal(model(x), simulated)


WIDTHS = [(172, 44), (256, 64), (512, 130), (33, 5)]


@pytest.mark.parametrize("group", ["channel", "tensor", 32, 64, 128, 512])
@pytest.mark.parametrize("width, channels", [*WIDTHS[:3], (64, 16)])
@pytest.mark.parametrize("form", [Integer(4), FREE4], ids=["symmetric", "free"])
def test_int4pack(group: Any, width: int, channels: int, form: Integer) -> None:
    for rows, bias in ((1, True), (7, False), (64, True)):
        layer = make(
            scheme(form, group), width=width, channels=channels, bias=bias, dtype=torch.bfloat16
        )
        check(layer, "int4pack", inputs(rows, width, torch.bfloat16))


@pytest.mark.parametrize("group", ["channel", "tensor", 64])
def test_int4pack_with_zero_points_far_outside_the_codes(group: Any) -> None:
    layer = make(scheme(FREE4, group), shift=300.0, dtype=torch.bfloat16)
    assert layer.zero_point is not None and layer.zero_point.abs().min() > 500
    check(layer, "int4pack", inputs(9, 172, torch.bfloat16))


@pytest.mark.parametrize("form", [Integer(8), Integer(8, narrow=True), FREE8])
@pytest.mark.parametrize("group", ["channel", "tensor"])
@pytest.mark.parametrize("width, channels", [(16, 5), (176, 44), (512, 130)])
def test_int8pack(form: Integer, group: str, width: int, channels: int) -> None:
    for rows in (1, 5, 64):
        layer = make(scheme(form, group), width=width, channels=channels, dtype=torch.bfloat16)
        check(layer, "int8pack", inputs(rows, width, torch.bfloat16))


INTEGER_WEIGHTS = [Integer(8), Integer(4), Integer(3), FREE4, FREE8, Integer(5, False, "zero")]
INTEGER_INPUTS = [Integer(8), Integer(4), FREE4, FREE8, Integer(6, False, "zero")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "group, input_group",
    [
        ("channel", "token"),
        ("tensor", "tensor"),
        (32, "token"),
        (64, 32),
        ("channel", 43),
        (128, 128),
    ],
)
def test_integer(group: Any, input_group: Any, dtype: torch.dtype) -> None:
    for weight, input in itertools.product(INTEGER_WEIGHTS, INTEGER_INPUTS):
        layer = make(scheme(weight, group), scheme(input, input_group), dtype=dtype)
        check(layer, "integer", inputs(5, 172, dtype))


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64])
@pytest.mark.parametrize("width, channels", WIDTHS)
def test_integer_shapes(rows: int, width: int, channels: int) -> None:
    for weight, input in ((Integer(8), Integer(8)), (Integer(4), FREE4), (Integer(2), Integer(4))):
        layer = make(
            scheme(weight, "channel"), scheme(input, "token"), width=width, channels=channels
        )
        check(layer, "integer", inputs(rows, width, torch.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_with_zero_points_far_outside_the_codes(bits: int) -> None:
    # A constant added to a whole group of inputs, as OffQ leaves it: its zero point is thousands of steps away.
    form = Integer(bits, symmetric=False, range="free")
    layer = make(scheme(Integer(4), "channel"), scheme(form, 43))
    x = inputs(6, 172, torch.float32, shift=800.0)
    _, zero = layer.input_scheme.parameters(x)  # type: ignore[union-attr]
    assert zero is not None and zero.abs().min() > 500
    check(layer, "integer", x)


def test_integer_products_are_exact() -> None:
    # Scales of one and integers throughout: not one unit may be lost.
    layer = make(scheme(Integer(8), "channel"), scheme(Integer(8), "token"), bias=False)
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (44, 172)).float()
    weight[:, 0] = 127
    layer.store(layer.weight_scheme.encode(weight))  # type: ignore[union-attr]
    x = torch.randint(-127, 128, (16, 172)).float()
    x[:, 5] = -127
    model = nn.Sequential(layer)
    kernels.use(model, "integer")
    assert torch.equal(model(x), (x.double() @ weight.double().T).float())


TILED = [
    scheme(Integer(4), "channel"),
    scheme(Integer(3), 64),
    scheme(FREE4, 32),
    scheme(Integer(8), "tensor"),
    scheme(Minifloat(), 32),
    scheme(Codebook((-1.0, -0.3, 0.1, 0.4, 1.0)), "channel"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", TILED, ids=lambda one: f"{one.format.kind}-{one.granularity}")
def test_tiled(weight: Scheme, dtype: torch.dtype) -> None:
    for width, channels in WIDTHS:
        layer = make(
            weight, scheme(Integer(8), "token"), width=width, channels=channels, dtype=dtype
        )
        check(layer, "tiled", inputs(3, width, dtype))


@pytest.mark.parametrize("name, bits", [("int4pack", 4), ("integer", 8), ("int8pack", 8)])
def test_tiled_decodes_the_same_bits_in_every_layout(name: str, bits: int) -> None:
    from postlude.surgery.kernels.tiled import decode

    layer = make(scheme(Integer(bits), "channel"), scheme(Integer(8), "token"), channels=130)
    weight = layer.dense_weight()
    for layout in kernels.LAYOUTS.values():
        if layout.takes(layer):
            made = layout(layer)
            got = decode(layer, made, 64, 130, torch.empty(66, 172))
            assert torch.equal(got, weight[64:])


# Choosing


class Model(nn.Module):
    def __init__(self, *layers: QuantizedLinear, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def test_prefill_and_decode_may_differ() -> None:
    layer = make(scheme(Integer(8), "channel"), width=256, channels=256, dtype=torch.bfloat16)
    (found,) = kernels.use(Model(layer))
    assert (found.layout, found.decode, found.prefill) == ("int8", "int8pack", "tiled")


def test_integer_reads_codes_in_the_order_of_int4pack() -> None:
    layer = make(scheme(Integer(4), 64), scheme(FREE8, 32), channels=130, dtype=torch.bfloat16)
    x = inputs(20, 172, torch.bfloat16)
    execution = [
        _Execution((KERNELS["integer"],), kernels.LAYOUTS[name](layer), x.dtype, "integer")
        for name in ("stored", "int4pack")
    ]
    with torch.no_grad():
        first, second = (one.run(layer, x) for one in execution)
    assert torch.equal(first, second)


def test_choices() -> None:
    def chosen(weight: Scheme, input: Scheme | None, dtype: torch.dtype) -> tuple[str, str]:
        layer = make(weight, input, width=2048, channels=64, dtype=dtype)
        found = kernels.assign("one", layer, dtype=dtype)
        return found.decode, found.prefill

    w4, w8, a8 = (
        scheme(Integer(4), "channel"),
        scheme(Integer(8), "channel"),
        scheme(Integer(8), "token"),
    )
    assert chosen(w4, None, torch.float32) == ("tiled", "tiled")
    assert chosen(w8, None, torch.bfloat16) == ("int8pack", "tiled")
    assert chosen(w8, a8, torch.float32) == ("integer", "integer")
    assert chosen(w4, a8, torch.float32) == ("integer", "integer")
    wide = make(w4, a8, width=2048, channels=2048, dtype=torch.bfloat16)
    found = kernels.assign("one", wide, dtype=torch.bfloat16)
    assert (found.decode, found.prefill) == ("int4pack", "integer")


def test_a_layer_no_kernel_takes_is_simulated_and_says_so() -> None:
    layer = make(None, scheme(Integer(4), "token"), dtype=torch.bfloat16)
    model = Model(layer)
    (found,) = kernels.use(model)
    assert found.simulated
    assert (found.decode, found.prefill) == ("simulate", "simulate")
    assert set(found.refused) == set(KERNELS) - {"simulate"}
    assert found.refused["tiled"] == "the weight is not quantized"
    assert layer.execution is None


def test_refusals_name_the_reason() -> None:
    def reason(name: str, layer: QuantizedLinear, dtype: torch.dtype = torch.bfloat16) -> str:
        return kernels.assign("one", layer, dtype=dtype).refused[name]

    w4 = make(scheme(Integer(4), "channel"))
    assert "float32 the op falls to a slow path" in reason("int4pack", w4, torch.float32)
    assert "float16" in reason("int4pack", w4, torch.float16)
    assert "multiple of 32, not 43" in reason("int4pack", make(scheme(Integer(4), 43)))
    assert "8-bit" in reason("int8pack", w4)
    assert "multiple of 16 inputs, not 172" in reason(
        "int8pack", make(scheme(Integer(8), "channel"))
    )
    assert "groups of 64" in reason("int8pack", make(scheme(Integer(8), 64)))
    assert "stay in floating point" in reason("integer", w4)
    assert "4-bit integer" in reason("int4pack", make(scheme(Minifloat(), 32)))
    there = torch.device("cuda")
    found = kernels.assign("one", w4, dtype=torch.bfloat16, device=there)
    assert "the layer is on cuda" in found.refused["int4pack"]


def test_a_kernel_asked_for_by_name() -> None:
    w4, w8 = (
        make(scheme(Integer(bits), "channel"), width=176, dtype=torch.bfloat16) for bits in (4, 8)
    )
    first, second = kernels.use(Model(w4, w8), "int8pack")
    assert (first.decode, second.decode) == ("simulate", "int8pack")
    assert "8-bit" in first.refused["int8pack"]
    with pytest.raises(
        SettingsError, match="int8pack takes no layer of this model: it takes 8-bit"
    ):
        kernels.use(Model(make(scheme(Integer(4), "channel"))), "int8pack")
    with pytest.raises(UnknownNameError, match="Did you mean 'int8pack'"):
        kernels.use(Model(w8), "int8pak")


# What a model that runs on kernels can and cannot do


def int4_model() -> Model:
    return Model(make(scheme(Integer(4), 64), width=192, channels=64, dtype=torch.bfloat16))


def test_the_weight_is_held_once() -> None:
    model = int4_model()
    stored = model.layers[0].codes.nbytes
    kernels.use(model)
    assert "layers.0.codes" not in dict(model.named_buffers())
    assert stored <= kernels.extra_bytes(model) <= stored + 64
    kernels.use(model, "simulate")
    assert kernels.extra_bytes(model) == 0
    assert "layers.0.codes" in dict(model.named_buffers())


def test_the_default_is_the_simulation() -> None:
    model, x = int4_model(), inputs(3, 192, torch.bfloat16)
    (before,) = model(x)
    assert torch.equal(before, model.layers[0].simulate(x))
    kernels.use(model)
    with torch.no_grad(), hold_dense(model):
        # Asked for the dense weight by name.
        assert torch.equal(model(x)[0], before)
    kernels.use(model, "simulate")
    assert torch.equal(model(x)[0], before)


def test_statistics_of_unquantized_inputs_are_simulated() -> None:
    layer = make(scheme(Integer(4), "channel"), scheme(Integer(4), "token"))
    model, x = Model(layer, dtype=torch.float32), inputs(3, 172, torch.float32)
    layer.quantize_input = False
    (before,) = model(x)
    kernels.use(model, "integer")
    assert torch.equal(model(x)[0], before)


def test_transforms_come_first() -> None:
    transform = BlockHadamard(172, 86).randomize(torch.Generator().manual_seed(1), keep_first=True)
    layer = make(scheme(Integer(4), "channel"), scheme(FREE4, "token"), transform=transform)
    model, x = Model(layer, dtype=torch.float32), inputs(3, 172, torch.float32)
    (before,) = model(x)
    kernels.use(model, "integer")
    assert torch.allclose(model(x)[0], before, atol=1e-4)


def test_shapes_of_the_input() -> None:
    model = int4_model()
    x = inputs(12, 192, torch.bfloat16)
    kernels.use(model, "int4pack")
    with torch.no_grad():
        (flat,) = model(x)
        assert torch.equal(model(x.view(3, 4, 192))[0], flat.view(3, 4, 64))
        turned = model(x.view(3, 4, 192).transpose(0, 1))[0]
        assert torch.equal(turned, flat.view(3, 4, 64).transpose(0, 1))
        assert model(x[:0])[0].shape == (0, 64)
        assert model(x[0])[0].shape == (64,)


def test_refused_while_on_kernels() -> None:
    model = int4_model()
    kernels.use(model)
    with pytest.raises(SettingsError, match="cannot be moved or cast"):
        model.float()
    with pytest.raises(SettingsError, match="cannot be given another weight"):
        model.load_state_dict(model.state_dict())
    x = inputs(2, 192, torch.bfloat16)
    with pytest.raises(SettingsError, match=r"chosen for torch\.bfloat16 activations"):
        model(x.float())
    with pytest.raises(SettingsError, match="no gradients"):
        model(x.requires_grad_())
    kernels.use(model, "simulate")
    model.float()


def test_a_copy_runs_on() -> None:
    model, x = int4_model(), inputs(2, 192, torch.bfloat16)
    kernels.use(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x)[0], model(x)[0])


def test_using_twice() -> None:
    model = int4_model()
    codes = model.layers[0].codes.clone()
    kernels.use(model, "int4pack")
    kernels.use(model, "tiled")
    kernels.use(model, "auto")
    assert torch.equal(model.layers[0].codes, codes)
