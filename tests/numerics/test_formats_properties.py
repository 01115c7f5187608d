"""What every number format and granularity keeps to, whatever the numbers; and packing, whatever the codes."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from postlude.numerics.formats import (
    Codebook,
    Format,
    Integer,
    Logarithmic,
    Minifloat,
    Power,
    Ternary,
)
from postlude.numerics.packing import pack, packed_width, unpack
from postlude.numerics.schemes import Encoded, Granularity, Scheme

from ..properties import EXAMPLES, every

FORMATS: st.SearchStrategy[Format] = st.one_of(
    st.builds(Integer, bits=st.integers(2, 8), narrow=st.booleans()),
    st.builds(
        Integer,
        bits=st.integers(1, 8),
        symmetric=st.just(False),
        range=st.sampled_from(["free", "zero"]),
    ),
    st.builds(
        Minifloat,
        exponent_bits=st.integers(1, 4),
        mantissa_bits=st.integers(0, 3),
        reserve_top=st.booleans(),
    ).filter(lambda form: max(form.levels()) > 0),
    st.builds(Power, bits=st.integers(2, 8), exponent=st.floats(0.2, 1)),
    st.builds(Logarithmic, bits=st.integers(2, 5), base=st.floats(1.2, 4), signed=st.booleans()),
    st.just(Ternary()),
    st.builds(
        Codebook,
        st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True).map(
            lambda values: tuple(sorted(value / 8 for value in values))
        ),
    ),
)
GRANULARITIES = st.one_of(
    st.sampled_from([Granularity("tensor"), Granularity("channel"), Granularity("token")]),
    st.builds(Granularity, st.just("group"), st.integers(1, 40)),
)
SCHEMES = st.builds(
    Scheme, FORMATS, GRANULARITIES, st.sampled_from(["float16", "bfloat16", "float32"])
)


@st.composite
def tensors(draw: Any, largest: float = 1e4) -> Tensor:
    """``[rows, width]``, 1 to 3 rows of 1 to 50 numbers, many of them alike or zero."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 50))
    number = st.one_of(
        st.just(0.0), st.sampled_from([1.0, -1.0, 0.5]), st.floats(-largest, largest, width=32)
    )
    values = draw(st.lists(number, min_size=rows * width, max_size=rows * width))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, width)


def levels(form: Format, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """What the codes of every group stand for: ``[..., groups, codes]``."""
    count = len(form.levels()) if hasattr(form, "levels") else 2**form.code_bits
    codes = torch.arange(count, dtype=torch.uint8).expand(*scale.shape, count)
    zero = None if zero_point is None else zero_point.unsqueeze(-1)
    return form.decode(codes, scale.unsqueeze(-1), zero)


@EXAMPLES
def test_codes_fit_and_values_are_among_the_levels(examples: int) -> None:
    @every(examples, scheme=SCHEMES, x=tensors())
    def _(scheme: Scheme, x: Tensor) -> None:
        encoded = scheme.encode(x)
        assert encoded.codes.shape == x.shape and encoded.codes.dtype == torch.uint8
        assert int(encoded.codes.max()) < 2**scheme.format.code_bits
        values = encoded.decode()
        assert torch.isfinite(values).all()
        scale, zero = encoded.scale.float(), encoded.zero_point
        known = levels(scheme.format, scale, None if zero is None else zero.float())
        grouped = scheme.granularity.split(values)
        assert (grouped >= known.amin(-1, keepdim=True)).all()
        assert (grouped <= known.amax(-1, keepdim=True)).all()


@EXAMPLES
def test_a_second_rounding_changes_nothing(examples: int) -> None:
    @every(examples, scheme=SCHEMES, x=tensors())
    def _(scheme: Scheme, x: Tensor) -> None:
        parameters = scheme.parameters(x)
        once = scheme.encode(x, parameters)
        twice = scheme.encode(once.decode(), parameters)
        assert torch.equal(once.decode(), twice.decode())


@EXAMPLES
def test_the_order_of_numbers_is_kept(examples: int) -> None:
    @every(examples, form=FORMATS, x=tensors())
    def _(form: Format, x: Tensor) -> None:
        scheme = Scheme(form, Granularity("token"), "float32")
        ordered = x.sort(-1).values
        steps = scheme.round_trip(ordered).diff(dim=-1)
        assert (steps >= 0).all()


@EXAMPLES
def test_uniform_grids_err_by_half_a_step(examples: int) -> None:
    @every(
        examples,
        form=st.builds(
            Integer, bits=st.integers(1, 8), symmetric=st.just(False), range=st.just("zero")
        ),
        granularity=GRANULARITIES,
        x=tensors(),
    )
    def _(form: Integer, granularity: Granularity, x: Tensor) -> None:
        scheme = Scheme(form, granularity, "float32")
        scale, _ = scheme.parameters(x)
        error = (granularity.split(scheme.round_trip(x)) - granularity.split(x)).abs()
        # The zero point is rounded, too: up to half a step at either end of the range.
        assert (error <= scale.unsqueeze(-1) * (1 + 1e-5)).all()
        inner = Scheme(Integer(form.bits if form.bits > 1 else 2), granularity, "float32")
        scale, _ = inner.parameters(x)
        error = (granularity.split(inner.round_trip(x)) - granularity.split(x)).abs()
        assert (error <= scale.unsqueeze(-1) * (0.5 + 1e-5)).all()


@EXAMPLES
def test_grids_take_a_nearest_level(examples: int) -> None:
    @every(
        examples,
        form=FORMATS.filter(lambda form: not isinstance(form, Integer | Power)),
        x=tensors(),
    )
    def _(form: Format, x: Tensor) -> None:
        scheme = Scheme(form, Granularity("channel"), "float32")
        encoded = scheme.encode(x)
        known = levels(form, encoded.scale, None)
        distance = (x.unsqueeze(-1) - known).abs()
        chosen = (encoded.decode() - x).abs()
        assert torch.allclose(chosen, distance.amin(-1), rtol=1e-4, atol=1e-30)


@EXAMPLES
def test_a_scheme_is_what_its_json_says(examples: int) -> None:
    @every(examples, scheme=SCHEMES)
    def _(scheme: Scheme) -> None:
        assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@EXAMPLES
def test_stored_bits_are_the_bits_that_are_stored(examples: int) -> None:
    @every(examples, scheme=SCHEMES, x=tensors())
    def _(scheme: Scheme, x: Tensor) -> None:
        encoded: Encoded = scheme.encode(x)
        packed = pack(encoded.codes, scheme.format.code_bits)
        parts = [packed, encoded.scale]
        parts += [] if encoded.zero_point is None else [encoded.zero_point]
        stored = 8 * sum(part.numel() * part.element_size() for part in parts)
        assert scheme.stored_bits(*x.shape) == stored
        codes = unpack(packed, scheme.format.code_bits, x.shape[-1])
        again = scheme.decode(codes, encoded.scale, encoded.zero_point)
        assert torch.equal(again, encoded.decode())


@EXAMPLES
def test_numbers_of_any_size_stay_finite(examples: int) -> None:
    """Also where the scale does not fit the type it is stored in: the largest numbers are then too small."""

    @every(examples, scheme=SCHEMES, x=tensors(largest=2.0**100))
    def _(scheme: Scheme, x: Tensor) -> None:
        assert torch.isfinite(scheme.round_trip(x)).all()


@EXAMPLES
def test_packing_is_exact(examples: int) -> None:
    shapes = st.lists(st.integers(0, 4), max_size=2)

    @every(examples, bits=st.integers(1, 8), lead=shapes, width=st.integers(0, 70), data=st.data())
    def _(bits: int, lead: list[int], width: int, data: Any) -> None:
        count = math.prod(lead) * width
        values = data.draw(st.binary(min_size=count, max_size=count))
        codes = torch.tensor([v % 2**bits for v in values], dtype=torch.uint8)
        codes = codes.reshape(*lead, width)
        packed = pack(codes, bits)
        assert packed.shape == (*lead, packed_width(width, bits))
        assert torch.equal(unpack(packed, bits, width), codes)
        # The bits beyond the last code are zero, so that equal codes are equal bytes.
        tail = packed.shape[-1] * 8 - width * bits
        if tail and packed.numel():
            assert (packed[..., -1] >> (8 - tail) == 0).all()
