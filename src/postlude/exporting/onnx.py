"""ONNX: a graph for ONNX Runtime, with a KV cache.

Inputs and outputs (``past`` may be 0; positions count on from it)::

    input_ids                    int64 [batch, length]
    past_key_values.{i}.key      fp32  [batch, key/value heads, past, head size]      and .value
    logits                       fp32  [batch, length, vocabulary]
    present.{i}.key              fp32  [batch, key/value heads, past + length, head size]      and .value

Weights of up to 8 bits stay packed (``com.microsoft.MatMulNBits``), symmetric 8-bit weights with 8-bit inputs are
multiplied as integers (``MatMulInteger``), everything else is fp32. What Postlude does online is in the graph too:
Hadamard transforms, rotated and rounded keys and values, activations rounded per token. So rotated checkpoints
(QuaRot, OffQ) run here, where formats without a graph have no place for them. The cache holds rounded values in fp32.

Vision transformers become one file, see :mod:`postlude.exporting.onnx_vision`. Of a language model, the directory has
``model.onnx``, its weights in ``model.onnx.data``, their checksums, the configuration and the tokenizer.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from postlude.errors import ArchitectureError, MissingDependencyError
from postlude.exporting.engine import Exporter
from postlude.exporting.onnx_graph import Graph, layer_reason
from postlude.exporting.onnx_vision import VisionONNX
from postlude.exporting.plain import Plain, plain, refuse
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.quiet import quiet_transformers
from postlude.runs.selfcheck import compare_reload
from postlude.surgery.anatomy import LanguageBlock
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.layers import QuantizedLinear

__all__ = ["ONNX"]

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_FILE = "model.onnx"

_LOAD = """
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
def logits(tokens):
    feed = {"input_ids": tokens}
    for given in session.get_inputs()[1:]:
        feed[given.name] = numpy.zeros((len(tokens), given.shape[1], 0, given.shape[3]), numpy.float32)
    return session.run(["logits"], feed)[0]
"""


@method("export", "onnx", family="engine format")
@dataclasses.dataclass(frozen=True)
class ONNX(Exporter):
    """A directory with a graph for ONNX Runtime, with packed weights and a KV cache."""

    marker: ClassVar[str | None] = _FILE
    weights: ClassVar[str] = f"{_FILE}*"

    def for_model(self, checkpoint: Checkpoint) -> Exporter:
        return VisionONNX(library=_library()) if checkpoint.kind == "vision" else self

    def write(self, checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
        _ = checkpoint.language  # others are refused by what they are
        kind = checkpoint.model.config.model_type
        if kind not in ARCHITECTURES:
            raise ArchitectureError(
                f"the ONNX export does not know models of type {kind!r}; it knows {', '.join(ARCHITECTURES)}"
            )
        library = _library()
        parts = plain(checkpoint, "ONNX", transforms=True)
        reasons = [layer_reason(path, layer) for path, layer in parts.layers.items()]
        refuse("ONNX", [reason for reason in reasons if reason])
        graph = Graph(library)
        _Writer(checkpoint, parts, graph, library).write()
        library.save_model(
            graph.model(),
            str(out / _FILE),
            save_as_external_data=True,
            location=f"{_FILE}.data",
            size_threshold=1024,
        )
        with quiet_transformers():
            parts.config.save_pretrained(out)
            if checkpoint.tokenizer is not None:
                checkpoint.tokenizer.save_pretrained(out)
        return {"layers": graph.kinds}

    def check(self, checkpoint: Checkpoint, out: Path) -> dict[str, float]:
        model = checkpoint.model
        # A sum in another order may round an activation to the next code.
        rounds = any(
            (isinstance(m, QuantizedLinear) and m.input_scheme is not None)
            or (isinstance(m, KeyValueQuantizer) and m.schemes() != (None, None))
            for m in model.modules()
        )  # fmt: skip
        found = compare_reload(
            model,
            checkpoint.language,
            _LOAD,
            [str(out / _FILE)],
            tolerance=0.1 if rounds else 1e-3,
            what="the export to ONNX",
        )
        return {
            "reload_max_difference": found.max_difference,
            "reload_relative_difference": found.relative,
        }


def _library() -> Any:
    try:
        importlib.import_module("onnxruntime")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX graphs are written with onnx and checked with onnxruntime: pip install 'postlude[edge]'"
        ) from error


class _Writer:
    """Walks the blocks of a model and writes them into a graph."""

    def __init__(self, checkpoint: Checkpoint, parts: Plain, graph: Graph, library: Any) -> None:
        self.model, self.anatomy = checkpoint.model, checkpoint.language
        self.parts, self.graph = parts, graph
        self.float, self.int64 = library.TensorProto.FLOAT, library.TensorProto.INT64
        self.epsilon = self.model.config.rms_norm_eps

    def write(self) -> None:
        g, float_, model = self.graph, self.float, self.model
        heads = self.anatomy.blocks[0].heads
        g.inputs.append(g.value("input_ids", self.int64, ("batch", "length")))
        for block in self.anatomy.blocks:
            for part in ("key", "value"):
                past = ("batch", heads.key_value, "past", heads.size)
                name = f"past_key_values.{block.index}.{part}"
                g.inputs.append(g.value(name, float_, past))
        table = self.parts.tensors[f"{self.anatomy.embeddings[0]}.weight"].float()
        x = g.op("Gather", g.tensor("embedding", table), "input_ids", axis=0)
        self._positions()
        for block in self.anatomy.blocks:
            x = self._block(block, x)
        x = self._norm(self.anatomy.final_norm, x)
        head = model.get_output_embeddings()
        tied = f"{self.anatomy.head}.weight" not in self.parts.tensors
        weight = table if tied else head.weight.data
        logits = g.linear(x, self.anatomy.head, weight, head.bias)
        self._output("logits", logits, ("batch", "length", table.shape[0]))

    def _output(self, name: str, value: str, shape: tuple[str | int, ...]) -> None:
        self.graph.op("Identity", value)
        self.graph.nodes[-1].output[0] = name
        self.graph.outputs.append(self.graph.value(name, self.float, shape))

    def _positions(self) -> None:
        """Cosines and sines of the new positions, and the distance of every query to every key."""
        g = self.graph
        rotary = self.model.get_submodule(f"{self.anatomy.decoder}.rotary_emb")
        past = g.op("Shape", "past_key_values.0.key", start=2, end=3)
        length = g.op("Shape", "input_ids", start=1, end=2)
        total = g.op("Add", past, length)
        zero, one = g.constant(0, np.int64), g.constant(1, np.int64)

        def scalar(x: str) -> str:
            return str(g.op("Squeeze", x))

        positions = g.op("Range", scalar(past), scalar(total), one)
        keys = g.op("Range", zero, scalar(total), one)
        column = g.op("Unsqueeze", positions, g.constant([1], np.int64))
        self.distance = g.op("Sub", column, keys)
        frequencies = g.tensor("rotary", rotary.inv_freq.float().reshape(1, -1))
        angles = g.op("Mul", g.cast(column, self.float), frequencies)
        angles = g.op("Concat", angles, angles, axis=-1)
        scaling = g.constant(float(getattr(rotary, "attention_scaling", 1.0)))
        self.cosine = g.op("Mul", g.op("Cos", angles), scaling)
        self.sine = g.op("Mul", g.op("Sin", angles), scaling)
        self._masks: dict[int | None, str] = {}

    def _mask(self, window: int | None) -> str:
        """What is added to the scores: 0 where a query may look, and the lowest number elsewhere."""
        if window not in self._masks:
            g = self.graph
            seen = g.op("GreaterOrEqual", self.distance, g.constant(0, np.int64))
            if window is not None:
                near = g.op("Less", self.distance, g.constant(window, np.int64))
                seen = g.op("And", seen, near)
            lowest = g.constant(torch.finfo(torch.float32).min)
            self._masks[window] = g.op("Where", seen, g.constant(0.0), lowest)
        return self._masks[window]

    def _norm(self, path: str, x: str) -> str:
        weight: Tensor = self.parts.tensors[f"{path}.weight"]
        return str(self.graph.rms_norm(x, weight, self.epsilon, f"{path}.weight"))

    def _linear(self, path: str, x: str) -> str:
        if path in self.parts.layers:
            return str(self.graph.quantized(x, path, self.parts.layers[path]))
        module = self.model.get_submodule(path)
        return str(self.graph.linear(x, path, module.weight.data, module.bias))

    def _block(self, block: LanguageBlock, x: str) -> str:
        g = self.graph
        norms = [site.norm for site in block.sites if site.norm is not None]
        x = g.op("Add", x, self._attention(block, self._norm(norms[0], x)))
        y = self._norm(norms[1], x)
        gate = self._linear(block.linear("gate").module, y)
        up = self._linear(block.linear("up").module, y)
        product = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        return str(g.op("Add", x, self._linear(block.linear("down").module, product)))

    def _attention(self, block: LanguageBlock, x: str) -> str:
        g, heads = self.graph, block.heads
        module = self.model.get_submodule(block.attention)
        quantizer = getattr(module, "key_values", None)
        q = self._heads(block, "query", x, heads.query, getattr(module, "q_norm", None))
        k = self._heads(block, "key", x, heads.key_value, getattr(module, "k_norm", None))
        v = g.reshape(self._linear(block.linear("value").module, x), 0, 0, -1, heads.size)
        q, k, v = self._rotary(q), self._rotary(k), g.transpose(v, 0, 2, 1, 3)
        # [batch, heads of the cache, queries that share one, length, size]
        q = g.reshape(q, 0, heads.key_value, heads.shared, -1, heads.size)
        if quantizer is not None and quantizer.rotation is not None:
            name = f"{block.attention}.rotation"
            q = g.rotate_heads(q, name, quantizer.rotation)
            k = g.reshape(k, 0, heads.key_value, 1, -1, heads.size)
            k = g.rotate_heads(k, name, quantizer.rotation)
            k = g.reshape(k, 0, heads.key_value, -1, heads.size)
        if quantizer is not None:
            key, value = quantizer.schemes()
            k = k if key is None else g.round_trip(k, key, heads.size)
            v = v if value is None else g.round_trip(v, value, heads.size)
        k = self._cached(block.index, "key", k)
        v = self._cached(block.index, "value", v)
        k = g.transpose(g.reshape(k, 0, heads.key_value, 1, -1, heads.size), 0, 1, 2, 4, 3)
        v = g.reshape(v, 0, heads.key_value, 1, -1, heads.size)
        scores = g.op("Mul", g.op("MatMul", q, k), g.constant(float(module.scaling)))
        scores = g.op("Add", scores, self._mask(self._window(block.index)))
        mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
        mixed = g.reshape(mixed, 0, heads.query, -1, heads.size)
        mixed = g.reshape(g.transpose(mixed, 0, 2, 1, 3), 0, 0, heads.query * heads.size)
        return self._linear(block.linear("output").module, mixed)

    def _heads(self, block: LanguageBlock, role: Any, x: str, count: int, norm: Any) -> str:
        """``[batch, heads, length, size]``."""
        g = self.graph
        path = block.linear(role).module
        y = g.reshape(self._linear(path, x), 0, 0, count, block.heads.size)
        if norm is not None:
            y = g.rms_norm(y, norm.weight.data, self.epsilon, f"{path}.norm")
        return str(g.transpose(y, 0, 2, 1, 3))

    def _rotary(self, x: str) -> str:
        g = self.graph
        half, rest = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        turned = g.op("Concat", g.op("Neg", rest), half, axis=-1)
        return str(g.op("Add", g.op("Mul", x, self.cosine), g.op("Mul", turned, self.sine)))

    def _cached(self, index: int, part: str, new: str) -> str:
        heads = self.anatomy.blocks[index].heads
        whole = self.graph.op("Concat", f"past_key_values.{index}.{part}", new, axis=2)
        self._output(
            f"present.{index}.{part}", whole, ("batch", heads.key_value, "total", heads.size)
        )
        return str(whole)

    def _window(self, index: int) -> int | None:
        config = self.model.config
        types = getattr(config, "layer_types", None)
        window: int | None = getattr(config, "sliding_window", None)
        if types is not None:
            return window if types[index] == "sliding_attention" else None
        return window if config.model_type == "mistral" else None
