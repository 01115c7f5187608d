"""Latency, size and throughput of a pose network: PyTorch against ONNX Runtime, float32, float16 and int8.

    python benchmarks/edge.py [--size tiny|small] [--repeat 30] [--rounds 9]

One picture at a time on one thread. ``small`` is a FastPose-ViT of the shape of ViT-S (224 pixels, patch 16, width 384,
12 blocks), ``tiny`` the one that trains here in minutes (48 pixels, patch 8, width 96, 4 blocks); both with random
weights, which changes no time; ``--checkpoint pose/`` takes a trained one. Networks take turns.

    float16       PyTorch: the model in half precision. ONNX Runtime: its converter, inputs and outputs in float32; a
                  CPU casts back where it has no arithmetic in half precision
    int8 dynamic  PyTorch's and ONNX Runtime's own dynamic quantization of linears (of matrix products)
    postlude ...  ``postlude quantize``; in PyTorch with the kernels of ``postlude generate``, in ONNX Runtime by
                  ``postlude export --to onnx``

The first table has the median of CPU seconds, which other work on the machine does not stretch, and its ratio to
float32 in ONNX Runtime; bytes of the file (in PyTorch: of what would be saved); and the mean angle between a network's
rotation and that of float32 in PyTorch on 32 random pictures.

The second has frames a second, in wall time, of a stand-in for a detector (a float32 convolutional network in the
same runtime) and the pose network: one after the other, and pipelined on two threads with a queue between. The two
take turns, round by round; the ratio is the median over rounds. ``bound`` is what two idle cores could gain: the time
of both stages over that of the slower one. The pictures of the detector are as large as makes it take about as long as
the pose network in ONNX Runtime (``--frame``). Other work on the machine does stretch these.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import os
import queue
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import postlude as pl
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery import kernels
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo.fastpose_vit.network import Backbone, PoseModel, build
from postlude.zoo.fastpose_vit.rotation import angle_between

SIZES = {
    "tiny": Backbone(),
    "small": Backbone(image_size=224, patch=16, width=384, depth=12, heads=6),
}
# Pixels of a detector's picture that make the two stages about equal.
FRAMES = {"tiny": 120, "small": 1216}
METHODS = {"rtn": (8, 8), "adalog": (4, 4)}
BOX = torch.tensor([[700.0, 400.0, 1250.0, 900.0]])


@dataclasses.dataclass(frozen=True)
class Network:
    """One way to run the pose network.

    Attributes:
        runtime: ``torch`` or ``onnx``.
        once: run one picture.
        rotations: of pictures ``[n, 3, size, size]``: ``[n, 3, 3]``.
        stored: bytes.
    """

    runtime: str
    once: Callable[[], Any]
    rotations: Callable[[Tensor], Tensor]
    stored: int


def in_torch(model: Any, picture: Tensor, stored: int) -> Network:
    """A model of PyTorch, in whatever type its parameters have."""
    whole = PoseModel(model)
    dtype = next(p.dtype for p in model.parameters())

    @torch.inference_mode()
    def rotations(pictures: Tensor) -> Tensor:
        return whole(pictures.to(dtype), BOX.expand(len(pictures), 4))[1]

    return Network("torch", lambda: rotations(picture), rotations, stored)


def in_onnx(file: Path, picture: Tensor) -> Network:
    """A file of the pose network in ONNX Runtime."""
    opened, one = session(file), {"pixel_values": picture.numpy(), "boxes": BOX.numpy()}

    def rotations(pictures: Tensor) -> Tensor:
        boxes = BOX.expand(len(pictures), 4).contiguous().numpy()
        found = opened.run(["rotation"], {"pixel_values": pictures.numpy(), "boxes": boxes})
        return torch.from_numpy(found[0])

    return Network("onnx", lambda: opened.run(None, one), rotations, file.stat().st_size)


def session(file: Path) -> Any:
    """Open a file, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def float16(file: Path, out: Path) -> None:
    """Half precision inside, float32 inputs and outputs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = convert_float_to_float16(onnx.load(str(file)), keep_io_types=True)
    onnx.save(made, str(out))


def int8(file: Path, out: Path) -> None:
    """ONNX Runtime's own dynamic quantization."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(file), str(out), weight_type=QuantType.QInt8)


def int8_in_torch(model: nn.Module) -> nn.Module:
    """PyTorch's own dynamic quantization, deprecated but in this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def tensor_bytes(model: nn.Module) -> int:
    """Of parameters, and of the int8 weights of PyTorch's own quantized linears with a scale each."""
    found = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if callable(getattr(module, "weight", None)):
            found += module.weight().numel() + 4 + 4 * len(module.bias())
    return found


def networks(checkpoint: Checkpoint, methods: str, folder: Path) -> dict[str, Network]:
    """Every way to run it, by name."""
    model: Any = checkpoint.model
    size = model.config.image_size
    picture = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))
    half, dynamic = copy.deepcopy(model).half(), int8_in_torch(copy.deepcopy(model))
    found = {
        "PyTorch float32": in_torch(model, picture, tensor_bytes(model)),
        "PyTorch float16": in_torch(half, picture, tensor_bytes(half)),
        "PyTorch int8 dynamic": in_torch(dynamic, picture, tensor_bytes(dynamic)),
    }
    files = {name: folder / f"{name.replace(' ', '_')}.onnx" for name in ("float32", "float16")}
    files["int8 dynamic"] = folder / "int8.onnx"
    pl.export(checkpoint, "onnx", files["float32"])
    float16(files["float32"], files["float16"])
    int8(files["float32"], files["int8 dynamic"])
    pictures = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1))
    for method in filter(None, methods.split(",")):
        weights, activations = METHODS[method]
        settings = pl.registry.find("quantize", method).settings(
            weights=weights, activations=activations
        )
        small = pl.quantize(checkpoint, settings, calibration=[{"pixel_values": pictures}])
        name = f"postlude {method} w{weights}a{activations}"
        files[name] = folder / f"{method}.onnx"
        pl.export(small, "onnx", files[name], check=False)
        small.save(folder / method)
        stored = (folder / method / "model.safetensors").stat().st_size
        kernels.use(small.model, "auto")
        found[f"PyTorch {name}"] = in_torch(small.model, picture, stored)
    return found | {f"ONNX Runtime {name}": in_onnx(file, picture) for name, file in files.items()}


def timed(jobs: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each, in turns: of the CPU, which on one thread is the latency of an idle machine."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeat):
        for name, job in jobs.items():
            started = time.process_time()
            job()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def detector() -> nn.Sequential:
    """Strided convolutions and a box: about the work of a small detector, none of its sense."""
    widths = (3, 16, 32, 64, 128, 128)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, 1, 1), nn.ReLU()]
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4))
    return nn.Sequential(*layers, *tail).eval()


def detector_file(model: nn.Sequential, pixels: int, file: Path) -> None:
    """The same as a file of ONNX."""
    weights, nodes, last = [], [], "picture"
    for index, layer in enumerate(model):
        inputs, out = [last], f"x{index}"
        for name, parameter in layer.named_parameters():
            inputs.append(f"{name}{index}")
            weights.append(numpy_helper.from_array(parameter.detach().numpy(), inputs[-1]))
        kind, settings = {
            nn.ReLU: ("Relu", {}),
            nn.Conv2d: ("Conv", {"pads": [1] * 4, "strides": getattr(layer, "stride", None)}),
            nn.AdaptiveAvgPool2d: ("GlobalAveragePool", {}),
            nn.Flatten: ("Flatten", {}),
            nn.Linear: ("Gemm", {"transB": 1}),
        }[type(layer)]
        nodes.append(helper.make_node(kind, inputs, [out], **settings))
        last = out
    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, pixels, pixels])
    box = helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(nodes, "detector", [picture], [box], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, str(file))


def detectors(pixels: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """One picture through the detector, by runtime."""
    torch.manual_seed(0)
    model, frame = detector(), torch.randn(1, 3, pixels, pixels)
    detector_file(model, pixels, folder / "detector.onnx")
    opened, one = session(folder / "detector.onnx"), {"picture": frame.numpy()}

    @torch.inference_mode()
    def detect() -> Tensor:
        return model(frame)

    np.testing.assert_allclose(opened.run(None, one)[0], detect().numpy(), rtol=1e-3, atol=1e-4)
    return {"torch": detect, "onnx": lambda: opened.run(None, one)}


def sequential(stages: list[Callable[[], Any]], frames: int) -> list[float]:
    """Wall seconds of each stage, over all frames."""
    spent = [0.0] * len(stages)
    for _ in range(frames):
        for index, stage in enumerate(stages):
            started = time.perf_counter()
            stage()
            spent[index] += time.perf_counter() - started
    return spent


def pipelined(stages: list[Callable[[], Any]], frames: int) -> float:
    """Wall seconds of all frames, two stages on two threads."""
    waiting: queue.Queue[Any] = queue.Queue(maxsize=2)

    def produce() -> None:
        for _ in range(frames):
            waiting.put(stages[0]())

    thread = threading.Thread(target=produce)
    started = time.perf_counter()
    thread.start()
    for _ in range(frames):
        waiting.get()
        stages[1]()
    thread.join()
    return time.perf_counter() - started


def throughput(stages: list[Callable[[], Any]], frames: int, rounds: int) -> list[float]:
    """Frames a second in turn and pipelined, their ratio, and what it could be at most; medians over rounds."""
    found = []
    for _ in range(rounds):
        each = sequential(stages, frames)
        both = pipelined(stages, frames)
        found.append((frames / sum(each), frames / both, sum(each) / both, sum(each) / max(each)))
    return [statistics.median(column) for column in zip(*found, strict=True)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--checkpoint", help="directory of a trained network")
    parser.add_argument("--methods", default="rtn,adalog", help="comma-separated")
    parser.add_argument("--repeat", type=int, default=30, help="pictures of the latency table")
    parser.add_argument("--rounds", type=int, default=9, help="of the throughput table")
    parser.add_argument("--frames", type=int, default=20, help="of a round")
    parser.add_argument("--frame", type=int, help="pixels of a side of the detector's picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.checkpoint:
        checkpoint, title = pl.load(options.checkpoint), "trained"
    else:
        fresh = build(SIZES[options.size], 0).eval()
        checkpoint = Checkpoint(model=fresh, tokenizer=None, anatomy=anatomy_of(fresh))
        title = options.size
    model: Any = checkpoint.model
    size, before = model.config.image_size, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        found = networks(checkpoint, options.methods, Path(name))
        pictures = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(2))
        exact = found["PyTorch float32"].rotations(pictures).double()
        seconds = timed({key: one.once for key, one in found.items()}, options.repeat)
        base = "ONNX Runtime float32"
        print(f"{title}: {sum(p.numel() for p in model.parameters()):,} parameters\n")
        print("| network | ms a picture | x float32 | bytes | x float32 | mean angle to PyTorch |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for key, one in found.items():
            angle = angle_between(one.rotations(pictures).double(), exact).mean().rad2deg().item()
            print(
                f"| {key} | {1e3 * seconds[key]:.2f} | {seconds[key] / seconds[base]:.2f} | {one.stored:,} | "
                f"{one.stored / found[base].stored:.2f} | {angle:.3f}° |"
            )
        pixels = options.frame or FRAMES[options.size]
        detect = detectors(pixels, Path(name))
        alone = timed(detect, options.repeat)
        print(
            f"\nDetector, {pixels} x {pixels} pixels: {1e3 * alone['torch']:.2f} ms in PyTorch, "
            f"{1e3 * alone['onnx']:.2f} ms in ONNX Runtime\n"
        )
        print("| network | sequential, frames/s | pipelined, frames/s | ratio | bound |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for key, one in found.items():
            stages = [detect[one.runtime], one.once]
            turn, both, ratio, bound = throughput(stages, options.frames, options.rounds)
            print(f"| {key} | {turn:.1f} | {both:.1f} | {ratio:.2f} | {bound:.2f} |", flush=True)
    print(f"\nLoad of {os.cpu_count()} cores: {before:.1f} before, {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    main()
