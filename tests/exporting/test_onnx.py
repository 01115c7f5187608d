"""ONNX graphs against the model they were written from, in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.errors import ArchitectureError, MissingDependencyError, SettingsError
from postlude.exporting.engine import export
from postlude.exporting.onnx import ONNX
from postlude.exporting.onnx_graph import Graph
from postlude.numerics.formats import Codebook, Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import quantize
from postlude.quantization.offq import OffQ
from postlude.quantization.quarot import QuaRot
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.transforms import BlockHadamard, InputOrder

from .models import TOKENS, checkpoint, logits, rounded

FREE = Integer(4, symmetric=False, range="free")
ZERO = Integer(4, symmetric=False, range="zero")
TOKEN = Granularity("token")
LINEAR = {"rope_type": "linear", "rope_theta": 99.0, "factor": 2.0}


def session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def by_runtime(
    opened: Any, tokens: Tensor = TOKENS, past: dict[str, Any] | None = None
) -> dict[str, Any]:
    feed = {"input_ids": tokens.numpy()}
    for given in opened.get_inputs()[1:]:
        empty = np.zeros((len(tokens), given.shape[1], 0, given.shape[3]), np.float32)
        feed[given.name] = (
            empty if past is None else past[given.name.replace("past_key_values", "present")]
        )
    names = [out.name for out in opened.get_outputs()]
    return dict(zip(names, opened.run(names, feed), strict=True))


def compared(small: Checkpoint, out: Path, atol: float = 2e-5) -> dict[str, Any]:
    report = export(small, ONNX(), out, check=False)
    onnx.checker.check_model(str(out / "model.onnx"))
    found = torch.from_numpy(by_runtime(session(out / "model.onnx"))["logits"])
    torch.testing.assert_close(found, logits(small.model), atol=atol, rtol=0)
    return report


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)  # fmt: skip
def test_every_architecture(
    make_model: Callable[..., Any], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    report = compared(checkpoint(make_model, kind, **settings), tmp_path / "out")
    assert report["layers"] == {"float": 15}


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Integer(4)),
        Scheme(Integer(4), Granularity("tensor")),
        Scheme(Integer(4), Granularity("group", 16)),
        Scheme(Integer(4), Granularity("group", 48)),
        Scheme(Integer(4), Granularity("group", 128)),
        Scheme(Integer(3), Granularity("group", 32)),
        Scheme(Integer(8), Granularity("group", 16)),
        Scheme(Integer(6)),
        Scheme(ZERO, Granularity("group", 16)),
        Scheme(Integer(8, symmetric=False)),
        Scheme(FREE, Granularity("group", 32)),
    ],
    ids=lambda scheme: f"{scheme.format.bits}-{scheme.granularity}-{scheme.format.zero_point_bits}",
)
def test_weights_stay_packed(
    make_model: Callable[..., Any], tmp_path: Path, scheme: Scheme
) -> None:
    """Widths of 32, 44 (which no group divides) and 64."""
    small = rounded(checkpoint(make_model, intermediate_size=44), scheme)
    report = compared(small, tmp_path / "out")
    assert report["layers"] == {"MatMulNBits": 14, "float": 1}
    codes = {i.name: i for i in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}[
        "model.layers.0.mlp.up_proj.codes"
    ]
    assert np.prod(codes.dims) == 44 * 32 * (4 if scheme.format.bits <= 4 else 8) // 8


@pytest.mark.parametrize(
    ("weight", "input", "kernel"),
    [
        (Scheme(Integer(8)), Scheme(Integer(8), TOKEN), "MatMulInteger"),
        (Scheme(Integer(8), Granularity("tensor")), Scheme(Integer(8), Granularity("tensor")), "MatMulInteger"),
        (Scheme(Integer(8), Granularity("group", 16)), Scheme(Integer(8), TOKEN), "MatMulNBits"),
        (Scheme(Integer(4)), Scheme(Integer(4), Granularity("group", 16), clip=0.9), "MatMulNBits"),
        (Scheme(Integer(4)), Scheme(FREE, TOKEN), "MatMulNBits"),
        (Scheme(Integer(4)), Scheme(ZERO, Granularity("group", 128), scale_dtype="bfloat16"), "MatMulNBits"),
        (None, Scheme(Integer(8, narrow=True), TOKEN, scale_dtype="float32"), "float"),
    ],
)  # fmt: skip
def test_rounded_activations(
    make_model: Callable[..., Any],
    tmp_path: Path,
    weight: Scheme | None,
    input: Scheme,
    kernel: str,
) -> None:
    small = rounded(checkpoint(make_model, intermediate_size=44), weight, input)
    report = export(small, ONNX(), tmp_path / "out", check=False)
    assert report["layers"][kernel] >= 14
    found = torch.from_numpy(by_runtime(session(tmp_path / "out" / "model.onnx"))["logits"])
    expected = logits(small.model)
    # A sum in another order may round one activation to the next code, and what follows with it.
    assert (found - expected).norm() / expected.norm() < 0.02
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.5


@pytest.mark.parametrize("method", [QuaRot(rounding="nearest"), OffQ()], ids=["quarot", "offq"])
def test_rotated_checkpoints(make_model: Callable[..., Any], tmp_path: Path, method: Any) -> None:
    """Online transforms, rotated keys and a rounded cache: what the other formats refuse."""
    method = dataclasses.replace(method, weights=4, activations=16, kv=16)
    small = quantize(checkpoint(make_model, intermediate_size=44), method, TOKENS)
    compared(small, tmp_path / "out", atol=1e-4)
    small = quantize(checkpoint(make_model), dataclasses.replace(method, kv=4), TOKENS)
    export(small, ONNX(), tmp_path / "kv", check=False)
    found = by_runtime(session(tmp_path / "kv" / "model.onnx"))["logits"]
    expected = logits(small.model)
    assert (torch.from_numpy(found) - expected).norm() / expected.norm() < 0.02


def test_the_cache_continues_a_text(make_model: Callable[..., Any], tmp_path: Path) -> None:
    small = rounded(checkpoint(make_model, "mistral", sliding_window=6), Scheme(Integer(4)))
    export(small, ONNX(), tmp_path / "out", check=False)
    opened = session(tmp_path / "out" / "model.onnx")
    first = by_runtime(opened, TOKENS[:, :7])
    rest = by_runtime(opened, TOKENS[:, 7:], past=first)
    assert first["present.1.key"].shape == (2, 2, 7, 8)
    assert rest["present.1.value"].shape == (2, 2, 12, 8)
    both = np.concatenate([first["logits"], rest["logits"]], axis=1)
    torch.testing.assert_close(torch.from_numpy(both), logits(small.model), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "transform",
    [
        BlockHadamard(64, 64),
        BlockHadamard(64, 16),
        BlockHadamard(44, 44),
        BlockHadamard(40, 16),
        BlockHadamard(24, 4, inner=6),
        BlockHadamard(48, 4, inner=6),
        InputOrder(20),
    ],
    ids=lambda t: f"{type(t).__name__}-{t.spec()['width']}",
)
def test_transforms(tmp_path: Path, transform: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    width = transform.spec()["width"]
    if isinstance(transform, InputOrder):
        transform.order.copy_(torch.randperm(width, generator=generator))
    else:
        transform.randomize(generator, keep_first=False)
    graph = Graph(onnx)
    graph.inputs.append(graph.value("x", onnx.TensorProto.FLOAT, ("batch", "length", width)))
    result = graph.transform("x", "t", transform)
    graph.outputs.append(graph.value(result, onnx.TensorProto.FLOAT, ("batch", "length", width)))
    onnx.save_model(graph.model(), str(tmp_path / "t.onnx"))
    x = torch.randn(2, 3, width, generator=generator)
    (found,) = session(tmp_path / "t.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), transform(x), atol=1e-5, rtol=1e-5)


def test_what_it_cannot_hold_is_refused(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArchitectureError, match=r"type 'gpt2'; it knows llama, mistral"):
        export(checkpoint(make_model, "gpt2"), ONNX(), out)
    odd = Scheme(Integer(4), Granularity("group", 24))
    with pytest.raises(SettingsError, match=r"groups of 24, and MatMulNBits.*32, 64 or 128"):
        export(rounded(checkpoint(make_model), odd), ONNX(), out)
    levels = Scheme(Codebook((-1.0, 0.0, 1.0)))
    with pytest.raises(SettingsError, match=r"codebook codes, and MatMulNBits has integers"):
        export(rounded(checkpoint(make_model), levels), ONNX(), out)
    with pytest.raises(SettingsError, match=r"rounds its input to codebook codes"):
        export(
            rounded(checkpoint(make_model), Scheme(Integer(4)), dataclasses.replace(levels, granularity=TOKEN)),
            ONNX(),
            out,
        )  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'postlude\[edge\]'"):
        export(checkpoint(make_model), ONNX(), out)
    assert not out.exists()


def test_the_command_checks_with_a_fresh_process(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from postlude.cli import run

    small = pl.quantize(tiny_llama_dir, "rtn")
    small.save(tmp_path / "small")
    words = [
        "export",
        str(tmp_path / "small"),
        "--to",
        "onnx",
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["to"], found["reload_max_difference"] < 1.0) == ("onnx", True)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    }
    listed = (tmp_path / "out" / "SHA256SUMS").read_text().split()[1::2]
    assert listed == ["model.onnx", "model.onnx.data"]
    assert run(words) == 2
    assert "already exists" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert run([*words, "--overwrite", "--no-check"]) == 0
    assert "reload_max_difference" not in json.loads(capsys.readouterr().out)
    assert run(["export", str(tmp_path / "small"), "--to", "onxx", "-o", "x", "--json"]) == 2
    assert "Did you mean 'onnx'" in json.loads(capsys.readouterr().out)["error"]["message"]
