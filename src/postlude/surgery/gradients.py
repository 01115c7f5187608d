"""Per-example gradients of linear layers: one forward and one backward pass for a whole batch.

The weight gradient of one example is the outer product, summed over its tokens, of what a linear layer reads and of
the gradient of the loss at what it writes. Hooks see both, so one backward pass of a loss that is a **sum over
examples** gives the gradients of all of them::

    G_i = (X_i @ P_in).T @ (dY_i @ P_out)          [in_width, out_width]

``X [tokens, in_features]`` is projected in the forward pass and only the projection is kept; ``dY`` is projected as
it passes. The projections are seeded Rademacher matrices of entries ``+-1 / sqrt(width)``, made again from the seed
and the layer's name whenever they are needed, never stored. Without projection ``G_i`` is the gradient of the weight
in ``[in_features, out_features]``: the transpose of ``nn.Linear.weight.grad``, and transformers' ``Conv1D`` as it is.

No weight gradient is computed: every parameter is frozen, and the tape starts at the output of the first collected
layer. Biases are left out. This is the collector of LoRIF (arXiv:2601.21929) and of LoGRA (arXiv:2405.13954).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from postlude.errors import ArchitectureError, DataError, SettingsError
from postlude.surgery.anatomy import Anatomy, is_transposed
from postlude.surgery.layers import QuantizedLinear

__all__ = [
    "CollectedLayer",
    "GradientCollector",
    "Projection",
    "ProjectionRule",
    "features_of",
    "linear_paths",
    "rademacher",
]

Side = Literal["in", "out"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CollectedLayer:
    """A linear layer whose gradients are collected.

    Attributes:
        module: dotted path.
        in_features, out_features: of the layer.
        in_width, out_width: after the projection; equal to the features where there is none.
    """

    module: str
    in_features: int
    out_features: int
    in_width: int
    out_width: int

    @property
    def size(self) -> int:
        """Entries of one gradient."""
        return self.in_width * self.out_width


class ProjectionRule(Protocol):
    """What narrows the two sides of a gradient."""

    def width(self, features: int) -> int:
        """Columns of the projection of a side with so many features; ``features`` where there is none."""

    def signs(self, module: str, side: Side, features: int) -> Tensor | None:
        """``[features, width]``; None leaves the side alone. Scaled by :meth:`scale` afterwards."""

    def scale(self, features: int) -> float:
        """Factor on the product with :meth:`signs`."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """Rademacher projections of both sides.

    Attributes:
        factor: a side of ``n`` features becomes ``ceil(n / factor)`` wide (our rounding), at least 1; or
        side: becomes ``min(n, side)`` wide; 0 goes by ``factor``.
        seed: of the signs.

    A side that would keep its width is left alone.
    """

    factor: int = 1
    side: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("factor", 1), ("side", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingsError(
                    f"projection {name} is {value!r}; expected an integer from {least}"
                )
        if self.side and self.factor != 1:
            raise SettingsError(
                f"a projection goes by a factor or by a side; got factor {self.factor} and side {self.side}"
            )

    def width(self, features: int) -> int:
        return min(features, self.side) if self.side else -(-features // self.factor)

    def signs(self, module: str, side: Side, features: int) -> Tensor | None:
        """``int8 [features, width]`` of -1 and 1."""
        width = self.width(features)
        return None if width == features else rademacher(self.seed, module, side, features, width)

    def scale(self, features: int) -> float:
        width = self.width(features)
        return 1.0 if width == features else 1 / math.sqrt(width)


def rademacher(seed: int, module: str, side: Side, features: int, width: int) -> Tensor:
    """Independent fair signs ``int8 [features, width]``, a function of the arguments alone."""
    digest = hashlib.sha256(f"projection {seed} {module} {side}".encode()).digest()
    # PyTorch's CPU generator reads the low 32 bits of a seed and no others.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    bits = torch.randint(0, 2, (features, width), generator=generator, dtype=torch.int8)
    return bits.mul_(2).sub_(1)


def linear_paths(anatomy: Anatomy, layers: str | Sequence[str] = "*") -> tuple[str, ...]:
    """Paths of the linears of all blocks that match a pattern, in the order of the forward pass.

    Embeddings and head are never among them.

    Args:
        anatomy: of the model.
        layers: shell patterns of module paths (``"*.mlp.*"``); one of them is enough.

    Raises:
        SettingsError: nothing matches.
    """
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    known = tuple(dict.fromkeys(anatomy.linears()))
    chosen = tuple(
        path for path in known if any(fnmatch.fnmatchcase(path, one) for one in patterns)
    )
    if not chosen:
        raise SettingsError(
            f"no linear layer matches {', '.join(map(repr, patterns))}; the paths look like "
            f"{known[0]!r} and {known[-1]!r}, and '*' stands for any part of one"
        )
    return chosen


def features_of(module: nn.Module, path: str = "the module") -> tuple[int, int]:
    """``(in_features, out_features)`` of a linear layer of any class.

    Raises:
        ArchitectureError: not a linear layer, or one through whose input no gradient passes.
    """
    if is_transposed(module) and isinstance(module.weight, Tensor):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, QuantizedLinear) and module.input_scheme is not None:
        raise ArchitectureError(
            f"{path} rounds its input, and no gradient passes a rounding: attribute the model before its "
            "activations were quantized, or one with quantized weights only"
        )
    if isinstance(module, nn.Linear | QuantizedLinear):
        return int(module.in_features), int(module.out_features)
    raise ArchitectureError(
        f"{path} is a {type(module).__name__}; gradients are collected of nn.Linear, Conv1D and layers with "
        "quantized weights"
    )


def _collected_path(model: nn.Module, path: str) -> str:
    """The path itself, or of the base layer inside a peft adapter layer, which holds the weight."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ArchitectureError(f"the model has no module {path!r}") from error
    return (
        f"{path}.base_layer" if isinstance(getattr(module, "base_layer", None), nn.Module) else path
    )


class GradientCollector:
    """Collects per-example gradients inside a ``with`` block, which freezes the model.

    Args:
        model: any module; put into eval mode meanwhile.
        layers: paths of linear layers. A peft adapter layer stands for the base layer inside it.
        projection: what narrows the gradients.
        dtype: of the collected gradients; None for fp32, or fp64 where the activations are.

    Attributes:
        layers: in the order given.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        projection: ProjectionRule | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.projection: ProjectionRule = Projection() if projection is None else projection
        self.dtype = dtype
        described = []
        self._modules: dict[str, nn.Module] = {}
        for given in layers:
            path = _collected_path(model, given)
            module = model.get_submodule(path)
            n_in, n_out = features_of(module, path)
            width = self.projection.width
            described.append(CollectedLayer(given, n_in, n_out, width(n_in), width(n_out)))
            self._modules[given] = module
        self.layers = tuple(described)
        self._frozen: list[nn.Parameter] = []
        self._training = False
        self._handles: list[Any] = []
        self._matrices: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        # What the running pass needs: number of examples, open calls and sums of each layer, where results go.
        self._examples = 0
        self._open: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._observer: Callable[[CollectedLayer, Tensor, Tensor], None] | None = None
        self._each: Callable[[CollectedLayer, Tensor], Any] = _itself
        self._results: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._training = self.model.training
        self.model.eval()
        self._frozen = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for layer in self.layers:
            module = self._modules[layer.module]
            self._handles.append(module.register_forward_hook(self._forward_hook(layer)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self._matrices = {}
        self.model.train(self._training)

    def collect(
        self,
        loss: Callable[[], Tensor],
        examples: int,
        each: Callable[[CollectedLayer, Tensor], T] | None = None,
        observer: Callable[[CollectedLayer, Tensor, Tensor], None] | None = None,
    ) -> dict[str, T]:
        """The gradients of every example of a batch.

        Args:
            loss: runs the model and returns the scalar sum, over examples, of what is differentiated. Examples are
                the leading axis of what every layer reads, or the slowest part of it.
            examples: how many there are.
            each: what to keep of a layer's gradients ``[examples, in_width, out_width]``, called as soon as they
                are complete, so that a whole batch of them never exists; the gradients themselves by default.
            observer: called in the backward pass with a layer, ``X [examples, tokens, in_features]`` and
                ``dY [examples, tokens, out_features]``, both before projection; the inputs of all layers are then
                kept.

        Returns:
            By module path, in the order of ``layers``.

        Raises:
            ArchitectureError: a layer that the loss does not depend on.
            DataError: activations that do not divide into so many examples.
        """
        if not self._handles:
            raise RuntimeError("collect() is called inside `with GradientCollector(...)`")
        self._examples = examples
        self._open, self._sums, self._results = {}, {}, {}
        self._each = _itself if each is None else each
        self._observer = observer
        try:
            with torch.enable_grad():
                total = loss()
                if total.requires_grad:
                    total.backward()
            by_path = {layer.module: layer for layer in self.layers}
            for path in list(
                self._sums
            ):  # calls whose output the loss did not depend on left these open
                self._finish(by_path[path])
            missing = [path for path in by_path if path not in self._results]
            if missing:
                raise ArchitectureError(
                    f"the loss does not depend on {len(missing)} of {len(by_path)} layers, for example "
                    f"{missing[0]!r}: leave them out of the layers"
                )
            return {layer.module: self._results[layer.module] for layer in self.layers}
        finally:
            self._open, self._sums, self._results = {}, {}, {}
            self._each, self._observer = _itself, None

    def matrices(self, layer: CollectedLayer, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``P_in`` and ``P_out`` without their scales, in the type and on the device of a tensor."""
        found = self._matrices.get(layer.module)
        if found is None:
            sides: tuple[tuple[Side, int], ...] = (
                ("in", layer.in_features),
                ("out", layer.out_features),
            )
            pair = [self.projection.signs(layer.module, side, n) for side, n in sides]
            found = (
                None if pair[0] is None else pair[0].to(like.device, like.dtype),
                None if pair[1] is None else pair[1].to(like.device, like.dtype),
            )
            self._matrices[layer.module] = found
        return found

    def _forward_hook(self, layer: CollectedLayer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            x = args[0].detach()
            if isinstance(module, QuantizedLinear) and module.transform is not None:
                with torch.no_grad():
                    x = module.transform(x)  # what the weight is multiplied with
            rows = self._rows(x, layer)
            p_in, _ = self.matrices(layer, rows)
            kept = rows if p_in is None else rows @ p_in
            raw = rows if self._observer is not None else None
            started = not output.requires_grad
            if started:
                output.requires_grad_(True)
            self._open[layer.module] = self._open.get(layer.module, 0) + 1

            def backward(gradient: Tensor) -> None:
                self._add(layer, kept, gradient, raw)

            output.register_hook(backward)
            return output if started else None

        return hook

    def _rows(self, x: Tensor, layer: CollectedLayer) -> Tensor:
        """``[..., features]`` as ``[examples, tokens, features]``."""
        tokens = x.numel() // x.shape[-1]
        if x.ndim < 2 or tokens % self._examples or (x.shape[0] % self._examples and x.ndim > 2):
            raise DataError(
                f"{layer.module} reads a tensor of shape {tuple(x.shape)}, which does not divide into "
                f"{self._examples} examples along its first axis"
            )
        return x.reshape(self._examples, -1, x.shape[-1])

    def _add(
        self, layer: CollectedLayer, kept: Tensor, gradient: Tensor, raw: Tensor | None
    ) -> None:
        with torch.no_grad():
            rows = gradient.detach().reshape(self._examples, -1, gradient.shape[-1])
            if self._observer is not None and raw is not None:
                self._observer(layer, raw, rows)
            _, p_out = self.matrices(layer, rows)
            projected = rows if p_out is None else rows @ p_out
            wide = self.dtype or torch.promote_types(kept.dtype, torch.float32)
            product = kept.to(wide).mT @ projected.to(wide)
            scale = self.projection.scale(layer.in_features) * self.projection.scale(
                layer.out_features
            )
            if scale != 1:
                product *= scale
            if layer.module in self._sums:
                self._sums[layer.module] += product
            else:
                self._sums[layer.module] = product
            self._open[layer.module] -= 1
            if self._open[layer.module] == 0:
                self._finish(layer)

    def _finish(self, layer: CollectedLayer) -> None:
        self._results[layer.module] = self._each(layer, self._sums.pop(layer.module))


def _itself(_: CollectedLayer, gradients: Tensor) -> Any:
    return gradients
