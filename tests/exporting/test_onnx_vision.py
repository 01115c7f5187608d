"""Graphs of vision transformers against the model they were written from, in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.cli import run
from postlude.errors import (
    ArchitectureError,
    CheckpointError,
    OutputExistsError,
    SettingsError,
    VerificationError,
)
from postlude.exporting.onnx_graph import Graph
from postlude.exporting.onnx_static import static_round_trip
from postlude.numerics.activation_grids import (
    GELU_SHIFT,
    ActivationGrid,
    AdaLog,
    LogSqrt2,
    ShiftLog,
    Tangent,
    TwoSided,
    Uniform,
)
from postlude.quantization import RTN
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.surgery.static_quantizers import StaticQuantizer
from postlude.zoo.fastpose_vit import data as sets
from postlude.zoo.fastpose_vit.making import make
from postlude.zoo.fastpose_vit.network import Backbone, PoseModel, build
from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft
from postlude.zoo.fastpose_vit.training import save


def session(file: Path | bytes) -> Any:
    given = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(given, providers=["CPUExecutionProvider"])


def pose(model_type: str = "vit", target: Any = "apparent") -> Checkpoint:
    shape = Backbone(model_type, image_size=16, patch=8, width=32, depth=2, heads=2)
    model = build(shape, 1, target=target).eval()
    for parameter in model.parameters():  # biases and norms that do something
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(2)
        )
    return Checkpoint(model=model, tokenizer=None, anatomy=anatomy_of(model))


def pictures(rows: int = 5) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(3))


BOXES = torch.tensor([[100.0, 200, 300, 380], [900, 500, 1000, 580], [1500, 900, 1900, 1190]])


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2"])
@pytest.mark.parametrize("target", ["apparent", "camera"])
def test_poses_are_those_of_the_network(model_type: str, target: str, tmp_path: Path) -> None:
    checkpoint = pose(model_type, target)
    report = pl.export(checkpoint, "onnx", tmp_path / "pose.onnx")
    assert report["bytes"] == (tmp_path / "pose.onnx").stat().st_size
    assert report["reload_relative_difference"] < 1e-4
    opened = session(tmp_path / "pose.onnx")
    feed = {"pixel_values": pictures(3).numpy(), "boxes": BOXES.numpy()}
    found = opened.run(["translation", "rotation"], feed)
    with torch.no_grad():
        expected = PoseModel(checkpoint.model)(pictures(3), BOXES)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other.numpy()).max() < 1e-4 * float(other.abs().max())
    assert opened.get_modelmeta().custom_metadata_map["target"] == target


def test_a_classifier_gives_logits_and_a_body_its_states(tmp_path: Path) -> None:
    model = pose().model
    model.config.pose = None
    classifier = Checkpoint(model=model, tokenizer=None, anatomy=anatomy_of(model))
    body = Checkpoint(model=model.vit, tokenizer=None, anatomy=anatomy_of(model.vit))
    for name, one in (("logits", classifier), ("last_hidden_state", body)):
        pl.export(one, "onnx", tmp_path / f"{name}.onnx")
        found = session(tmp_path / f"{name}.onnx").run([name], {"pixel_values": pictures().numpy()})
        with torch.no_grad():
            assert np.allclose(found[0], one.model(pictures())[0].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "method", ["repq-vit", "repquant", "adalog", "iands-vit", "dopq-vit", "rtn"]
)
def test_quantized_networks_keep_their_codes(method: str, tmp_path: Path) -> None:
    batches = [{"pixel_values": pictures(16)}]
    few = {"iterations": 2} if method == "iands-vit" else {}
    settings = pl.registry.find("quantize", method).settings(**few)
    small = pl.quantize(pose(), settings, calibration=None if method == "rtn" else batches)
    report = pl.export(small, "onnx", tmp_path / "small.onnx")
    assert report["layers"]["MatMulNBits"] == 12
    feed = {"pixel_values": pictures(3).numpy(), "boxes": BOXES.numpy()}
    found = session(tmp_path / "small.onnx").run(["translation", "rotation"], feed)
    with torch.no_grad():
        expected = PoseModel(small.model)(pictures(3), BOXES)
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other.numpy()) < 0.02 * float(other.norm())
    if method != "rtn":
        kinds = {node.op_type for node in onnx.load(str(tmp_path / "small.onnx")).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


@pytest.mark.parametrize(
    "grid",
    [
        Uniform(3),
        Uniform(8),
        LogSqrt2(4),
        AdaLog(4),
        AdaLog(3, shift=GELU_SHIFT, search_scale=True),
        ShiftLog(4),
        Tangent(4),
        TwoSided(4),
    ],
    ids=lambda grid: f"{grid.kind}-{grid.bits}",
)
@pytest.mark.parametrize("whole", [True, False])
def test_every_grid_is_written_as_it_rounds(grid: ActivationGrid, whole: bool) -> None:
    x = torch.rand(600, generator=torch.Generator().manual_seed(0)) ** 4
    if isinstance(grid, Uniform | TwoSided):
        x = x * 3 - 0.5
    parameters = grid.fit(x)
    if "zero_point" in parameters and not whole:
        parameters["zero_point"] = parameters["zero_point"] + 0.37
    quantizer = StaticQuantizer.of(grid, parameters)
    graph = Graph(onnx)
    graph.inputs.append(graph.value("x", onnx.TensorProto.FLOAT, (600,)))
    result = static_round_trip(graph, "x", "grid", quantizer)
    graph.outputs.append(graph.value(result, onnx.TensorProto.FLOAT, (600,)))
    found = torch.from_numpy(
        session(graph.model().SerializeToString()).run([result], {"x": x.numpy()})[0]
    )
    # At a boundary two roundings of the same number may differ.
    assert ((found - quantizer(x)).abs() < 1e-5).double().mean() > 0.99
    assert ("QuantizeLinear" in graph.kinds) == (isinstance(grid, Uniform) and whole)


def test_the_commands_export_and_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets.write(make(own_spacecraft(), 6, seed=0), tmp_path / "test")
    save(build(Backbone(image_size=16, patch=8, width=16, depth=1, heads=2)), tmp_path / "pose", {})
    out, data = str(tmp_path / "pose.onnx"), ["--data", str(tmp_path / "test"), "--json"]
    assert run(["export", str(tmp_path / "pose"), "--to", "onnx", "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to"] == "onnx"
    results = []
    for model in (str(tmp_path / "pose"), out):
        assert run(["evaluate", "pose", model, *data]) == 0
        results.append(json.loads(capsys.readouterr().out))
    for name in ("e_t", "e_r_degrees", "score"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-3)
    assert results[1]["target"] == "apparent"
    with pytest.raises(OutputExistsError):
        pl.export(tmp_path / "pose", "onnx", out)


def test_an_output_that_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"one file, .*name it posedir\.onnx"):
        pl.export(pose(), "onnx", tmp_path / "posedir")
    assert not list(tmp_path.iterdir())


def test_language_commands_say_what_there_is_instead(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="postlude evaluate pose"):
        pl.export(pose(), "gguf", tmp_path / "pose.gguf")


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = pose()
    quick.model.config.hidden_act = "quick_gelu"
    with pytest.raises(ArchitectureError, match="writes gelu, and this one has 'quick_gelu'"):
        pl.export(quick, "onnx", tmp_path / "a.onnx")
    small = pl.quantize(pose(), RTN(weights=4, group=8))
    with pytest.raises(SettingsError, match="groups of 8, and MatMulNBits"):
        pl.export(small, "onnx", tmp_path / "b.onnx")
    other = pose()
    monkeypatch.setattr(
        "postlude.exporting.onnx_vision._Writer._norm", lambda self, norm, x, name: x
    )
    with pytest.raises(VerificationError, match="computes something else"):
        pl.export(other, "onnx", tmp_path / "c.onnx")
    assert not list(tmp_path.iterdir())


def test_another_graph_is_no_pose_network(tmp_path: Path) -> None:
    model = pose().model
    model.config.pose = None
    pl.export(
        Checkpoint(model=model, tokenizer=None, anatomy=anatomy_of(model)),
        "onnx",
        tmp_path / "a.onnx",
    )
    sets.write(make(own_spacecraft(), 2, seed=0, size=32), tmp_path / "test")
    with pytest.raises(CheckpointError, match="reads pixel_values and computes logits"):
        pl.evaluate_pose(tmp_path / "a.onnx", tmp_path / "test")
