"""SVDQuant: outliers move from activations into weights, and from weights into a 16-bit low-rank branch.

    d = max|x|^p / max|W|^q                     W <- W diag(d),  x <- x / d
    L_1 = SVD_r(W)                              q_1 = Q(W - L_1)
    L_t = SVD_r(W - q_{t-1})                    q_t = Q(W - L_t)
    y = q Q_x(x) + A (B x),   A B = L

Maxima are per input channel, of the calibration inputs and of all weights that read the site. Smoothing: 39 pairs
``(0, 0)``, ``(p, 0)``, ``(p, 1 - p)`` with ``p = 1/20 ... 19/20``, the one of least output error with rounded inputs
and the branch in place. Then at most ``iterations`` rounds, until that error rises for the first time; the best is
kept. Linears that read the same site (Q, K, V) share the smoothing and, by one SVD of their stacked weights, the
factor ``B``. GPTQ (``rounding=gptq``) may round what the branch leaves.

Paper: "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models" (arXiv:2411.05007). Different
here: the error is that of the linears, also for Q and K, where the published code takes the whole attention module; it
is measured on 512 random tokens; inputs are those behind the layers already rounded; factors are split evenly, and a
shared ``B`` is stored with every linear (and counted), since layers stand alone here. ``d`` is scaled to a geometric
mean of one, and stays in the layer: ``1/d`` is a multiplication at run time, not folded into norms.

Cost: a forward pass of the calibration data (about two and a half, see gptq) and, per site, 39 randomised SVDs and up
to ``iterations`` exact ones. Bytes: ``16 * rank * (in + out)`` bits a layer, and 4 bytes an input channel for ``d``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from postlude.errors import SettingsError
from postlude.numerics.low_rank import (
    Corrected,
    alternating,
)
from postlude.numerics.schemes import Encoded, Scheme
from postlude.quantization.correction import Correction, rounded
from postlude.quantization.engine import Rounded, Seen
from postlude.quantization.smoothing import Inputs, output_error, smoothing
from postlude.registry import method
from postlude.surgery.anatomy import Site

__all__ = ["SVDQuant"]


@method(
    "quantize",
    "svdquant",
    family="low-rank correction",
    paper="arXiv:2411.05007",
    needs=("calibration",),
)
@dataclasses.dataclass(frozen=True)
class SVDQuant(Correction):
    """Smooth, keep the largest components of the weight in 16 bits, and round the rest.

    Attributes:
        iterations: rounds of branch and codes at most; they stop when the error rises.
        grid: steps of the exponents of smoothing that are tried.
        share: one factor ``B`` for all linears that read the same site.
    """

    group: str | int = 64
    activation_group: str | int = 64
    iterations: int = 100
    grid: int = 20
    share: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("iterations", 1), ("grid", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise SettingsError(f"{name} is {value!r}; expected {least} or more")

    @property
    def reads_inputs(self) -> bool:
        return True

    def observes(self, site: Site) -> Seen:
        return Inputs(site.width, self.rounding == "gptq")

    def round_site(
        self, site: Site, weights: Sequence[Tensor], seen: Seen | None, scheme: Scheme
    ) -> list[Rounded]:
        if not isinstance(seen, Inputs):
            raise ValueError("svdquant needs inputs")
        # One scale for a whole tensor is each linear's own, so such weights are not stacked.
        shared = self.share and scheme.granularity.kind != "tensor"
        stacks = [torch.cat(list(weights))] if shared else list(weights)
        ranks = self._ranks(weights, shared)
        inputs = self.input_scheme(site)
        nearest = dataclasses.replace(self, rounding="nearest").rounder(scheme, None)

        best = smoothing(seen, stacks, ranks, inputs, self.branch_format, nearest, self.grid)
        x = seen.sample.rows().float()
        moment = seen.smoothed_moment(best)
        rounding = self.rounder(scheme, moment)
        made: list[Rounded] = []
        for stack, rank in zip(stacks, ranks, strict=True):
            smooth = stack * best.to(stack)
            fit = alternating(
                smooth,
                rank,
                self.branch_format,
                nearest,
                iterations=self.iterations,
                score=output_error(x, stack, best, inputs, self.branch_format),
            )
            if moment is not None:
                fit = dataclasses.replace(fit, main=rounding(smooth - fit.branch().to(smooth)))
            made += [rounded(part, best) for part in _split(fit, weights if shared else [stack])]
        return made

    def _ranks(self, weights: Sequence[Tensor], shared: bool) -> list[int]:
        """Of every stack. Those that share a factor have one rank: the largest, or one that all have room for."""
        ranks = [self.rank_of(*weight.shape) for weight in weights]
        if not shared:
            return ranks
        return [max(ranks) if self.bytes_as is None else min(ranks)]


def _split(fit: Corrected, weights: Sequence[Tensor]) -> Iterator[Corrected]:
    """The rows that belong to each of the weights; all of them read the same lower factor."""
    sizes = [len(weight) for weight in weights]
    for main, up in zip(_rows(fit.main, sizes), _rows(fit.up, sizes), strict=True):
        if isinstance(main, Tensor):
            raise TypeError("the main weight is made of codes")
        yield Corrected(main, up, fit.down, fit.steps)


def _rows(factor: Encoded | Tensor, sizes: list[int]) -> list[Encoded | Tensor]:
    if isinstance(factor, Tensor):
        return [part.clone() for part in factor.split(sizes)]
    if len(sizes) == 1:
        return [factor]
    zero = factor.zero_point
    zeros = [None] * len(sizes) if zero is None else zero.split(sizes)
    return [
        Encoded(codes.clone(), scale.clone(), None if z is None else z.clone(), factor.scheme)
        for codes, scale, z in zip(
            factor.codes.split(sizes), factor.scale.split(sizes), zeros, strict=True
        )
    ]
