"""Weights of a loaded checkpoint are the pages of its file, read when they are needed and never copied."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import postlude as pl
from postlude.quantization import RTN
from postlude.runs import weights
from postlude.runs.loading import load
from postlude.surgery import kernels
from postlude.surgery.layers import QuantizedLinear

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def mapped(directory: Path) -> list[tuple[int, int]]:
    """Addresses at which this process has mapped the weights."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        found = [line.split() for line in lines if str(directory) in line]
    ranges = [entry[0].split("-") for entry in found]
    return [(int(start, 16), int(stop, 16)) for start, stop in ranges]


def copied(model: Any, directory: Path) -> list[str]:
    """Tensors that lie elsewhere."""
    ranges = mapped(directory)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        name
        for name, tensor in tensors.items()
        if not any(start <= tensor.data_ptr() < stop for start, stop in ranges)
    ]


@pytest.fixture
def packed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    small = pl.quantize(
        pl.load(make_checkpoint("llama", dtype="bfloat16"), device="cpu"),
        RTN(weights=4, activations=16, kv=16),
    )
    small.save(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_weights_are_mapped(make_checkpoint: Callable[..., Path], dtype: str) -> None:
    directory = make_checkpoint("llama", dtype=dtype)
    left = copied(load(directory, device="cpu").model, directory)
    assert all("rotary" in name for name in left)


def test_packed_weights_are_mapped(packed: Path) -> None:
    model = load(packed, device="cpu").model
    assert any(name.endswith(".codes") for name, _ in model.named_buffers())
    assert all("rotary" in name for name in copied(model, packed))


def test_kernels_hold_one_copy(packed: Path) -> None:
    model = load(packed, device="cpu").model
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    # Blocks of 64 channels, and inputs padded to groups of 32.
    padded = [-(-one.out_features // 64) * 32 * -(-one.in_features // 32) * 32 for one in layers]
    found = kernels.use(model)
    assert {one.layout for one in found} == {"int4pack"}
    # The order of the op is a copy; what it was made from is given up, and only scales stay mapped.
    assert not any(name.endswith(".codes") for name, _ in model.named_buffers())
    assert kernels.extra_bytes(model) == sum(padded)


def test_pages_of_what_was_given_up_are_handed_back(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from postlude.surgery.kernels.pages import FilePages

    file = tmp_path / "one.safetensors"
    original = torch.randint(0, 255, (1 << 22,), dtype=torch.uint8)
    save_file({"codes": original}, file)
    with safe_open(file, framework="pt") as store:
        codes = store.get_tensor("codes")

    def resident() -> int:
        """Bytes of the file that this process holds."""
        with open("/proc/self/smaps", encoding="utf-8") as lines:
            inside = total = 0
            for line in lines:
                words = line.split()
                if "-" in words[0] and not words[0].endswith(":"):
                    inside = str(file) in line
                elif inside and words[0] == "Rss:":
                    total += int(words[1]) * 1024
        return total

    assert torch.equal(codes, original)
    before = resident()
    assert FilePages().release(codes)
    assert resident() <= before
    # Read again, they are what they were.
    assert torch.equal(codes, original)
    assert not FilePages().release(original)


def test_codes_are_not_read_to_find_nan(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    original = weights._not_finite
    monkeypatch.setattr(
        weights, "_not_finite", lambda part: seen.append(part.dtype) or original(part)
    )
    load(packed, device="cpu")
    assert seen and torch.uint8 not in seen
