"""What every quantizer shares, whatever the model: language, diffusion or vision.

A system is a settings class with up to five parts, all optional but the schemes::

    fold         rewrites that need no data (untie the head, fold norms)
    statistics   tensors learned from calibration data on the folded float model
    rewrite      function-preserving rewrites made from those tensors
    schemes      how weights, inputs, keys and values are quantized
    rounding     nearest, or GPTQ (arXiv:2210.17323) block by block; another ``round_site`` for what else is stored,
                 or ``round_block`` for weights trained against the output of their block

:func:`quantize` runs them in that order. Statistics and every finished block are units of a run directory, so
a killed run resumes and ends with the same bits. Input and key/value quantizers are switched on last: Hessians
see full-precision activations through already quantized earlier layers, with online transforms active. A model
without a cache has no keys and values to quantize: those bits are left alone there.

A model in 16 bits is raised to fp32 for the rewrites and cast back once at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from postlude import registry
from postlude.errors import DataError, SettingsError, UnknownNameError
from postlude.numerics.formats import Encoded, Granularity, Integer, Scheme
from postlude.numerics.low_rank import BranchFormat
from postlude.numerics.moments import SecondMoment
from postlude.numerics.rounding import gptq, nearest
from postlude.quantization.block_reconstruction import Passage
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.surgery.anatomy import Block, Kind, LanguageBlock, LinearRef, Site
from postlude.surgery.capture import BlockWalk, Calibration, device_of
from postlude.surgery.huggingface import mark
from postlude.surgery.key_values import KeyValueQuantizer, attach, use_rotating_attention
from postlude.surgery.layers import InputScale, LowRankBranch, QuantizedLinear
from postlude.surgery.rewrite import replace_module
from postlude.surgery.static_quantizers import switch

__all__ = [
    "FLOAT",
    "Quantizer",
    "Rounded",
    "Seen",
    "Unit",
    "check_kind",
    "compute_unit",
    "generator",
    "quantize",
]

# Bits that mean "leave it in floating point".
FLOAT = 16
# In the unit of a block: see _squared_error.
_SQUARED = "squared_error"
# What a method learns from, by the kind of model.
_DATA: dict[Kind, str] = {
    "language": "text",
    "diffusion": "inputs of the denoiser",
    "vision": "images",
}
_GIVE = "give some (--calibration FILE)"

Unit = Callable[[str, Callable[[], Mapping[str, Tensor]]], dict[str, Tensor]]


def compute_unit(name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The unit function of a run that keeps nothing."""
    return dict(compute())


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one named random choice, independent of the order in which choices are made."""
    # PyTorch's CPU generator reads the low 32 bits of a seed and no others.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


class Seen(Protocol):
    """What is gathered from the input of a site before its readers are rounded."""

    def update(self, x: Tensor) -> None:
        """Take in ``x [..., width]``."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What takes the place of one weight.

    Attributes:
        main: codes and scales.
        up, down: factors of a low-rank branch, encoded in its format, or in float16 where that has 16 bits.
        smoothing: ``[in_features]``; the stored weight is the given one times this, and its input is divided by it.
    """

    main: Encoded
    up: Encoded | Tensor | None = None
    down: Encoded | Tensor | None = None
    smoothing: Tensor | None = None

    def decode(self) -> Tensor:
        """The weight that it stands for, ``[out_features, in_features]`` fp32."""
        weight = self.main.decode()
        if self.up is not None and self.down is not None:
            weight = weight + _values(self.up) @ _values(self.down)
        return weight if self.smoothing is None else weight / self.smoothing.to(weight)

    def parts(self) -> dict[str, Tensor]:
        """As named tensors."""
        found = _encoded_parts("", self.main)
        for name, factor in (("up", self.up), ("down", self.down)):
            if isinstance(factor, Tensor):
                found[f"{name}.half"] = factor
            elif factor is not None:
                found |= _encoded_parts(f"{name}.", factor)
        return found if self.smoothing is None else {**found, "smoothing": self.smoothing}

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], scheme: Scheme, branch: BranchFormat | None
    ) -> Rounded:
        """What :meth:`parts` came from."""

        def factor(name: str) -> Encoded | Tensor | None:
            kind = None if branch is None else branch.factor_scheme
            return parts.get(f"{name}.half") if kind is None else _encoded(parts, f"{name}.", kind)

        main = _encoded(parts, "", scheme)
        return cls(main, factor("up"), factor("down"), parts.get("smoothing"))


def _values(factor: Encoded | Tensor) -> Tensor:
    return factor.float() if isinstance(factor, Tensor) else factor.decode()


def _encoded_parts(prefix: str, encoded: Encoded) -> dict[str, Tensor]:
    found = {f"{prefix}codes": encoded.codes, f"{prefix}scale": encoded.scale}
    if encoded.zero_point is not None:
        found[f"{prefix}zero_point"] = encoded.zero_point
    return found


def _encoded(parts: Mapping[str, Tensor], prefix: str, scheme: Scheme) -> Encoded:
    codes, scale = parts[f"{prefix}codes"], parts[f"{prefix}scale"]
    return Encoded(codes, scale, parts.get(f"{prefix}zero_point"), scheme)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Base of the settings of every quantizer.

    Attributes:
        weights, activations, kv: bits of linear weights, their inputs, and the KV cache; 16 leaves a part in
            floating point. Embeddings and head always stay.
        group: weights that share a scale: ``channel`` (one output), ``tensor`` or a number of inputs.
        activation_group: activations that share a scale: ``token``, ``tensor`` or a number of channels.
        rounding: ``nearest`` or ``gptq``.
        damping: GPTQ, fraction of the mean diagonal of the Hessian.
        act_order: GPTQ, visit inputs by falling second moment.
        clip: search the range of every weight group (``sum |q - w|^2.4``).
        kinds: what kinds of models the method can do; of the class, not a setting.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("language", "diffusion", "vision")

    weights: int = 4
    activations: int = 4
    kv: int = 4
    group: str | int = "channel"
    activation_group: str | int = "token"
    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = 0.01
    act_order: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        for part in ("weights", "activations", "kv"):
            bits = getattr(self, part)
            whole = isinstance(bits, int) and not isinstance(bits, bool)
            if not whole or (bits != FLOAT and not 2 <= bits <= 8):
                raise SettingsError(
                    f"{self._name}: {part} is {bits!r}; expected 2 to 8 bits, or {FLOAT} to leave them in "
                    "floating point"
                )
        self._check_granularity("group", ("channel", "tensor"))
        self._check_granularity("activation_group", ("token", "tensor"))
        if self.rounding not in _ROUNDINGS:
            raise UnknownNameError("rounding", self.rounding, _ROUNDINGS)
        if not 0 < self.damping < math.inf:
            raise SettingsError(
                f"{self._name}: damping is {self.damping}; expected a positive fraction"
            )

    def _check_granularity(self, name: str, words: tuple[str, ...]) -> None:
        value = getattr(self, name)
        try:
            kind: str | None = Granularity.parse(value).kind
        except SettingsError:
            kind = None
        if kind not in (*words, "group"):
            raise SettingsError(
                f"{self._name}: {name} is {value!r}; expected {', '.join(words)} or a number of channels"
            )

    @property
    def _name(self) -> str:
        return registry.info_of(self).name

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration data is needed: declared by the method, or by GPTQ for rounding weights."""
        declared = "calibration" in registry.info_of(self).needs
        return declared or self.reads_inputs

    @property
    def reads_inputs(self) -> bool:
        """Whether :meth:`round_site` is shown what :meth:`observes` gathered."""
        return self.rounding == "gptq" and self.weights < FLOAT

    @property
    def reconstructs(self) -> bool:
        """Whether :meth:`round_block` is asked, rather than :meth:`round_site` for every site."""
        return False

    @property
    def branch_format(self) -> BranchFormat | None:
        """Format of the low-rank branch that :meth:`round_site` gives every weight; None for none."""
        return None

    def fold(self, checkpoint: Checkpoint) -> None:
        """Rewrites that need no data."""

    def statistics(
        self, checkpoint: Checkpoint, calibration: Calibration | None, seed: int
    ) -> Mapping[str, Tensor]:
        """Tensors learned from tokens ``[samples, length]`` or batches; whatever ``rewrite`` and ``skips`` need."""
        return {}

    def rewrite(self, checkpoint: Checkpoint, statistics: Mapping[str, Tensor], seed: int) -> None:
        """Function-preserving rewrites."""

    def skips(self, block: Block, site: Site, statistics: Mapping[str, Tensor]) -> bool:
        """Whether the readers of this site stay in floating point."""
        return False

    def weight_scheme(self, site: Site) -> Scheme | None:
        """Symmetric integers."""
        if self.weights == FLOAT:
            return None
        return Scheme(Integer(self.weights), Granularity.parse(self.group))

    def input_scheme(self, site: Site) -> Scheme | None:
        """Symmetric integers, scaled at run time."""
        if self.activations == FLOAT:
            return None
        return Scheme(Integer(self.activations), Granularity.parse(self.activation_group))

    def key_value_schemes(self, block: Block) -> tuple[Scheme | None, Scheme | None]:
        """Asymmetric integers whose range holds 0, per token and head."""
        if self.kv == FLOAT:
            return None, None
        scheme = Scheme(Integer(self.kv, symmetric=False, range="zero"), Granularity("token"))
        return scheme, scheme

    def observes(self, site: Site) -> Seen:
        """What to gather from the inputs of a site, through the layers rounded so far; see :attr:`reads_inputs`."""
        return SecondMoment(site.width)

    def rounder(self, scheme: Scheme, hessian: Tensor | None) -> Callable[[Tensor], Encoded]:
        """What rounds one weight by the ``rounding`` that was chosen.

        Args:
            scheme: its grid.
            hessian: ``[in_features, in_features]``, any multiple of ``E[x x^T]``; not read by ``nearest``.
        """
        return lambda weight: _ROUNDINGS[self.rounding](weight, hessian, scheme, self)

    def round_site(
        self, site: Site, weights: Sequence[Tensor], seen: Seen | None, scheme: Scheme
    ) -> list[Rounded]:
        """Round the weights of all linears that read a site.

        Args:
            site: it.
            weights: ``[out_features, in_features]`` each, in the order of ``site.modules``.
            seen: what :meth:`observes` made, filled; None where inputs are not read.
            scheme: grid of the weights.
        """
        hessian = 2 * seen.value() if isinstance(seen, SecondMoment) else None
        rounding = self.rounder(scheme, hessian)
        return [Rounded(rounding(weight)) for weight in weights]

    def round_block(
        self, model: nn.Module, block: Block, passage: Passage, chance: torch.Generator
    ) -> Mapping[str, Rounded]:
        """Round all linears of a block together, by path; weights are left as they are.

        What it switched on is switched off again, and rounds what the next blocks see: the engine does that.
        """
        raise NotImplementedError

    def accounts(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """What a method has to report of the finished model beside its size; kept with the checkpoint."""
        return {}


def _nearest(
    weight: Tensor, hessian: Tensor | None, scheme: Scheme, settings: Quantizer
) -> Encoded:
    return nearest(weight, scheme, clip=settings.clip)


def _gptq(weight: Tensor, hessian: Tensor | None, scheme: Scheme, settings: Quantizer) -> Encoded:
    if hessian is None:
        raise ValueError("gptq needs a Hessian")
    return gptq(
        weight,
        hessian,
        scheme,
        damping=settings.damping,
        act_order=settings.act_order,
        clip=settings.clip,
    )


_ROUNDINGS = {"nearest": _nearest, "gptq": _gptq}


def quantize(
    checkpoint: Checkpoint,
    settings: Quantizer,
    calibration: Calibration | None,
    *,
    seed: int = 0,
    unit: Unit = compute_unit,
    progress: Progress | None = None,
) -> Checkpoint:
    """Quantize a checkpoint in place.

    Args:
        checkpoint: float; its model is rewritten.
        settings: the method.
        calibration: token sequences ``[samples, length]`` of a language model, or batches of keyword arguments of
            the model's forward; None where the method needs none.
        seed: of every random choice.
        unit: stores finished work, see :meth:`postlude.runs.directory.RunDirectory.unit`.
        progress: where to show it.

    Returns:
        The same checkpoint, ready to be saved; its ``path`` is None until it is.

    Raises:
        DataError: the method needs calibration data and got none.
        SettingsError: the method or its settings do not fit the model, or the model is already quantized.
    """
    model, anatomy = checkpoint.model, checkpoint.anatomy
    name = registry.info_of(settings).name
    made = (QuantizedLinear, KeyValueQuantizer)
    if any(isinstance(module, made) for module in model.modules()):
        raise SettingsError("this checkpoint is already quantized; start from the float one")
    check_kind(settings, checkpoint)
    if not checkpoint.reads_tokens:
        settings = dataclasses.replace(settings, kv=FLOAT)
    if settings.needs_calibration and (calibration is None or not len(calibration)):
        raise DataError(f"{name} learns from calibration {_DATA[checkpoint.kind]}: {_GIVE}")
    dtype = model.dtype
    if dtype in (torch.float16, torch.bfloat16):
        _cast(model, torch.float32)
    settings.fold(checkpoint)
    statistics = unit("statistics", lambda: settings.statistics(checkpoint, calibration, seed))
    settings.rewrite(checkpoint, statistics, seed)
    _attach_key_values(model, anatomy.blocks, settings)

    walk = exact = None
    if calibration is not None and (settings.reads_inputs or settings.reconstructs):
        walk = BlockWalk(model, anatomy, calibration)
    if calibration is not None and settings.reconstructs:
        exact = BlockWalk(model, anatomy, calibration)
    squared = torch.zeros(2, dtype=torch.float64)  # of errors, of weights
    with progress or Progress(show=False) as shown:
        for block in shown.iterate(anatomy.blocks, f"{name}: blocks", len(anatomy.blocks)):
            passage = None
            if walk is not None and exact is not None:
                passage = Passage(exact, walk, exact.outputs(block))
            done = unit(
                f"block-{block.index:04d}",
                lambda block=block, passage=passage: _round_block(  # type: ignore[misc]
                    model, block, settings, statistics, walk, passage, seed
                ),
            )
            squared += done.get(_SQUARED, 0)
            _install_block(model, block, settings, statistics, done)
            if exact is not None and passage is not None:
                exact.advance_to(passage.outputs)
                switch(model.get_submodule(block.name), on=True)
            if walk is not None:
                walk.advance(block)

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.quantize_input = True
        elif isinstance(module, KeyValueQuantizer):
            module.quantize = True
    switch(model, on=True)
    _cast(model, dtype)
    made_by = {
        "method": name,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        # ||W - decoded W|| / ||W|| over all rounded weights, as they were after the rewrites.
        "weight_error": float((squared[0] / squared[1].clamp(min=1e-300)).sqrt()),
        "kept": sorted(
            {
                *anatomy.kept(),
                *(
                    path
                    for block, site in anatomy.sites()
                    if settings.skips(block, site, statistics)
                    for path in site.modules
                ),
            }
        ),
        **settings.accounts(checkpoint),
    }
    mark(model, made_by)
    checkpoint.path = None
    return checkpoint


def check_kind(settings: Quantizer, checkpoint: Checkpoint) -> None:
    """Refuse a method that cannot do this kind of model.

    Raises:
        SettingsError: names methods that can.
    """
    # Of an audio language model it is the language model that is quantized.
    kind = "language" if checkpoint.reads_tokens else checkpoint.kind
    if kind in settings.kinds:
        return
    able = [
        i.name for i in registry.available("quantize") if kind in getattr(i.settings, "kinds", ())
    ]
    raise SettingsError(
        f"{registry.info_of(settings).name} quantizes {' and '.join(settings.kinds)} models, and this is a {kind} "
        f"model ({checkpoint.anatomy.family}). Methods for those: {', '.join(able)}."
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters only: the frequencies of a rotary embedding and key rotations are buffers, and stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _is_rounded(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) and module.weight_scheme is not None


def _attach_key_values(model: nn.Module, blocks: tuple[Block, ...], settings: Quantizer) -> None:
    """Give every attention module its schemes, keeping a rotation that a rewrite put there."""
    for block in blocks:
        if not isinstance(block, LanguageBlock):
            continue  # there is no cache
        schemes = settings.key_value_schemes(block)
        existing = getattr(model.get_submodule(block.attention), "key_values", None)
        rotation = existing.rotation if isinstance(existing, KeyValueQuantizer) else None
        if schemes == (None, None) and rotation is None:
            continue
        quantizer = KeyValueQuantizer(*schemes, rotation)
        quantizer.quantize = False
        attach(model, block.attention, quantizer)
        if rotation is not None:
            use_rotating_attention(model)


def _layer(
    model: nn.Module, path: str, settings: Quantizer, site: Site, rounded: Rounded | None
) -> QuantizedLinear | None:
    """The layer that takes a linear's place, or None where nothing about it changes."""
    old = model.get_submodule(path)
    weight, input = settings.weight_scheme(site), settings.input_scheme(site)
    transform = old.transform if isinstance(old, QuantizedLinear) else None
    if weight is None and input is None:
        return None
    branch = None
    if rounded is not None:
        device = rounded.main.codes.device
        if rounded.smoothing is not None:
            transform = InputScale(site.width, device)
            transform.factor.copy_(1 / rounded.smoothing.double())
        if rounded.up is not None and rounded.down is not None:
            branch = _branch(settings.branch_format, rounded.up, rounded.down, device)
    layer = QuantizedLinear.like(
        old, weight=weight, input=input, transform=transform, branch=branch
    )
    if rounded is not None:
        layer.store(rounded.main)
    else:
        layer.weight.data.copy_(LinearRef(path, site.readers[0].role).weight(model))
    for part in layer.modules():
        if isinstance(part, QuantizedLinear):
            part.quantize_input = False
    return layer


def _branch(
    format: BranchFormat | None,
    up: Encoded | Tensor,
    down: Encoded | Tensor,
    device: torch.device,
) -> LowRankBranch:
    if format is None:
        raise ValueError("a weight was given a branch by a method that names no format for it")
    a, b = (part if isinstance(part, Tensor) else part.codes for part in (up, down))
    branch = LowRankBranch(b.shape[1], a.shape[0], b.shape[0], format, device)
    branch.store(up, down)
    return branch


def _round_block(
    model: nn.Module,
    block: Block,
    settings: Quantizer,
    statistics: Mapping[str, Tensor],
    walk: BlockWalk | None,
    passage: Passage | None,
    seed: int,
) -> dict[str, Tensor]:
    """What is stored for a block's linears, by ``path.name``.

    With a walk, sites are done in the order of the forward pass, each seeing the ones before it quantized; with a
    passage, all are done together.
    """
    done: dict[str, Tensor] = {}
    together: Mapping[str, Rounded] = {}
    if passage is not None:
        chance = generator(seed, f"reconstruction of block {block.index}")
        together = settings.round_block(model, block, passage, chance)
    squared = torch.zeros(2, dtype=torch.float64)
    for site in block.sites:
        scheme = settings.weight_scheme(site)
        if scheme is None or settings.skips(block, site, statistics):
            continue
        role = site.readers[0].role
        weights = [LinearRef(path, role).weight(model) for path in site.modules]
        if together:
            made = [together[path] for path in site.modules]
        else:
            seen = None if walk is None else _observed(model, block, site, walk, settings)
            made = settings.round_site(site, weights, seen, scheme)
        for path, weight, rounded in zip(site.modules, weights, made, strict=True):
            done |= {f"{path}.{name}": part for name, part in rounded.parts().items()}
            squared += _squared_error(rounded, weight)
            _install(model, path, settings, site, rounded)
    if done:
        done[_SQUARED] = squared
    return done


def _squared_error(rounded: Rounded, weight: Tensor) -> Tensor:
    """``[||W - decoded W||^2, ||W||^2]``, fp64 on the CPU."""
    exact = weight.double()
    difference = rounded.decode().double() - exact
    return torch.stack([difference.square().sum(), exact.square().sum()]).cpu()


def _observed(
    model: nn.Module, block: Block, site: Site, walk: BlockWalk, settings: Quantizer
) -> Seen:
    """What the method gathers of what the site's readers multiply: the input after its online transform."""
    seen = settings.observes(site)
    reader = model.get_submodule(site.modules[0])
    transform = reader.transform if isinstance(reader, QuantizedLinear) else None
    observers = {site.name: lambda x: seen.update(x if transform is None else transform(x))}
    # Q, K and V are rounded by the time their mixture is looked at, so attention need not run again.
    walk.observe(block, observers, freeze_attention=site.name == "o_in")
    return seen


def _install(
    model: nn.Module, path: str, settings: Quantizer, site: Site, rounded: Rounded | None
) -> None:
    layer = _layer(model, path, settings, site, rounded)
    if layer is not None:
        replace_module(model, path, layer)


def _install_block(
    model: nn.Module,
    block: Block,
    settings: Quantizer,
    statistics: Mapping[str, Tensor],
    done: Mapping[str, Tensor],
) -> None:
    """Put the layers of a finished block in place, from its stored unit."""
    for site in block.sites:
        if settings.skips(block, site, statistics):
            continue
        scheme = settings.weight_scheme(site)
        for path in site.modules:
            existing = model.get_submodule(path)
            if _is_rounded(existing):
                continue  # rounded in this process
            rounded = None
            if scheme is not None:
                device, inside = device_of(existing), f"{path}."
                parts = {
                    name.removeprefix(inside): part.to(device)
                    for name, part in done.items()
                    if name.startswith(inside)
                }
                rounded = Rounded.from_parts(parts, scheme, settings.branch_format)
            _install(model, path, settings, site, rounded)
