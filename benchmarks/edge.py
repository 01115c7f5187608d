"""Latency and size of a pose network on its way to an edge device: PyTorch, ONNX Runtime, float32, float16, int8.

    python benchmarks/edge.py [--size tiny|small] [--repeat 30]

One picture at a time on one thread. ``small`` is a FastPose-ViT of the shape of ViT-S (224 pixels, patch 16, width 384,
12 blocks), ``tiny`` the one that trains here in minutes (48 pixels, patch 8, width 96, 4 blocks); both with random
weights, which changes no time; ``--checkpoint pose/`` takes a trained one. Networks take turns. What is printed is the
median of CPU seconds, which other work on the machine does not stretch, and its ratio to float32 in ONNX Runtime; the
bytes of the file; and the mean angle between the rotation of a network and that of float32 in PyTorch on 32 random
pictures.

    float16       onnxruntime's converter: weights and arithmetic in half precision; a CPU casts back where it has none
    int8 dynamic  onnxruntime's own dynamic quantization of the same file
    postlude ...  `postlude quantize` and `postlude export --to onnx`

Then a stand-in for a detector (a convolutional network on 320 x 320 pixels) and the pose network run on the same
frames: one after the other, and pipelined on two threads with a queue between, in wall time. Throughput of the second
is at most one frame in the time of the slower stage.
"""

from __future__ import annotations

import argparse
import itertools
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
import onnxruntime
import torch
from torch import nn

import postlude as pl
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo.fastpose_vit.network import Backbone, PoseModel, build
from postlude.zoo.fastpose_vit.rotation import angle_between

SIZES = {
    "tiny": Backbone(),
    "small": Backbone(image_size=224, patch=16, width=384, depth=12, heads=6),
}
METHODS = {"rtn": (8, 8), "adalog": (4, 4)}
BOX = np.array([[700.0, 400.0, 1250.0, 900.0]], np.float32)


def session(file: Path) -> Any:
    """Open a file, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def float16(file: Path, out: Path) -> None:
    """Half precision inside, float32 inputs and outputs."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = convert_float_to_float16(onnx.load(str(file)), keep_io_types=True)
    onnx.save(made, str(out))


def int8(file: Path, out: Path) -> None:
    """ONNX Runtime's own dynamic quantization."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(file), str(out), weight_type=QuantType.QInt8)


def networks(checkpoint: Checkpoint, methods: str, folder: Path) -> dict[str, Path]:
    """Files by name."""
    model = checkpoint.model
    files = {"float32": folder / "float32.onnx"}
    pl.export(checkpoint, "onnx", files["float32"])
    for name, convert in (("float16", float16), ("int8 dynamic", int8)):
        files[name] = folder / f"{name.replace(' ', '_')}.onnx"
        convert(files["float32"], files[name])
    size = model.config.image_size
    pictures = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1))
    for method in filter(None, methods.split(",")):
        weights, activations = METHODS[method]
        settings = pl.registry.find("quantize", method).settings(
            weights=weights, activations=activations
        )
        small = pl.quantize(checkpoint, settings, calibration=[{"pixel_values": pictures}])
        files[f"postlude {method} w{weights}a{activations}"] = folder / f"{method}.onnx"
        pl.export(small, "onnx", folder / f"{method}.onnx", check=False)
    return files


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


class Detector(nn.Module):
    """Strided convolutions and a box: about the work of a small detector, none of its sense."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4))

    @torch.inference_mode()
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.body(picture)


def pipelined(first: Callable[[], Any], second: Callable[[], Any], frames: int) -> float:
    """Seconds for all frames, the two stages on two threads."""
    waiting: queue.Queue[Any] = queue.Queue(maxsize=2)

    def produce() -> None:
        for _ in range(frames):
            waiting.put(first())

    thread = threading.Thread(target=produce)
    started = time.perf_counter()
    thread.start()
    for _ in range(frames):
        waiting.get()
        second()
    thread.join()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--checkpoint", help="directory of a trained network")
    parser.add_argument("--methods", default="rtn,adalog", help="comma-separated")
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--frames", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.checkpoint:
        checkpoint, title = pl.load(options.checkpoint), "trained"
    else:
        fresh = build(SIZES[options.size], 0).eval()
        checkpoint = Checkpoint(model=fresh, tokenizer=None, anatomy=anatomy_of(fresh))
        title = options.size
    model: Any = checkpoint.model
    size = model.config.image_size
    with tempfile.TemporaryDirectory() as name:
        files = networks(checkpoint, options.methods, Path(name))
        whole = PoseModel(model)
        pictures = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(2))
        one = pictures[:1].numpy()
        sessions = {key: session(file) for key, file in files.items()}
        with torch.inference_mode():
            exact = whole(pictures, torch.from_numpy(BOX).expand(32, 4))[1]

        def in_torch() -> None:
            with torch.inference_mode():
                whole(pictures[:1], torch.from_numpy(BOX))

        jobs: dict[str, Callable[[], Any]] = {"PyTorch float32": in_torch}
        for key, opened in sessions.items():
            jobs[f"ONNX Runtime {key}"] = lambda opened=opened: opened.run(  # type: ignore[misc]
                None, {"pixel_values": one, "boxes": BOX}
            )
        seconds = timed(jobs, options.repeat)
        base, bytes_ = seconds["ONNX Runtime float32"], files["float32"].stat().st_size
        print(f"{title}: {sum(p.numel() for p in model.parameters()):,} parameters\n")
        print("| network | ms a picture | x float32 | bytes | x float32 | mean angle to PyTorch |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for key, value in seconds.items():
            file = files.get(key.removeprefix("ONNX Runtime "))
            cells = ["", "", ""]
            if file is not None:
                opened = sessions[key.removeprefix("ONNX Runtime ")]
                boxes = np.repeat(BOX, 32, 0)
                found = opened.run(
                    ["rotation"], {"pixel_values": pictures.numpy(), "boxes": boxes}
                )[0]
                angle = angle_between(torch.from_numpy(found).double(), exact.double()).mean()
                stored = file.stat().st_size
                cells = [f"{stored:,}", f"{stored / bytes_:.2f}", f"{angle.rad2deg().item():.3f}°"]
            print(f"| {key} | {1e3 * value:.2f} | {value / base:.2f} | {' | '.join(cells)} |")

        detector, frame = Detector().eval(), torch.randn(1, 3, 320, 320)
        pose = jobs["ONNX Runtime float32"]

        def detect() -> Any:
            return detector(frame)

        stages = timed({"detector": detect, "pose": pose}, options.repeat)
        started = time.perf_counter()
        for _ in range(options.frames):
            detect()
            pose()
        sequential = (time.perf_counter() - started) / options.frames
        both = pipelined(detect, pose, options.frames) / options.frames
        slower = max(stages.values())
        print(
            "\n| detector, ms | pose, ms | sequential, frames/s | pipelined, frames/s | ratio | bound |"
        )
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        print(
            f"| {1e3 * stages['detector']:.2f} | {1e3 * stages['pose']:.2f} | {1 / sequential:.1f} | {1 / both:.1f} | "
            f"{sequential / both:.2f} | {sum(stages.values()) / slower:.2f} |"
        )


if __name__ == "__main__":
    main()
