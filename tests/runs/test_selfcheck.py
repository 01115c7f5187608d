"""What is saved is what was made: a fresh process says so. And what other libraries get wrong here."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import postlude as pl
from postlude.cli import run
from postlude.errors import CheckpointError, VerificationError
from postlude.numerics.packing import packed_width
from postlude.quantization.engine import quantize
from postlude.quantization.offq import OffQ
from postlude.quantization.quarot import QuaRot
from postlude.quantization.rtn import RTN
from postlude.runs import selfcheck
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.checksums import SUMS
from postlude.runs.loading import load
from postlude.runs.selfcheck import RELOAD, compare_reload, fresh_logits, in_float32, probe_tokens
from postlude.surgery import kernels
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.layers import QuantizedLinear

TOKENS = torch.randint(0, 259, (2, 12), generator=torch.Generator().manual_seed(7))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(TOKENS, use_cache=False).logits
    return result


def made(directory: Path, method: Any, text: str) -> Any:
    return pl.quantize(load(directory), method, calibration=[text], samples=4, length=24)


# A fresh process


@pytest.mark.slow
def test_the_command_reads_a_rotated_checkpoint_again(
    tiny_llama_dir: Path, tmp_path: Path, some_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotated without a trace in the architecture: llm-compressor's would be read without its rotation."""
    (tmp_path / "text.txt").write_text(some_text)
    words = [
        "quantize", str(tiny_llama_dir), "--method", "quarot", "--bits", "w4a4kv4", "--samples", "4",
        "--length", "24", "--calibration", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["reload_max_difference"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [QuaRot(), OffQ(), RTN(activations=16, kv=16)])
def test_every_kind_of_checkpoint(
    tiny_llama_dir: Path, tmp_path: Path, some_text: str, method: Any, dtype: str
) -> None:
    original = load(tiny_llama_dir, dtype=dtype)
    small = pl.quantize(original, method, calibration=[some_text], samples=4, length=24)
    small.save(tmp_path / "out", check=True)
    assert small.reload is not None
    assert small.reload.max_difference < 1e-4


def test_a_rotation_left_out_is_seen(
    tiny_llama_dir: Path, tmp_path: Path, some_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = made(tiny_llama_dir, QuaRot(activations=16, kv=16), some_text)
    blind = copy.deepcopy(small.model)
    for module in blind.modules():
        if isinstance(module, QuantizedLinear):
            module.transform = None

    def without_rotations(load: str, arguments: Any, tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = blind(tokens, use_cache=False).logits
        return found

    monkeypatch.setattr(selfcheck, "fresh_logits", without_rotations)
    with pytest.raises(VerificationError, match=r"out, read by a fresh process, is another model"):
        small.save(tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(
        VerificationError, match=r"could not be read again.*\n(.*\n)*.*no such model"
    ):
        fresh_logits("raise SystemExit('no such model ' + sys.argv[2])", ["x"], TOKENS)


def test_logits_of_another_shape(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load(tiny_llama_dir)
    monkeypatch.setattr(selfcheck, "fresh_logits", lambda *_: torch.zeros(1, 2, 3))
    with pytest.raises(VerificationError, match=r"shape \(1, 2, 3\).*expected \(2, 24, 259\)"):
        compare_reload(opened.model, opened.anatomy, RELOAD, [])


def test_narrow_parameters_come_back_as_they_were(tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir, dtype="bfloat16").model
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with in_float32(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.data_ptr() == before[name] for name, p in model.named_parameters())
    assert probe_tokens(9, 5).shape == (2, 5)


# State


def test_one_quantization_leaves_nothing_for_the_next(tiny_llama_dir: Path, some_text: str) -> None:
    """Hooks, caches or grids that outlive a quantization change the next one in other libraries."""
    alone = [made(tiny_llama_dir, method, some_text).fingerprint() for method in (RTN(), OffQ())]
    for method in (QuaRot(), OffQ(clip=True), RTN(weights=8)):
        made(tiny_llama_dir, method, some_text)
    again = [made(tiny_llama_dir, method, some_text).fingerprint() for method in (OffQ(), RTN())]
    assert again == alone[::-1]


@pytest.mark.slow
def test_a_fresh_process_quantizes_to_the_same_bits(
    tiny_llama_dir: Path, tmp_path: Path, some_text: str
) -> None:
    import subprocess
    import sys

    made(tiny_llama_dir, OffQ(), some_text)
    here = made(tiny_llama_dir, QuaRot(), some_text).fingerprint()
    script = (
        "import sys, torch; torch.set_num_threads(1); import postlude as pl; "
        "from postlude.quantization import QuaRot; "
        "print(pl.quantize(pl.load(sys.argv[1]), QuaRot(), calibration=[sys.argv[2]], samples=4, "
        "length=24).fingerprint())"
    )
    command = [sys.executable, "-c", script, str(tiny_llama_dir), some_text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == here


# Bytes


def test_codes_are_packed_and_rotations_are_signs(
    tiny_llama_dir: Path, tmp_path: Path, some_text: str
) -> None:
    """Not 4-bit codes in bytes, and no rotation as a dense matrix."""
    small = made(tiny_llama_dir, QuaRot(), some_text)
    tensors = load_file(small.save(tmp_path / "out") / "model.safetensors")
    for path, layer in small.model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        mine = {name: t for name, t in tensors.items() if name.startswith(f"{path}.")}
        codes = mine.pop(f"{path}.codes")
        assert codes.nbytes == layer.out_features * packed_width(layer.in_features, 4)
        assert mine.pop(f"{path}.scale").nbytes == 2 * layer.out_features
        if layer.transform is not None:
            signs = mine.pop(f"{path}.transform.signs")
            assert (signs.dtype, len(signs)) == (torch.int8, layer.in_features)
        assert mine == {}
    for path, module in small.model.named_modules():
        if isinstance(module, KeyValueQuantizer):
            kept = [t for name, t in tensors.items() if name.startswith(f"{path}.")]
            assert sum(t.nbytes for t in kept) == 8  # the signs of one head


def test_weights_stay_packed_when_the_model_runs(tiny_llama_dir: Path, some_text: str) -> None:
    """Not decompressed to dense at the first forward pass, so that nothing is saved."""
    model = made(tiny_llama_dir, RTN(), some_text).model

    def held() -> dict[str, int]:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for path, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                for name, value in vars(layer).items():
                    if isinstance(value, Tensor):
                        tensors[f"{path}.{name}"] = value
        return {name: tensor.nbytes for name, tensor in tensors.items()}

    before = held()
    logits(model)
    assert held() == before
    kernels.use(model, "auto")
    logits(model)
    dense = sum(
        4 * layer.in_features * layer.out_features
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear)
    )
    kept = sum(
        size for name, size in held().items() if "proj" in name
    )  # fmt: skip
    assert kept + kernels.extra_bytes(model) < dense


# The function


def test_embeddings_are_not_centred(make_model: Callable[..., Any]) -> None:
    """An RMSNorm sees the mean of a row, so taking it out, as others do, is another model."""
    model = make_model("llama")
    model.model.embed_tokens.weight.data += 0.5  # a mean that matters
    before = logits(model)
    centred = copy.deepcopy(model)
    table = centred.model.embed_tokens.weight.data
    table -= table.mean(-1, keepdim=True)
    assert (logits(centred) - before).abs().max() > 0.1
    settings = QuaRot(weights=16, activations=16, kv=16, rounding="nearest")
    high = quantize(Checkpoint(model, None, anatomy_of(model)), settings, TOKENS)
    torch.testing.assert_close(logits(high.model), before, atol=2e-4, rtol=0)


# What has been tampered with


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_tampered_scales_are_refused(
    tiny_llama_dir: Path, tmp_path: Path, some_text: str, value: float
) -> None:
    made(tiny_llama_dir, RTN(), some_text).save(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.scale"][2:4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "out" / SUMS).unlink()  # changed on purpose
    expected = (
        r"layers\.1\.mlp\.up_proj has 2 scales of 44 that are NaN.*copy it again, or quantize again"
    )
    with pytest.raises(CheckpointError, match=expected):
        load(tmp_path / "out")


def test_another_format_version_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, some_text: str
) -> None:
    made(tiny_llama_dir, RTN(), some_text).save(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"format version 2.*reads version 1; install a matching"
    ):
        load(tmp_path / "out")


def test_an_engine_that_cannot_take_these_bits_says_what_can(
    tiny_llama_dir: Path, some_text: str
) -> None:
    small = made(tiny_llama_dir, RTN(weights=3), some_text)
    found = {one.layer: one for one in kernels.assignments(small.model, "int4pack")}
    one = found["model.layers.0.mlp.up_proj"]
    assert "int4pack" in one.refused
    assert one.kernels  # what can: at least the reference
    assert isinstance(small.model.get_submodule(one.layer), nn.Module)
