"""Foreign checkpoints against a float model that holds their decoded weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import postlude as pl
from postlude.errors import CheckpointError, NonFiniteError
from postlude.runs.loading import load
from postlude.surgery import kernels
from postlude.surgery.layers import QuantizedLinear

from . import writers

TOKENS = torch.randint(0, 259, (2, 12), generator=torch.Generator().manual_seed(7))
SIZES = {"hidden_size": 32, "intermediate_size": 64}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(TOKENS, use_cache=False).logits
    return result


def random_layer(
    weight: Tensor, bits: int, group: int, seed: int, order: bool
) -> tuple[Tensor, ...]:
    """Codes, zero points, scales and groups of the inputs of one linear; values of its usual size."""
    generator = torch.Generator().manual_seed(seed)
    out, width = weight.shape
    groups = width // group
    codes = torch.randint(0, 2**bits, (out, width), generator=generator)
    zeros = torch.randint(0, 2**bits, (out, groups), generator=generator)
    scale = (torch.rand(out, groups, generator=generator) + 0.5) * 0.2 / 2 ** (bits - 1)
    g_idx = torch.arange(width) // group
    if order:
        g_idx = g_idx[torch.randperm(width, generator=generator)]
    return codes, zeros, scale.half(), g_idx


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen2", **SIZES)


def write(
    source: Path, out: Path, quantization: dict[str, Any], bits: int, order: bool, pack: Any
) -> Any:
    """A foreign checkpoint, and the float model with its decoded weights."""
    reference = load(source).model
    group = quantization["group_size"]

    def layer(path: str, weight: Tensor) -> dict[str, Tensor]:
        parts = random_layer(
            weight, bits, weight.shape[1] if group < 0 else group, len(path), order
        )
        reference.get_submodule(path).weight.data.copy_(writers.decoded(*parts))
        made: dict[str, Tensor] = pack(*parts)
        return made

    writers.rewrite(source, out, quantization, layer)
    return reference


def settings(method: str, bits: int = 4, group: int = 16, **more: Any) -> dict[str, Any]:
    return {"quant_method": method, "bits": bits, "group_size": group, **more}


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize(
    ("bits", "group", "order"), [(4, 16, False), (4, 16, True), (8, -1, False), (2, 32, True)]
)
def test_gptq(
    source: Path, tmp_path: Path, layout: str | None, bits: int, group: int, order: bool
) -> None:
    quantization = settings("gptq", bits, group, desc_act=order, sym=False)
    if layout is not None:
        quantization["checkpoint_format"] = layout
    minus = int(layout != "gptq_v2")
    reference = write(
        source,
        tmp_path / "in",
        quantization,
        bits,
        order,
        lambda *parts: writers.gptq(*parts, bits, minus),
    )
    found = load(tmp_path / "in")
    torch.testing.assert_close(logits(found.model), logits(reference), atol=2e-5, rtol=0)
    layer = found.model.model.layers[1].mlp.down_proj
    assert isinstance(layer, QuantizedLinear)
    assert (layer.transform is not None) == order
    assert layer.weight_scheme.format.bits == bits
    # Saved as our own, it is the same model, and its weights are as packed as they came.
    again = load(found.save(tmp_path / "out"))
    assert torch.equal(logits(again.model), logits(found.model))
    assert again.model.model.layers[1].mlp.down_proj.codes.nbytes == layer.codes.nbytes


def test_symmetric_gptq_needs_no_zero_points(source: Path, tmp_path: Path) -> None:
    def pack(codes: Tensor, zeros: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        return writers.gptq(codes, zeros.fill_(8), *rest, 4, 1)

    reference = load(source).model

    def layer(path: str, weight: Tensor) -> dict[str, Tensor]:
        codes, zeros, scale, g_idx = random_layer(weight, 4, 16, 3, False)
        made = pack(codes, zeros, -scale, g_idx)  # auto-round writes negative scales
        reference.get_submodule(path).weight.data.copy_(
            writers.decoded(codes, zeros, -scale, g_idx)
        )
        return made

    writers.rewrite(source, tmp_path / "in", settings("gptq", sym=True), layer)
    found = load(tmp_path / "in")
    assert found.model.model.layers[0].mlp.up_proj.zero_point is None
    torch.testing.assert_close(logits(found.model), logits(reference), atol=2e-5, rtol=0)
    kernels.use(found.model, "auto")
    torch.testing.assert_close(logits(found.model), logits(reference), atol=2e-5, rtol=0)


def test_awq_then_everything_else(source: Path, tmp_path: Path, some_text: str) -> None:
    reference = write(
        source, tmp_path / "in", settings("awq", version="gemm", zero_point=True), 4, False,
        lambda *parts: writers.awq(*parts[:3]),
    )  # fmt: skip
    found = load(tmp_path / "in")
    torch.testing.assert_close(logits(found.model), logits(reference), atol=2e-5, rtol=0)
    # What people want it for: inspect, evaluate, generate on kernels, export.
    assert pl.evaluate(found, [some_text[:60]])["perplexity"] > 0
    assert pl.inspect(found, ["outliers"], text=[some_text], samples=2, length=16)
    assert pl.generate(found, "The", max_new_tokens=2).tokens == 2
    kernels.use(found.model, "auto")
    torch.testing.assert_close(logits(found.model), logits(reference), atol=1e-2, rtol=0)
    kernels.use(found.model, "simulate")
    pl.export(found, "compressed-tensors", tmp_path / "ct", check=False)
    assert torch.equal(logits(load(tmp_path / "ct").model), logits(found.model))


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        (settings("gptq", bits=3), r"GPTQ checkpoint has 3-bit codes \(expected 2, 4, 8\).*float model"),
        (settings("gptq", checkpoint_format="marlin"), r"in the layout 'marlin' \(expected gptq or gptq_v2\)"),
        (settings("gptq", dynamic={"-:.*": {}}), r"settings of its own for some layers"),
        (settings("gptq"), r"no layer has a qweight"),
        (settings("awq", bits=8), r"AWQ checkpoint has 8-bit codes \(expected 4\)"),
        (settings("awq", version="gemv"), r"in the layout 'gemv' \(expected gemm\)"),
        ({"quant_method": "compressed-tensors", "transform_config": {"R4": {}}}, r"rotates or transforms activations"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, r"quantizes keys and values"),
        ({"quant_method": "compressed-tensors", "quantization_status": "frozen"}, r"status 'frozen'"),
        ({"quant_method": "bitsandbytes"}, r"already quantized by 'bitsandbytes'.*layout of awq, compressed-tensors"),
    ],
)  # fmt: skip
def test_unknown_variants_are_refused(
    source: Path, tmp_path: Path, quantization: dict[str, Any], reason: str
) -> None:
    writers.rewrite(source, tmp_path / "in", quantization, lambda path, weight: {"weight": weight})
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "in")


@pytest.mark.parametrize(
    ("group", "tensors", "reason"),
    [
        ({"weights": {"num_bits": 3}}, {}, r"3-bit codes in .* \(expected 4 or 8\)"),
        ({"format": "nvfp4-pack-quantized"}, {}, r"as 'nvfp4-pack-quantized' \(expected pack-quantized"),
        ({"weights": {"strategy": "block"}}, {}, r"shares the scales of .* by 'block'"),
        ({"input_activations": {"dynamic": False}}, {}, r"by a stored scale \(expected one per token"),
        ({"output_activations": {"num_bits": 8}}, {}, r"rounds the output"),
        ({"targets": ["re:.*nothing"]}, {}, r"no group of the configuration names it"),
        ({}, {"weight_scale": torch.ones(5, 1)}, r"scale of .* has shape \(5, 1\), expected \(\d+, 1\)"),
        ({}, {"weight_packed": None}, r"has no .*weight_packed"),
    ],
)  # fmt: skip
def test_parts_of_compressed_tensors_are_refused(
    source: Path, tmp_path: Path, group: dict[str, Any], tensors: dict[str, Any], reason: str
) -> None:
    found = load(source)
    from postlude.exporting.compressed_tensors import CompressedTensors
    from postlude.exporting.engine import export
    from postlude.quantization.rtn import RTN

    export(
        pl.quantize(found, RTN(activations=16, kv=16)), CompressedTensors(), tmp_path / "in", check=False
    )  # fmt: skip
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    kept = config["quantization_config"]["config_groups"]["group_0"]
    for key, value in group.items():
        kept[key] = {**kept[key], **value} if isinstance(kept[key], dict) else value
    file.write_text(json.dumps(config))
    weights = load_file(tmp_path / "in" / "model.safetensors")
    path = "model.layers.0.self_attn.k_proj"
    for name, tensor in tensors.items():
        if tensor is None:
            del weights[f"{path}.{name}"]
        else:
            weights[f"{path}.{name}"] = tensor
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in" / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "in")


def test_a_quantized_head_is_refused(source: Path, tmp_path: Path) -> None:
    def pack(*parts: Tensor) -> dict[str, Tensor]:
        return writers.gptq(*parts, 4, 1)

    write(source, tmp_path / "in", settings("gptq", sym=False), 4, False, pack)
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    weight = torch.zeros(256, 32)
    del tensors["lm_head.weight"]
    head = {f"lm_head.{k}": v for k, v in pack(*random_layer(weight, 4, 16, 1, False)).items()}
    save_file({**tensors, **head}, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"quantizes lm_head; Postlude reads quantized linears of the blocks"
    ):
        load(tmp_path / "in")


def test_damaged_scales_and_groups(source: Path, tmp_path: Path) -> None:
    write(
        source,
        tmp_path / "in",
        settings("gptq", sym=False),
        4,
        True,
        lambda *p: writers.gptq(*p, 4, 1),
    )
    file = tmp_path / "in" / "model.safetensors"
    good = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    bad = good[f"{name}.scales"].clone()
    bad[0, 0] = float("nan")
    save_file({**good, f"{name}.scales": bad}, file)
    with pytest.raises(NonFiniteError, match=r"up_proj\.scales.* holds 1 NaN"):
        load(tmp_path / "in")
    groups = good[f"{name}.g_idx"].clone()
    groups[:] = 0
    save_file({**good, f"{name}.g_idx": groups}, file)
    with pytest.raises(CheckpointError, match=r"groups of .*up_proj do not have 16 inputs each"):
        load(tmp_path / "in")
