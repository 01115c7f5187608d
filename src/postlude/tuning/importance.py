"""Weights that compare the model in training with another policy, token by token.

With ``r_t = p_t(y_t) / q_t(y_t)``, ``T`` response tokens and everything detached:

    iw-sft        w   = min(exp(s mean_t log r_t), 16)                  one per sequence       (arXiv:2507.12856)
    iw-sft-token  w_t = clip(r_t, 0.2, 1.8)                                                    (arXiv:2507.12856)
    psft          w_t = r_t 1[r_t <= 1 + e]                             gradient of -min(r, clip(r))  (arXiv:2508.17784)

    pear          d_t = clip(log r_t, -0.08, 0.3)                                              (arXiv:2602.01058)
      sequence    log G   = sum_t d_t
      token       log G_t = (T - t) log gamma + sum_{j > t} d_j
      block       log G_t = (T - e) log gamma + sum of d over later blocks,   e = last token of the block of t
                  w_t = exp(clip(log G_t, -10, 5))

``q`` is what the paper makes it: for iw-sft the model before tuning; for psft the policy a few steps ago; for pear the
policy that generated the data. The reference given takes its place. With the checkpoint that tuning starts from, psft
becomes a trust region around that checkpoint: tokens that are already ``1 + e`` times as likely are not pushed further.

Our choices: iw-sft's ``s`` is 1, as the authors' trainer has it (their function's default is 2). psft clips at 1.28;
with every advantage 1 its lower bound never acts. PEAR has no public code: formulas follow a re-implementation's
account of the paper; a third-party code clips ``G`` to [0.1, 10] instead. All are divided by the response tokens.

Cost: rules of whole sequences form the logits once more, since every token of a sequence comes before the weight of the
first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.registry import method
from postlude.tuning.weighting import RuleInputs, TokenRule

__all__ = ["IWSFT", "PSFT", "IWSFTToken", "PEARBlock", "PEARSequence", "PEARToken"]

FAMILY = "token weights"
NEEDS = ("reference",)


@dataclasses.dataclass(frozen=True)
class _Comparison(TokenRule):
    compares: ClassVar[bool] = True

    def log_ratio(self, inputs: RuleInputs) -> Tensor:
        """``log p_t(y_t) - log q_t(y_t)``."""
        if inputs.reference is None:
            raise DataError(f"{self.name} compares the model with a reference; none was given.")
        return inputs.online - inputs.reference


@method("tune", "iw-sft", family=FAMILY, paper="arXiv:2507.12856", needs=NEEDS)
@dataclasses.dataclass(frozen=True)
class IWSFT(_Comparison):
    """Importance of each sequence: how much likelier it has become per token.

    Attributes:
        scale: ``s``, factor of the mean log ratio.
        ceiling: greatest weight.
    """

    sequential: ClassVar[bool] = True

    scale: float = 1.0
    ceiling: float = 16.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise SettingsError(f"scale is {self.scale}; expected a positive factor.")
        if not 0 < self.ceiling < math.inf:
            raise SettingsError(f"ceiling is {self.ceiling}; expected a positive weight.")

    def weights(self, inputs: RuleInputs) -> Tensor:
        """One weight per sequence, at each of its tokens."""
        ratio = self.log_ratio(inputs)
        runs = _Runs(inputs.sequence)
        mean = runs.total(ratio) / runs.lengths
        return (self.scale * mean).exp().clamp(max=self.ceiling).to(ratio)[runs.number]


@method("tune", "iw-sft-token", family=FAMILY, paper="arXiv:2507.12856", needs=NEEDS)
@dataclasses.dataclass(frozen=True)
class IWSFTToken(_Comparison):
    """Importance of each token: its clipped ratio.

    Attributes:
        low: least weight.
        high: greatest weight.
    """

    low: float = 0.2
    high: float = 1.8

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < math.inf or self.high == 0:
            raise SettingsError(
                f"low is {self.low} and high {self.high}; expected 0 <= low <= high, high above 0."
            )

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``clip(r_t, low, high)``."""
        return self.log_ratio(inputs).exp().clamp(self.low, self.high)


@method("tune", "psft", family=FAMILY, paper="arXiv:2508.17784", needs=NEEDS)
@dataclasses.dataclass(frozen=True)
class PSFT(_Comparison):
    """Proximal SFT: the clipped policy objective with every advantage 1.

    Attributes:
        clip: ``e``: tokens that are more than ``1 + e`` times as likely as under the reference have no gradient.
    """

    clip: float = 0.28

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise SettingsError(f"clip is {self.clip}; expected a positive number such as 0.28.")

    def weights(self, inputs: RuleInputs) -> Tensor:
        """``r_t 1[r_t <= 1 + e]``."""
        ratio = self.log_ratio(inputs).exp()
        return torch.where(ratio <= 1 + self.clip, ratio, 0)


@dataclasses.dataclass(frozen=True)
class _PEAR(_Comparison):
    sequential: ClassVar[bool] = True

    low: float = -0.08
    high: float = 0.3

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= 0 <= self.high < math.inf:
            raise SettingsError(
                f"low is {self.low} and high {self.high}; expected bounds of a log ratio around 0."
            )

    def clipped(self, inputs: RuleInputs) -> Tensor:
        """``d_t``, in fp64: sums run over whole sequences."""
        return self.log_ratio(inputs).clamp(self.low, self.high).double()


@method("tune", "pear-sequence", family=FAMILY, paper="arXiv:2602.01058", needs=NEEDS)
@dataclasses.dataclass(frozen=True)
class PEARSequence(_PEAR):
    """Importance of each sequence: the product of its clipped ratios.

    Attributes:
        low: least log ratio of a token.
        high: greatest log ratio of a token.
    """

    def weights(self, inputs: RuleInputs) -> Tensor:
        """One weight per sequence, at each of its tokens."""
        runs = _Runs(inputs.sequence)
        return _exp(runs.total(self.clipped(inputs)))[runs.number].to(inputs.online)


@dataclasses.dataclass(frozen=True)
class _PEARSuffix(_PEAR):
    gamma: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise SettingsError(f"gamma is {self.gamma}; expected a discount above 0, at most 1.")

    def suffix(self, inputs: RuleInputs, block: int) -> Tensor:
        """``w_t``: what follows the block of each token."""
        runs = _Runs(inputs.sequence)
        sums = self.clipped(inputs).cumsum(0)
        last = runs.block_end(block)
        ends = runs.ends[runs.number]
        discount = (ends - last).double() * math.log(self.gamma)
        return _exp(discount + sums[ends] - sums[last]).to(inputs.online)


@method("tune", "pear-token", family=FAMILY, paper="arXiv:2602.01058", needs=NEEDS)
@dataclasses.dataclass(frozen=True)
class PEARToken(_PEARSuffix):
    """Importance of what follows each token: the discounted product of the later clipped ratios.

    Attributes:
        low: least log ratio of a token.
        high: greatest log ratio of a token.
        gamma: discount per token to the end.
    """

    def weights(self, inputs: RuleInputs) -> Tensor:
        """1 at the last token of a sequence."""
        return self.suffix(inputs, 1)


@method("tune", "pear-block", family=FAMILY, paper="arXiv:2602.01058", needs=NEEDS)
@dataclasses.dataclass(frozen=True)
class PEARBlock(_PEARSuffix):
    """Importance of what follows each block of tokens.

    Attributes:
        low: least log ratio of a token.
        high: greatest log ratio of a token.
        gamma: discount per token to the end.
        block: tokens per block, counted from the start of the response.
    """

    block: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise SettingsError(f"block is {self.block}; expected 1 token or more.")

    def weights(self, inputs: RuleInputs) -> Tensor:
        """1 in the last block of a sequence."""
        return self.suffix(inputs, self.block)


class _Runs:
    """Sequences of consecutive tokens, from ``sequence [T]`` counting from 0."""

    def __init__(self, sequence: Tensor | None) -> None:
        if sequence is None:
            raise DataError("A rule of whole sequences needs the number of each token's sequence.")
        self.number = sequence
        self.lengths = torch.bincount(sequence)
        self.ends = self.lengths.cumsum(0) - 1

    def total(self, values: Tensor) -> Tensor:
        """Sum over each sequence, fp64."""
        sums = values.new_zeros(len(self.lengths), dtype=torch.float64)
        return sums.index_add_(0, self.number, values.double())

    def block_end(self, block: int) -> Tensor:
        """Index of the last token of each token's block ``[T]``; the last block of a sequence may be short."""
        start = (self.ends - self.lengths + 1)[self.number]
        index = torch.arange(len(self.number), device=self.number.device)
        last = start + ((index - start) // block + 1) * block - 1
        return torch.minimum(last, self.ends[self.number])


def _exp(log_weight: Tensor) -> Tensor:
    return log_weight.clamp(-10, 5).exp()
