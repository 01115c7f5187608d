"""The Triton kernels against the simulation, in Triton's interpreter; their programs compiled for GPUs."""

from __future__ import annotations

import importlib
import itertools
import sys
from typing import Any

import pytest
import torch
from tests.surgery.kernels.test_kernels import FREE4, FREE8, check, inputs, make, scheme

from postlude.numerics.formats import Integer, Minifloat
from postlude.surgery import kernels

PROGRAMS = "postlude.surgery.kernels.triton_programs"


def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The programs anew: triton looks at the variable where a program is defined."""
    pytest.importorskip("triton", reason="needs triton: pip install 'postlude[gpu]'")
    package = importlib.import_module("postlude.surgery.kernels")
    monkeypatch.delitem(sys.modules, PROGRAMS, raising=False)
    monkeypatch.setattr(package, "triton_programs", None, raising=False)
    return importlib.import_module(PROGRAMS)


@pytest.fixture(scope="module")
def programs() -> Any:
    """Defined for the interpreter."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        made = load(monkeypatch)
    sys.modules.pop(PROGRAMS, None)
    return made


@pytest.fixture
def interpreted(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in the interpreter, on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, PROGRAMS, programs)
    monkeypatch.setattr(kernels, "triton_programs", programs, raising=False)


SHAPES = [(172, 44), (256, 64), (33, 5)]


FORMS = [Integer(4), FREE4, Integer(8), FREE8, Integer(2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("group", ["channel", "tensor", 32, 64, 128, 43])
def test_packed(interpreted: None, group: Any) -> None:
    # Every format with one row and with several, every type and both ends of the widths in turn.
    turn = itertools.cycle(itertools.product(DTYPES, SHAPES))
    for form, rows in itertools.product(FORMS, (1, 7)):
        dtype, (width, channels) = next(turn)
        layer = make(scheme(form, group), width=width, channels=channels, dtype=dtype)
        check(layer, "triton_packed", inputs(rows, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_shapes(interpreted: None, dtype: torch.dtype) -> None:
    for (width, channels), rows in zip([*SHAPES, (512, 130)], (64, 33, 16, 65), strict=True):
        layer = make(
            scheme(FREE4, 64), width=width, channels=channels, bias=width == 33, dtype=dtype
        )
        check(layer, "triton_packed", inputs(rows, width, dtype))


@pytest.mark.parametrize("rows", [1, 3])
def test_packed_with_zero_points_far_outside_the_codes(interpreted: None, rows: int) -> None:
    layer = make(scheme(FREE4, 64), shift=300.0)
    assert layer.zero_point is not None and layer.zero_point.abs().min() > 500
    check(layer, "triton_packed", inputs(rows, 172, torch.float32))


WEIGHTS = [Integer(8), FREE8, Integer(4), FREE4, Integer(2)]
INPUTS = [Integer(8), FREE4, Integer(4), FREE8, Integer(6, False, "zero")]


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
def test_integer(interpreted: None, group: Any, input_group: Any) -> None:
    for weight, input, dtype in zip(WEIGHTS, INPUTS, [*DTYPES, *DTYPES[:2]], strict=True):
        layer = make(scheme(weight, group), scheme(input, input_group), dtype=dtype)
        check(layer, "triton_integer", inputs(5, 172, dtype))


@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("width, channels", [(256, 64), (33, 5), (512, 130)])
def test_integer_shapes(interpreted: None, rows: int, width: int, channels: int) -> None:
    for weight, input in ((Integer(8), Integer(8)), (Integer(4), FREE4)):
        layer = make(
            scheme(weight, "channel"), scheme(input, "token"), width=width, channels=channels
        )
        check(layer, "triton_integer", inputs(rows, width, torch.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_with_zero_points_far_outside_the_codes(interpreted: None, bits: int) -> None:
    form = Integer(bits, symmetric=False, range="free")
    layer = make(scheme(Integer(4), "channel"), scheme(form, 43))
    check(layer, "triton_integer", inputs(6, 172, torch.float32, shift=800.0))


def test_refusals() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def reason(name: str, weight: Any, input: Any, device: torch.device) -> str | None:
        layer = make(weight, input)
        return kernels.KERNELS[name].takes(layer, torch.bfloat16, device)

    w4, a8 = scheme(Integer(4), "channel"), scheme(Integer(8), "token")
    assert reason("triton_packed", w4, None, cpu) == "runs on a GPU, the layer is on cpu"
    assert reason("triton_packed", scheme(Integer(3), 64), None, gpu) == (
        "takes integer weights of 2, 4 or 8 bits"
    )
    assert "stay in floating point" in str(reason("triton_integer", w4, None, gpu))
    assert "not 3" in str(reason("triton_integer", scheme(Integer(3), 64), a8, gpu))
    assert "integer weights" in str(reason("triton_integer", scheme(Minifloat(), 32), a8, gpu))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    layer = make(scheme(Integer(4), "channel"))
    found = kernels.assign("one", layer, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert "pip install" in found.refused["triton_packed"]
    assert found.decode == "tiled"


SIGNATURES = {
    "packed_rows": "x codes scale zero bias out int int int int int int",
    "integer_rows": "u f32 codes scale zero i32 f32 int int int int int int int int",
}
TYPES = {
    "x": "*bf16", "out": "*bf16", "bias": "*bf16", "codes": "*u8", "scale": "*fp16", "zero": "*i16",
    "u": "*i8", "f32": "*fp32", "i32": "*i32", "int": "i32",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_programs_compile(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    programs = load(monkeypatch)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, one_row in (("packed_rows", True), ("packed_rows", False), ("integer_rows", False)):
        program, kinds = getattr(programs, name), SIGNATURES[name]
        for bits, has_zero, one_group in ((4, True, True), (8, False, False), (2, True, False)):
            constants: dict[str, Any] = {
                "BITS": bits, "GROUP": 64, "ZERO": 8.0, "HAS_ZERO": has_zero, "HAS_BIAS": True,
                "ONE_GROUP": one_group, "ONE_ROW": one_row, "WIDE": False,
                "BLOCK_M": 1 if one_row else 16, "BLOCK_N": 16 if one_row else 64, "BLOCK_J": 64,
            }  # fmt: skip
            constants = {key: constants[key] for key in program.arg_names if key.isupper()}
            free = [key for key in program.arg_names if not key.isupper()]
            signature = dict(zip(free, [TYPES[kind] for kind in kinds.split()], strict=True))
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(program, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert ("mma" in made.asm["ptx"]) != one_row
