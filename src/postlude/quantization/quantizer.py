"""The base of the settings of every quantizer: what a method may say, with what most of them say."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from postlude import registry
from postlude.errors import SettingsError, UnknownNameError
from postlude.numerics.formats import Integer
from postlude.numerics.low_rank import BranchFormat
from postlude.numerics.moments import SecondMoment
from postlude.numerics.rounding import gptq, nearest
from postlude.numerics.schemes import Encoded, Granularity, Scheme
from postlude.quantization.block_reconstruction import Passage
from postlude.quantization.rounded import Rounded, Seen
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block, Kind, Site
from postlude.surgery.batches import Calibration

__all__ = ["FLOAT", "Quantizer", "generator"]

# Bits that mean "leave it in floating point".
FLOAT = 16


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one named random choice, independent of the order in which choices are made."""
    # PyTorch's CPU generator reads the low 32 bits of a seed and no others.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Base of the settings of every quantizer.

    Attributes:
        weights: bits of the weights of linears; 16 leaves them in floating point. Embeddings and head always stay.
        activations: bits of what these weights are multiplied with; 16 leaves it in floating point.
        kv: bits of the cached keys and values; 16 leaves them in floating point.
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
    def rounds_apart(self) -> bool:
        """Whether :meth:`round_site` rounds each weight as if it were alone, so that ranks may share them."""
        return type(self).round_site is Quantizer.round_site

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
