"""The arithmetic, against worked examples made by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from postlude.attribution.lorif import LoRIF
from postlude.attribution.plan import (
    HARDWARE,
    Hardware,
    LayerShape,
    ModelShape,
    assumed_shape,
    parse_count,
    plan,
    shape_of,
    table,
    this_machine,
)
from postlude.errors import SettingsError, UnknownNameError

GPT2 = ModelShape(
    (
        LayerShape(768, 2304, 12),
        LayerShape(768, 768, 12),
        LayerShape(768, 3072, 12),
        LayerShape(3072, 768, 12),
    )
)
H100 = HARDWARE["h100"]


@pytest.mark.parametrize(
    ("f", "c", "r", "index", "saved", "largest", "projection", "factorisation", "svd"),
    [
        (16, 1, 2048, 4.3e9, 2.7e9, 0.075e9, 4.8e15, 2.6e12, 2.9e15),
        (4, 1, 4096, 17.1e9, 87.0e9, 2.4e9, 1.9e16, 4.2e13, 9.1e16),
        (4, 32, 16_384, 548.7e9, 347.9e9, 9.7e9, 1.9e16, 2.6e15, 3.6e17),
    ],
)
def test_gpt2_small(
    f: int, c: int, r: int, index: float, saved: float, largest: float,
    projection: float, factorisation: float, svd: float,
) -> None:  # fmt: skip
    """Blocks of 512 tokens of WikiText-103."""
    found = plan(
        GPT2, H100, examples=232_585, tokens=512, factor=f, rank=c, curvature_rank=r, format="bf16"
    )
    assert GPT2.parameters == pytest.approx(84.9e6, rel=1e-3)
    assert found.bytes["index"] == pytest.approx(index, abs=0.05e9)
    assert found.bytes["curvature"] == pytest.approx(saved, abs=0.05e9)
    assert found.bytes["curvature_layer"] == pytest.approx(largest, rel=0.04)
    assert found.flops["gradients"] == pytest.approx(4.0e16, rel=0.04)
    assert found.flops["projection"] == pytest.approx(projection, rel=0.04)
    assert found.flops["factorisation"] == pytest.approx(factorisation, rel=0.04)
    assert found.flops["svd"] == pytest.approx(svd, rel=0.04)


@pytest.mark.parametrize(
    ("f", "r", "bf16", "int8", "dense", "saved", "largest", "entries", "route1", "route2"),
    [
        (16, 1024, 1.62e12, 0.81e12, 535e12, 1.10e12, 3.8e9, 15.4e9, 5.5e17, 5.3e14),
        (32, 1024, 0.81e12, 0.40e12, 134e12, 0.27e12, 0.94e9, 7.7e9, 1.4e17, 1.3e14),
        (64, 1024, 0.40e12, 0.20e12, 33.4e12, 0.068e12, 0.23e9, 3.8e9, 3.4e16, 3.3e13),
        (64, 4096, 0.40e12, 0.20e12, 33.4e12, 0.27e12, 0.94e9, 3.8e9, 1.4e17, 3.3e13),
    ],
)
def test_seventy_billion(
    f: int, r: int, bf16: float, int8: float, dense: float, saved: float, largest: float,
    entries: float, route1: float, route2: float,
) -> None:  # fmt: skip
    shape = assumed_shape(70e9)
    assert (shape.count, shape.parameters) == (560, 68_451_041_280)
    found = plan(shape, H100, examples=10**6, factor=f, curvature_rank=r)
    small = plan(shape, H100, examples=10**6, factor=f, curvature_rank=r, format="int8")
    assert found.bytes["index"] == pytest.approx(bf16, rel=0.04)
    # Scales, at two bytes, are 2 GB of it.
    assert small.bytes["index"] == pytest.approx(int8 + 2.24e9, rel=0.04)
    assert small.bytes["index"] - found.bytes["index"] / 2 == pytest.approx(2.24e9)
    assert found.bytes["dense_index"] == pytest.approx(dense, rel=0.01)
    assert found.bytes["curvature"] == pytest.approx(saved, rel=0.04)
    assert found.bytes["curvature_layer"] == pytest.approx(largest, rel=0.04)
    assert found.bytes["projection_entries"] == pytest.approx(entries, rel=0.015)
    assert found.flops["gradients"] == pytest.approx(1.40e20, rel=0.01)
    assert found.flops["coefficients"] == pytest.approx(route1, rel=0.04)
    assert found.flops["pairs"] == pytest.approx(route2, rel=0.04)
    assert found.read["fit"] == 5 * found.read["score"] == 5 * found.bytes["index"]


def test_a_sum_by_hand() -> None:
    """One layer 8 x 12 at factor 4: widths 2 and 3."""
    shape = ModelShape((LayerShape(8, 12),))
    machine = Hardware(
        "m", flops=1e3, memory_bandwidth=100, disk_bandwidth=10, memory=1000, utilisation=0.5
    )
    found = plan(
        shape, machine, examples=100, tokens=10, queries=3, factor=4, rank=2, curvature_rank=4, format="int8"
    )  # fmt: skip
    assert found.bytes["index"] == 100 * (2 * 5 + 2 * 2 * 2)
    assert found.bytes["dense_index"] == 600
    assert found.flops["gradients"] == 4 * 96 * 1000
    assert found.flops["projection"] == 2 * 1000 * (8 * 2 + 12 * 3)
    assert found.flops["outer"] == 2 * 1000 * 6
    assert found.flops["factorisation"] == 100 * 66 * 2 * 6
    assert found.flops["svd"] == 18 * 100 * 6 * 6
    assert found.flops["pairs"] == 3 * 100 * 2 * 2 * 6
    assert found.flops["query"] == 4 * 6 * 4
    # 1800 bytes do not fit into a memory of 1000, so they come from the disk.
    assert found.read["fit"] == 9000
    assert found.seconds["fit"] == pytest.approx(900)
    work = sum(found.flops[name] for name in ("gradients", "projection", "outer", "factorisation"))
    assert found.seconds["build"] == pytest.approx(work / 500)


def test_a_rank_beyond_the_width_stores_no_more() -> None:
    shape = ModelShape((LayerShape(8, 12),))
    four, two = (plan(shape, H100, examples=10, factor=4, rank=c) for c in (4, 2))
    assert four.bytes["index"] == two.bytes["index"]


def test_table_has_every_combination() -> None:
    found = table(GPT2, H100, factors=(4, 8), ranks=(1, 2), formats=("bf16", "int8"), examples=1000)
    assert len({(one.factor, one.rank, one.format) for one in found}) == 8


def test_devices_share_a_disk() -> None:
    four = H100.times(4)
    assert (four.flops, four.memory) == (4 * H100.flops, 4 * H100.memory)
    assert four.disk_bandwidth == H100.disk_bandwidth
    assert four.name == "4 x h100"
    with pytest.raises(SettingsError, match="devices is 0"):
        H100.times(0)


def test_shape_of_a_checkpoint(tiny_llama_dir: object) -> None:
    from postlude.runs.loading import load

    shape = shape_of(load(tiny_llama_dir))  # type: ignore[arg-type]
    assert shape.count == 14
    assert shape.parameters == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 44)


def test_assumed_shapes_have_about_the_parameters_asked_for() -> None:
    for parameters in (124e6, 1e9, 8e9, 70e9, 405e9):
        assert assumed_shape(parameters).parameters == pytest.approx(parameters, rel=0.12)
    with pytest.raises(SettingsError, match="a million or more"):
        assumed_shape(1000)


def test_counts() -> None:
    assert [parse_count(t) for t in ("70B", "5m", "1.5k", "600", "2e3")] == [
        70e9,
        5e6,
        1500,
        600,
        2000,
    ]
    with pytest.raises(SettingsError, match="--examples is 'many'"):
        parse_count("many", "--examples")


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="int8"):
        plan(GPT2, H100, examples=10, format="int9")
    with pytest.raises(SettingsError, match="examples is 0"):
        plan(GPT2, H100, examples=0)
    with pytest.raises(SettingsError, match="utilisation is 0"):
        Hardware("m", 1, 1, 1, 1, utilisation=0)


def test_this_machine_is_measured() -> None:
    found = this_machine()
    assert 1e8 < found.flops < 1e14
    assert 1e8 < found.memory_bandwidth < 1e13
    assert f"{torch.get_num_threads()} thread" in found.name


def test_defaults_are_those_of_lorif() -> None:
    found = plan(GPT2, H100, examples=10)
    default = LoRIF()
    assert (found.factor, found.rank, found.format, found.curvature_rank, found.tokens) == (
        default.projection_factor, default.rank, default.format, default.curvature_rank, 512,
    )  # fmt: skip
    known = dataclasses.replace(GPT2, context=1024)
    assert plan(known, H100, examples=10).tokens == 1024
    assert plan(known, H100, examples=10, tokens=64).tokens == 64
