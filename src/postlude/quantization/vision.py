"""The family of quantizers for vision transformers: scale re-parameterisation times a grid for attention and for GELU.

Everything is rounded with parameters that calibration fixed, as integer hardware wants it: the inputs of all linears,
queries, keys and values (a range for each head), and what the softmax gives. A method says three things:

    centre         how channel ranges of post-LayerNorm inputs become one range
    post_softmax   the grid of attention probabilities
    post_gelu      the grid of the MLP's inner activations

The ranges of channels differ so much behind a LayerNorm that one range for all of them loses most of the bits. So
RepQ-ViT (arXiv:2212.08254) learns one scale ``s`` and zero point ``z`` for each channel, and then moves the
differences into the norm and the linears behind it, for good::

    r1 = s / s_t    r2 = z - z_t        s_t, z_t: the centre of s and z
    gamma <- gamma / r1    beta <- (beta + s r2) / r1    bias <- bias - W (s r2)    W <- W diag(r1)

The float function is the same, and a single ``(s_t, z_t)`` now gives every channel the codes that its own scale gave
it, as long as ``z_t``, which is no whole number, is added before rounding; the authors' code adds it after.

Statistics are those of the float model, of up to `ROWS` tokens of a site and `PICTURES` pictures of an attention.
Weights are asymmetric integers with one scale an output channel and a searched range. Embeddings and head stay in
floating point, where the papers round them to 8 bits (our choice, that of all quantizers here).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from postlude.errors import ArchitectureError, SettingsError
from postlude.numerics.activation_grids import ActivationGrid, Score, Uniform, percentile_range
from postlude.numerics.formats import Integer
from postlude.numerics.schemes import Granularity, Scheme
from postlude.quantization.engine import FLOAT, Quantizer
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block, Heads, Kind, Site
from postlude.surgery.batches import Calibration, forward_batches
from postlude.surgery.capture import observe
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.rewrite import replace_module, scale_norm_site, shift_norm_site
from postlude.surgery.static_quantizers import (
    AttentionOperands,
    StaticQuantizer,
    attach_operands,
    use_operands,
)

__all__ = ["PICTURES", "ROWS", "Seen", "VisionQuantizer", "reparameterise"]

ROWS = 2048
PICTURES = 8
# Rows that a search over the parameters of a grid looks at.
SEARCHED = 512

# A channel that hardly moves would be stretched without bound; its scale is kept above this share of the mean.
_NARROWEST = 1e-3
_OPERANDS = ("query", "key", "value")


@dataclasses.dataclass
class Seen:
    """What calibration showed of one block.

    Attributes:
        sites: ``[rows, width]`` by name.
        query, key, value: ``[pictures, heads, tokens, size]``.
        scaling: of the attention's scores.
    """

    sites: dict[str, Tensor]
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

    @property
    def probabilities(self) -> Tensor:
        """What the softmax gives, ``[pictures, heads, tokens, tokens]``."""
        return (self.query @ self.key.mT * self.scaling).softmax(-1)


@dataclasses.dataclass(frozen=True)
class VisionQuantizer(Quantizer):
    """Base of the quantizers for vision transformers.

    Attributes:
        clip: search the range of every weight group.
        output_error: choose the parameters of special grids by the error after the next matrix product, rather than
            of the values themselves.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("vision",)

    kv: int = FLOAT
    clip: bool = True
    output_error: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_group != "token":
            raise SettingsError(
                f"{self._name}: activation_group is {self.activation_group!r}, but its activations have fixed ranges; "
                "leave it out"
            )

    # What a method says

    def centre(self, values: Tensor) -> Tensor:
        """One number for those of all channels ``[width]``: their mean."""
        return values.mean()

    def channel_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel of ``[rows, width]``, fp64 ``[width]``."""
        return percentile_range(rows, self.activations)

    def post_softmax(self) -> ActivationGrid:
        """The grid of attention probabilities."""
        return Uniform(self.activations)

    def post_gelu(self) -> ActivationGrid:
        """The grid of the input of the MLP's second linear."""
        return Uniform(self.activations)

    # What they share

    def weight_scheme(self, site: Site) -> Scheme | None:
        """Asymmetric integers."""
        if self.weights == FLOAT:
            return None
        return Scheme(Integer(self.weights, symmetric=False), Granularity.parse(self.group))

    def input_scheme(self, site: Site) -> Scheme | None:
        """None: inputs are rounded by a :class:`StaticQuantizer` in front of the layer."""
        return None

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        if calibration is None:
            raise ValueError(f"{self._name} needs calibration data")
        if self.activations == FLOAT:
            return {}
        found: dict[str, Tensor] = {}
        for block, seen in _look(checkpoint, calibration):
            for name, parameters in self._fit(checkpoint.model, block, seen).items():
                found |= {f"{block.index}.{name}.{key}": value for key, value in parameters.items()}
        return found

    def _fit(self, model: nn.Module, block: Block, seen: Seen) -> dict[str, dict[str, Tensor]]:
        """Parameters of every grid of a block, by the name of a site or of an operand."""
        uniform = Uniform(self.activations)
        fitted: dict[str, dict[str, Tensor]] = {}
        for site in block.sites:
            rows = seen.sites[site.name]
            if site.norm is not None:
                scale, zero = self.channel_range(rows)
                fitted[site.name] = {"scale": scale, "zero_point": zero}
            elif site.name == "down_in":
                rows = rows[:: max(1, len(rows) // SEARCHED)]
                score = self._after_linears(model, site, rows) if self.output_error else None
                fitted[site.name] = self.post_gelu().fit(rows, score)
            else:
                fitted[site.name] = uniform.fit(rows)
        for name in _OPERANDS:
            values = getattr(seen, name)
            scale, zero = percentile_range(values.transpose(0, 1).flatten(1).T, self.activations)
            fitted[name] = {
                "scale": scale.float()[:, None, None],
                "zero_point": zero.float()[:, None, None],
            }
        probabilities = seen.probabilities
        score = _after_values(probabilities, seen.value) if self.output_error else None
        fitted["probabilities"] = self.post_softmax().fit(probabilities, score)
        return fitted

    def _after_linears(self, model: nn.Module, site: Site, rows: Tensor) -> Score:
        weights = [reader.weight(model).float() for reader in site.readers]
        # As much as the sum of squares of the output, which W^T W gives without computing it for every row.
        gram = torch.stack([weight.T @ weight for weight in weights]).sum(0)

        def score(rounded: Tensor) -> float:
            error = rounded - rows
            return float(((error @ gram) * error).mean())

        return score

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        if self.activations == FLOAT:
            return
        model = checkpoint.model
        use_operands(model)
        for block in checkpoint.anatomy.blocks:

            def known(name: str, block: Block = block) -> dict[str, Tensor]:
                inside = f"{block.index}.{name}."
                return {
                    key.removeprefix(inside): value
                    for key, value in statistics.items()
                    if key.startswith(inside)
                }

            for site in block.sites:
                parameters = known(site.name)
                grid: ActivationGrid = Uniform(self.activations)
                if site.norm is not None:
                    parameters = reparameterise(model, site, parameters, self.centre)
                elif site.name == "down_in":
                    grid = self.post_gelu()
                _put_in_front(model, site, grid, parameters)
            uniform = Uniform(self.activations)
            query, key, value = (_quantizer(uniform, known(name)) for name in _OPERANDS)
            probabilities = _quantizer(self.post_softmax(), known("probabilities"))
            operands = AttentionOperands(query, key, value, probabilities)
            attach_operands(model, _attention(block), operands.to(model.device))


def reparameterise(
    model: nn.Module,
    site: Site,
    channels: Mapping[str, Tensor],
    centre: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Move the differences between channel ranges into the norm and the linears around a site.

    Args:
        model: changed in place; its function is not.
        site: one fed by a LayerNorm with gain and bias.
        channels: ``scale`` and ``zero_point``, ``[width]``.
        centre: what makes one number of those of all channels.

    Returns:
        ``scale`` and ``zero_point`` of the whole tensor, fp32 ``[1]``; the second is not a whole number.
    """
    device = site.readers[0].weight(model).device
    scale, zero = (channels[name].double().to(device) for name in ("scale", "zero_point"))
    floor = scale.mean() * _NARROWEST
    # The same values in wider steps: z = -low / s moves with s.
    zero = torch.where(scale < floor, zero * scale / floor, zero)
    scale = torch.where(scale < floor, floor, scale)
    whole, whole_zero = centre(scale), centre(zero)
    shift_norm_site(model, site, scale * (zero - whole_zero))
    scale_norm_site(model, site, scale / whole)
    return {"scale": whole.float().reshape(1), "zero_point": whole_zero.float().reshape(1)}


def _quantizer(grid: ActivationGrid, parameters: Mapping[str, Tensor]) -> StaticQuantizer:
    made = StaticQuantizer.of(grid, parameters)
    made.quantize = False
    return made


def _put_in_front(
    model: nn.Module, site: Site, grid: ActivationGrid, parameters: Mapping[str, Tensor]
) -> None:
    for path in site.modules:
        old = model.get_submodule(path)
        transform = _quantizer(grid, parameters).to(site.readers[0].weight(model).device)
        layer = QuantizedLinear.like(old, transform=transform)
        layer.weight.data.copy_(old.weight.data)  # type: ignore[arg-type]
        replace_module(model, path, layer)


def _attention(block: Block) -> str:
    """Path of the module that holds the query projection."""
    return _reader(block, "query").rpartition(".")[0]


def _reader(block: Block, role: str) -> str:
    return next(r.module for site in block.sites for r in site.readers if r.role == role)


def _heads(block: Block) -> Heads:
    heads = block.site("o_in").heads
    if heads is None:
        raise ArchitectureError(f"block {block.index} has no head structure")
    return heads


class _Rows:
    """Evenly spaced rows of what passes, about ``limit`` in all."""

    def __init__(self, limit: int) -> None:
        self._limit, self._parts = limit, []  # type: tuple[int, list[Tensor]]

    def update(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        step = max(1, len(rows) // self._limit)
        self._parts.append(rows[::step][: self._limit].clone())

    def value(self) -> Tensor:
        return torch.cat(self._parts)


def _look(checkpoint: Checkpoint, calibration: Calibration) -> Iterator[tuple[Block, Seen]]:
    """Run the model once and keep a part of what every block reads."""
    model: Any = checkpoint.model
    batches = list(forward_batches(calibration))
    rows = {
        (block.index, site.name): _Rows(max(1, ROWS // len(batches)))
        for block, site in checkpoint.anatomy.sites()
    }
    kept = {
        (block.index, name): _Pictures()
        for block in checkpoint.anatomy.blocks
        for name in _OPERANDS
    }
    handles = [
        model.get_submodule(_reader(checkpoint.anatomy.blocks[index], name)).register_forward_hook(
            pictures.hook
        )
        for (index, name), pictures in kept.items()
    ]
    try:
        observe(model, checkpoint.anatomy, batches, {key: one.update for key, one in rows.items()})
    finally:
        for handle in handles:
            handle.remove()
    for block in checkpoint.anatomy.blocks:
        size = _heads(block).size
        scaling = getattr(model.get_submodule(_attention(block)), "scaling", size**-0.5)
        query, key, value = (kept[block.index, name].value(size) for name in _OPERANDS)
        sites = {site.name: rows[block.index, site.name].value() for site in block.sites}
        yield block, Seen(sites, query, key, value, scaling)


class _Pictures:
    """What a projection gives for the first pictures."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def hook(self, _: nn.Module, __: Any, output: Tensor) -> None:
        missing = PICTURES - sum(map(len, self._parts))
        if missing > 0:
            self._parts.append(output[:missing].detach().float().clone())

    def value(self, size: int) -> Tensor:
        """``[pictures, heads, tokens, size]``."""
        return torch.cat(self._parts).unflatten(-1, (-1, size)).transpose(1, 2)


def _after_values(probabilities: Tensor, value: Tensor) -> Score:
    def score(rounded: Tensor) -> float:
        return float(((rounded - probabilities) @ value).square().mean())

    return score
