"""Vision transformers as one ONNX file, float or quantized.

    pixel_values   fp32 [batch, channels, height, width]
    logits         fp32 [batch, classes]; without a classifier last_hidden_state [batch, tokens, width]

A FastPose-ViT also reads ``boxes`` fp32 [batch, 4] and gives ``translation`` [batch, 3] in metres and ``rotation``
[batch, 3, 3] instead: the formulas behind its outputs are in the graph.

Integer weights of up to 8 bits stay packed (``com.microsoft.MatMulNBits``); activations are rounded as described in
:mod:`postlude.exporting.onnx_static`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from postlude.errors import ArchitectureError, VerificationError
from postlude.exporting.engine import Exporter
from postlude.exporting.onnx_graph import Graph, layer_reason
from postlude.exporting.onnx_static import static_round_trip
from postlude.exporting.plain import refuse
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block
from postlude.surgery.layers import QuantizedLinear, quantized_linears
from postlude.surgery.static_quantizers import AttentionOperands, StaticQuantizer
from postlude.zoo.fastpose_vit.camera import Camera
from postlude.zoo.fastpose_vit.network import OUTPUTS, PoseModel, pose_of

__all__ = ["VisionONNX"]

_ACTIVATIONS = ("gelu",)
# Boxes that the check looks through: near, far, off the middle.
_BOXES = ((700, 400, 1250, 900), (300, 200, 380, 290), (1500, 800, 1700, 950), (60, 900, 160, 1010))


@dataclasses.dataclass(frozen=True)
class VisionONNX(Exporter):
    """A file with the graph of a vision transformer."""

    marker: ClassVar[str | None] = None
    ending: ClassVar[str | None] = ".onnx"
    library: Any = None

    def write(self, checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
        model = checkpoint.model
        act = str(getattr(model.config, "hidden_act", None))
        if act not in _ACTIVATIONS:
            raise ArchitectureError(
                f"the ONNX export of vision transformers writes {', '.join(_ACTIVATIONS)}, and this one has {act!r}"
            )
        layers = dict(quantized_linears(model))
        refuse("ONNX", [r for r in (layer_reason(p, one) for p, one in layers.items()) if r])
        branches = [path for path, layer in layers.items() if layer.branch is not None]
        refuse("ONNX", [f"{path} has a low-rank branch, which is not written" for path in branches])
        graph = Graph(self.library)
        writer = _Writer(checkpoint, graph)
        writer.write()
        made = graph.model()
        if is_pose(model):
            target, _ = pose_of(model)
            self.library.helper.set_model_props(made, {"target": target})
        self.library.checker.check_model(made)
        self.library.save_model(made, str(out))
        return {"layers": graph.kinds}

    def check(self, checkpoint: Checkpoint, out: Path) -> dict[str, float]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        model = checkpoint.model
        inputs = {"pixel_values": checkpoint.anatomy.example(rows=4)["pixel_values"].float()}
        with torch.no_grad():
            if is_pose(model):
                inputs["boxes"] = torch.tensor(_BOXES, dtype=torch.float32)
                expected = PoseModel(model)(inputs["pixel_values"].to(model.dtype), inputs["boxes"])
            else:
                expected = (model(inputs["pixel_values"].to(model.dtype))[0],)
        names = [one.name for one in session.get_outputs()]
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        differences = [
            float((torch.from_numpy(a) - b.float()).norm() / b.float().norm())
            for a, b in zip(found, expected, strict=True)
        ]
        largest = max(
            float((torch.from_numpy(a) - b.float()).abs().max())
            for a, b in zip(found, expected, strict=True)
        )
        rounds = any(isinstance(m, StaticQuantizer | QuantizedLinear) for m in model.modules())
        # A sum in another order may round an activation to the next code.
        tolerance = 0.1 if rounds else 1e-3
        if not max(differences) <= tolerance:
            raise VerificationError(
                f"the export to ONNX computes something else: its outputs differ by {max(differences):.3g} of their "
                f"size, expected at most {tolerance:g}; nothing was kept"
            )
        return {
            "reload_max_difference": largest,
            "reload_relative_difference": max(differences),
        }


def is_pose(model: Any) -> bool:
    """Whether a model is a pose network."""
    return (
        isinstance(getattr(model.config, "pose", None), dict) and model.config.num_labels == OUTPUTS
    )


class _Writer:
    """Walks the blocks of a model and writes them into a graph."""

    def __init__(self, checkpoint: Checkpoint, graph: Graph) -> None:
        self.model, self.anatomy, self.graph = checkpoint.model, checkpoint.anatomy, graph
        self.float = graph.onnx.TensorProto.FLOAT
        self.config = self.model.config
        self.body = getattr(self.model, self.config.model_type, self.model)

    def write(self) -> None:
        g = self.graph
        size = self.anatomy.inputs[0].shape
        g.inputs.append(g.value("pixel_values", self.float, ("batch", *size)))
        x = self._embed("pixel_values")
        for block in self.anatomy.blocks:
            x = self._block(block, x)
        x = self._norm(self.body.layernorm, x, "layernorm")
        head = getattr(self.model, "classifier", None)
        if head is None:
            self._output("last_hidden_state", x, ("batch", "tokens", self.anatomy.hidden_size))
            return
        first = self._slice(x, 0, 1)
        if self.config.model_type == "dinov2":
            rest = self._slice(x, 1, 1 << 30)
            mean = g.op("ReduceMean", rest, g.constant([1], np.int64), keepdims=1)
            first = g.op("Concat", first, mean, axis=-1)
        first = g.reshape(first, 0, head.in_features)
        logits = g.linear(first, "classifier", head.weight.data, head.bias)
        if not is_pose(self.model):
            self._output("logits", logits, ("batch", head.out_features))
            return
        g.inputs.append(g.value("boxes", self.float, ("batch", 4)))
        target, camera = pose_of(self.model)
        _Pose(g, camera).write(logits, apparent=target == "apparent", output=self._output)

    def _output(self, name: str, value: str, shape: tuple[str | int, ...]) -> None:
        self.graph.op("Identity", value)
        self.graph.nodes[-1].output[0] = name
        self.graph.outputs.append(self.graph.value(name, self.float, shape))

    def _slice(self, x: str, start: int, stop: int) -> str:
        g = self.graph
        ends = (g.constant([start], np.int64), g.constant([stop], np.int64))
        return str(g.op("Slice", x, *ends, g.constant([1], np.int64)))

    def _embed(self, pixels: str) -> str:
        g, embeddings = self.graph, self.body.embeddings
        conv = embeddings.patch_embeddings.projection
        patches = g.op(
            "Conv",
            pixels,
            g.tensor("patch.weight", conv.weight.data.float()),
            g.tensor("patch.bias", conv.bias.data.float()),
            strides=list(conv.stride),
            kernel_shape=list(conv.kernel_size),
        )
        width = self.anatomy.hidden_size
        patches = g.transpose(g.reshape(patches, 0, width, -1), 0, 2, 1)
        names = ("cls_token", "distillation_token")
        tokens = [getattr(embeddings, name).data for name in names if hasattr(embeddings, name)]
        first = g.tensor("tokens", torch.cat(tokens, dim=1).float())
        batch = g.op("Shape", pixels, start=0, end=1)
        shape = g.op("Concat", batch, g.constant([len(tokens), width], np.int64), axis=0)
        x = g.op("Concat", g.op("Expand", first, shape), patches, axis=1)
        places = embeddings.position_embeddings.data
        return str(g.op("Add", x, g.tensor("positions", places.float())))

    def _norm(self, norm: Any, x: str, name: str) -> str:
        g = self.graph
        weight = g.tensor(f"{name}.weight", norm.weight.data.float())
        bias = g.tensor(f"{name}.bias", norm.bias.data.float())
        return str(g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps))

    def _linear(self, path: str, x: str) -> str:
        module = self.model.get_submodule(path)
        if isinstance(module, QuantizedLinear):
            return str(self.graph.quantized(x, path, module))
        return str(self.graph.linear(x, path, module.weight.data, module.bias))

    def _block(self, block: Block, x: str) -> str:
        g = self.graph
        paths = {reader.role: reader.module for s in block.sites for reader in s.readers}
        if "gate" in paths:
            raise ArchitectureError("the ONNX export does not write gated vision transformers")
        norms = [site.norm for site in block.sites if site.norm is not None]
        module = self.model.get_submodule(block.name)
        y = self._norm(self.model.get_submodule(norms[0]), x, norms[0])
        y = self._scaled(module, "layer_scale1", self._attention(block, paths, y))
        x = g.op("Add", x, y)
        y = self._norm(self.model.get_submodule(norms[1]), x, norms[1])
        y = self._linear(paths["down"], g.op("Gelu", self._linear(paths["up"], y)))
        return str(g.op("Add", x, self._scaled(module, "layer_scale2", y)))

    def _scaled(self, module: Any, name: str, x: str) -> str:
        scale = getattr(getattr(module, name, None), "lambda1", None)
        if scale is None:
            return x
        stored = self.graph.tensor(f"{name}.{len(self.graph.nodes)}", scale.data.float())
        return str(self.graph.op("Mul", x, stored))

    def _attention(self, block: Block, paths: dict[Any, str], x: str) -> str:
        g, heads = self.graph, block.site("o_in").heads
        if heads is None:
            raise ArchitectureError(f"{block.name} has no head structure")
        path = paths["query"].rpartition(".")[0]
        module = self.model.get_submodule(path)
        operands = getattr(module, "operands", None)

        def rounded(value: str, part: str) -> str:
            if not isinstance(operands, AttentionOperands):
                return value
            quantizer = getattr(operands, part)
            return static_round_trip(g, value, f"{path}.{part}", quantizer)

        q, k, v = (
            rounded(
                g.transpose(
                    g.reshape(self._linear(paths[role], x), 0, 0, heads.query, heads.size),
                    0, 2, 1, 3,
                ),
                role,
            )
            for role in ("query", "key", "value")
        )  # fmt: skip
        scaling = g.constant(float(getattr(module, "scaling", heads.size**-0.5)))
        scores = g.op("Mul", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), scaling)
        mixed = g.op("MatMul", rounded(g.op("Softmax", scores, axis=-1), "probabilities"), v)
        mixed = g.reshape(g.transpose(mixed, 0, 2, 1, 3), 0, 0, heads.query * heads.size)
        return self._linear(paths["output"], mixed)


class _Pose:
    """The formulas behind a pose network, see :mod:`postlude.zoo.fastpose_vit`; branch-free."""

    def __init__(self, graph: Graph, camera: Camera) -> None:
        self.graph, self.camera = graph, camera

    def _numbers(self, x: str, count: int) -> list[str]:
        found = self.graph.op("Split", x, outputs=count, axis=-1, num_outputs=count)
        return list(found)

    def _c(self, value: float) -> str:
        return self.graph.constant([value])

    def _o(self, kind: str, *inputs: str) -> str:
        return str(self.graph.op(kind, *inputs))

    def _normalised(self, values: list[str]) -> list[str]:
        squares = [self._o("Mul", v, v) for v in values]
        length = self._o("Sqrt", self._o("Add", self._o("Add", *squares[:2]), squares[2]))
        return [self._o("Div", v, length) for v in values]

    def write(self, outputs: str, *, apparent: bool, output: Any) -> None:
        """From the nine outputs to ``translation`` and ``rotation``."""
        o, c, camera = self._o, self._c, self.camera
        x1, y1, x2, y2 = self._numbers("boxes", 4)
        nine = self._numbers(outputs, 9)
        w, h = o("Sub", x2, x1), o("Sub", y2, y1)
        bx, by = (o("Mul", o("Add", a, b), c(0.5)) for a, b in ((x1, x2), (y1, y2)))
        z = o("Div", o("Mul", nine[2], c(2.0 * camera.height)), o("Add", w, h))
        u = o("Sub", o("Add", o("Mul", nine[0], w), bx), c(camera.cx))
        v = o("Sub", o("Add", o("Mul", nine[1], h), by), c(camera.cy))
        across, down = o("Div", u, c(camera.fx)), o("Div", v, c(camera.fy))
        translation = self._joined([o("Mul", across, z), o("Mul", down, z), z])
        output("translation", translation, ("batch", 3))
        columns = self._gram_schmidt(nine[3:6], nine[6:9])
        rows = self.graph.op("Concat", *(self._column(column) for column in columns), axis=-1)
        if apparent:
            one = o("Add", o("Sub", across, across), c(1.0))
            turn = self._minimal_rotation(*self._normalised([across, down, one]))
            rows = self.graph.op("MatMul", turn, rows)
        output("rotation", rows, ("batch", 3, 3))

    def _joined(self, values: list[str]) -> str:
        return str(self.graph.op("Concat", *values, axis=-1))

    def _column(self, values: list[str]) -> str:
        return self.graph.reshape(self._joined(values), 0, 3, 1)

    def _gram_schmidt(self, a: list[str], b: list[str]) -> list[list[str]]:
        o = self._o
        first = self._normalised(a)
        products = [o("Mul", x, y) for x, y in zip(b, first, strict=True)]
        along = o("Add", o("Add", *products[:2]), products[2])
        rest = [o("Sub", x, o("Mul", along, y)) for x, y in zip(b, first, strict=True)]
        second = self._normalised(rest)
        third = [
            o("Sub", o("Mul", first[i], second[j]), o("Mul", first[j], second[i]))
            for i, j in ((1, 2), (2, 0), (0, 1))
        ]
        return [first, second, third]

    def _minimal_rotation(self, x: str, y: str, z: str) -> str:
        o, one = self._o, self._c(1.0)
        scale = o("Div", one, o("Add", one, z))
        xx, xy, yy = (o("Mul", o("Mul", a, b), scale) for a, b in ((x, x), (x, y), (y, y)))
        minus = o("Neg", xy)
        entries = [o("Sub", one, xx), minus, x, minus, o("Sub", one, yy), y]
        entries += [o("Neg", x), o("Neg", y), z]
        return self.graph.reshape(self._joined(entries), 0, 3, 3)
