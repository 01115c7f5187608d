"""The tokens of a micro-batch as targets, and what is summed over those of an optimiser step."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["FIELDS", "StepStatistics", "TargetTokens"]


@dataclasses.dataclass(frozen=True)
class TargetTokens:
    """The tokens of a micro-batch, flat, as targets.

    Attributes:
        targets: ``[T]`` the token that follows; anything where ``mask`` is false.
        mask: ``[T]`` bool, true on response tokens.
        sequence: ``[T]`` a number per sequence; only changes from token to token matter.
    """

    targets: Tensor
    mask: Tensor
    sequence: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, position_ids: Tensor | None = None) -> TargetTokens:
        """From ``labels [rows, length]`` as transformers has them: not shifted, -100 on what is not trained.

        Args:
            labels: the tokens of the rows.
            position_ids: ``[rows, length]`` of packed rows. A position 0 after another token starts a document: its
                token is no target of the document before, and weights do not reach across.
        """
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        mask = targets != -100
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(targets)
        sequence = rows
        if position_ids is not None:
            starts = position_ids.expand_as(labels) == 0
            sequence = rows * labels.shape[1] + starts.cumsum(1)
            mask = mask & ~starts.roll(-1, 1)
        return cls(targets.reshape(-1), mask.reshape(-1), sequence.reshape(-1))

    @staticmethod
    def align(states: Tensor) -> Tensor:
        """``[rows, length, ...]`` with an entry per position of the input as ``[T, ...]``: each predicts the next."""
        return states.flatten(0, 1)


FIELDS = (
    "tokens",
    "denominator",
    "weighted_loss",
    "divergence",
    "weight_sum",
    "weight_squares",
    "kept",
    "eos_weight",
    "loss_sum",
    "signal_loss",
)


@dataclasses.dataclass(frozen=True)
class StepStatistics:
    """Sums over tokens of a micro-batch; add them over micro-batches and ranks before reading anything.

    Attributes:
        values: the sums, one vector for one ``all_reduce``. In order: tokens, denominator, weighted loss, divergence
            (times its factor), sum of weights, of their squares, tokens of non-zero weight, weight on end-of-sequence
            tokens, plain loss, plain loss under the signal.
    """

    values: Tensor

    def __add__(self, other: StepStatistics) -> StepStatistics:
        return StepStatistics(self.values + other.values)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[FIELDS.index(name)]

    @property
    def loss(self) -> Tensor:
        """The loss of the step."""
        return (
            self._per(self["weighted_loss"], "denominator") + self._per(self["divergence"], "tokens")
        )  # fmt: skip

    @property
    def mean_loss(self) -> Tensor:
        """Mean of ``-log p``, unweighted."""
        return self._per(self["loss_sum"], "tokens")

    @property
    def mean_signal_loss(self) -> Tensor:
        """Mean of ``-log`` of the signal's probability, unweighted."""
        return self._per(self["signal_loss"], "tokens")

    @property
    def gradient_scale(self) -> Tensor:
        """What turns gradients divided by the tokens of the step into those of the rule's denominator."""
        return self._per(self["tokens"], "denominator")

    @property
    def empty(self) -> bool:
        """Whether the step has nothing to learn from: all weights are zero, and no divergence is asked for."""
        return not (bool(self["weight_sum"] > 0) or bool(self["divergence"] > 0))

    def to_dict(self) -> dict[str, float]:
        """What is logged: loss, mean_loss, mean_weight, kept_share, effective_tokens, eos_share, tokens."""
        logged = {
            "loss": self.loss,
            "mean_loss": self.mean_loss,
            "mean_weight": self._per(self["weight_sum"], "tokens"),
            "kept_share": self._per(self["kept"], "tokens"),
            "effective_tokens": self._per(self["weight_sum"].square(), "weight_squares"),
            "eos_share": self._per(self["eos_weight"], "weight_sum"),
            "tokens": self["tokens"],
        }
        return dict(zip(logged, torch.stack(list(logged.values())).tolist(), strict=True))

    def _per(self, value: Tensor, name: str) -> Tensor:
        divisor = self[name]
        return torch.where(divisor > 0, value / divisor, 0)
