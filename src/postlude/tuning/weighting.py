"""One loss for every rule that weights the tokens of a demonstration.

    L = 1/N sum_t mask_t sg[w_t] (-log p_t(y_t))  +  lambda/n sum_t mask_t KL(q_t || p_t)

A *rule* (a :class:`TokenRule`, one short file per family) gives the weight. A *signal* says whose probabilities the
rule reads: those of the model in training (``online``), of a frozen reference run beside it (``reference``), or of
that reference as stored columns (``cached``). The *denominator* ``N`` is counted over the whole optimiser step: all
micro-batches, all ranks.

How to train with it, in a plain loop of one micro-batch per step::

    weighting = TokenWeighting(PriFTMass(), signal="cached")
    tokens = TargetTokens.from_labels(labels, position_ids=position_ids)
    hidden = model.model(input_ids, ...).last_hidden_state          # final norm applied, no logits
    result = weighting(tokens.align(hidden), model.lm_head.weight, tokens, reference=columns)
    result.loss.backward()

and with accumulation or several ranks:

1. ``num_items`` = response tokens of the step, over all its micro-batches and ranks; pass it with every micro-batch.
   (Where ranks *average* gradients, as DDP does, multiply the loss by the number of ranks.)
2. Add up ``result.statistics`` with ``+``; over ranks, ``all_reduce(statistics.values)``.
3. Where ``weighting.rescales``, multiply all gradients by ``statistics.gradient_scale`` before clipping: the
   denominator (kept tokens, or the sum of weights) is not known until the last micro-batch has been seen, and
   gradients are linear in it. The scale is 0 where nothing was kept; ``statistics.empty`` says so.
4. Pass the sum as ``previous`` to the next step, for rules that read the mean loss (TALR).

The order of the options is our choice: rule, then ``floor`` and ``ceil``, then ``always_keep_ids`` (those tokens weigh
exactly 1, as in plain SFT), then ``normalize``.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from postlude import registry
from postlude.errors import DataError, SettingsError, UnknownNameError
from postlude.numerics.weighted_likelihood import (
    Head,
    TokenColumns,
    token_columns,
    weighted_cross_entropy,
)
from postlude.tuning.target_tokens import FIELDS, StepStatistics, TargetTokens

__all__ = [
    "SIGNALS",
    "RuleInputs",
    "StepStatistics",
    "TargetTokens",
    "TokenRule",
    "TokenWeighting",
    "WeightedLoss",
]

SIGNALS = ("online", "reference", "cached")
NORMALIZATIONS = ("none", "kept", "mean1")


class RuleInputs(NamedTuple):
    """What a rule reads, of ``T`` response tokens in order; all of it detached.

    Attributes:
        signal: columns of the distribution that the signal selects.
        online: ``log p_t(y_t) [T]``.
        reference: ``log q_t(y_t) [T]``, for rules that compare the two.
        sequence: number of each token's sequence ``[T]``, non-decreasing from 0, for rules that read whole sequences.
        mean_loss: mean of ``-signal.log_probability`` over the optimiser step before, ``[]``; None in the first step.
    """

    signal: TokenColumns
    online: Tensor
    reference: Tensor | None = None
    sequence: Tensor | None = None
    mean_loss: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class TokenRule(abc.ABC):
    """Base of the settings of every rule.

    Attributes:
        columns: what it reads of the signal, out of ``numerics.weighted_likelihood.COLUMNS``; empty: nothing.
        signal: the paper's signal.
        compares: whether it compares the model in training with the reference, token by token.
        sequential: whether the weight of a token depends on others of its sequence.
        denominator: ``tokens``, or ``kept`` for those of non-zero weight only.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    signal: ClassVar[str] = "online"
    compares: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    denominator: ClassVar[Literal["tokens", "kept"]] = "tokens"

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns read under these settings, where not all of ``columns``."""
        return self.columns

    @property
    def top(self) -> int:
        """Words of ``top_entropy``."""
        return 20

    @property
    def divergence(self) -> float:
        """Factor of ``KL(q || p)`` over the whole vocabulary; 0 leaves it out."""
        return 0.0

    @property
    def name(self) -> str:
        """Its registered name."""
        return registry.info_of(self).name

    @abc.abstractmethod
    def weights(self, inputs: RuleInputs) -> Tensor:
        """Weights ``[T]``, at least 0."""


class WeightedLoss(NamedTuple):
    """Result of :class:`TokenWeighting`.

    Attributes:
        loss: ``[]``, to call ``backward`` on: the sum over this micro-batch divided by the ``num_items`` of the step.
        statistics: sums for the log and for the denominator.
        log_probability: ``log p_t(y_t)`` of the response tokens, in order, detached.
        weights: their weights, detached.
    """

    loss: Tensor
    statistics: StepStatistics
    log_probability: Tensor
    weights: Tensor


@dataclasses.dataclass(frozen=True)
class TokenWeighting:
    """A rule, where it reads from, and what bounds it.

    Attributes:
        rule: gives the weight.
        signal: ``online``, ``reference`` or ``cached``; None is the paper's. For a rule that compares the model with
            the reference: where the reference comes from.
        floor: lower bound of every weight.
        ceil: upper bound of every weight.
        normalize: ``none`` divides by the rule's denominator, ``kept`` by the tokens of non-zero weight, ``mean1`` by
            the sum of weights, which makes the mean weight 1. All over the whole step.
        always_keep_ids: tokens that weigh exactly 1 whatever the rule says: end of sequence, added tokens.
        eos_ids: tokens whose share of the weight is logged.
    """

    rule: TokenRule
    signal: str | None = None
    floor: float = 0.0
    ceil: float = math.inf
    normalize: str = "none"
    always_keep_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rule = self.rule
        if not isinstance(rule, TokenRule):
            raise SettingsError(f"{rule!r} is not a token rule; `postlude methods` lists them.")
        if self.signal is None:
            object.__setattr__(self, "signal", "reference" if rule.compares else rule.signal)
        if self.signal not in SIGNALS:
            raise UnknownNameError("signal", str(self.signal), SIGNALS)
        if self.normalize not in NORMALIZATIONS:
            raise UnknownNameError("normalization", self.normalize, NORMALIZATIONS)
        if rule.compares and self.signal == "online":
            raise SettingsError(
                f"{rule.name} compares the model in training with a reference; the signal is 'reference' (run beside "
                "it) or 'cached', not 'online'."
            )
        if not (rule.reads or rule.compares) and self.signal != "online":
            raise SettingsError(
                f"{rule.name} reads no probability, so it has no signal; leave out signal={self.signal!r}."
            )
        if rule.divergence and self.signal == "cached":
            raise SettingsError(
                f"{rule.name} needs the reference's whole distribution, which stored columns do not hold; use "
                "signal='online' or 'reference' and give the reference itself."
            )
        if rule.divergence and self.normalize != "none":
            raise SettingsError(
                f"{rule.name} adds a divergence per token, so its weighted part is divided by tokens as well; "
                f"normalize={self.normalize!r} would change its factor from step to step. Use 'none'."
            )
        if not (0 <= self.floor < math.inf and self.floor <= self.ceil and self.ceil > 0):
            raise SettingsError(
                f"floor is {self.floor} and ceil {self.ceil}; expected 0 <= floor <= ceil, floor finite, ceil above 0."
            )

    @property
    def denominator(self) -> str:
        """What the loss of a step is divided by: ``tokens``, ``kept`` or ``weights``."""
        return {"none": self.rule.denominator, "kept": "kept", "mean1": "weights"}[self.normalize]

    @property
    def rescales(self) -> bool:
        """Whether gradients are to be multiplied by ``StepStatistics.gradient_scale`` at the end of a step."""
        return self.denominator != "tokens"

    @property
    def needs_reference(self) -> bool:
        """Whether a reference is read at all, be it run or cached."""
        return self.signal != "online" or self.rule.divergence > 0

    @property
    def needs_reference_model(self) -> bool:
        """Whether the reference has to be run on every micro-batch: then pass its ``Head``."""
        return self.signal == "reference" or self.rule.divergence > 0

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Columns that are read of the reference; a cache has to hold them."""
        if self.signal == "online":
            return ()
        return tuple(dict.fromkeys(("log_probability", *self.rule.reads)))

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: TargetTokens,
        *,
        bias: Tensor | None = None,
        reference: Head | TokenColumns | None = None,
        num_items: int | Tensor | None = None,
        previous: StepStatistics | None = None,
        precision: torch.dtype | None = None,
    ) -> WeightedLoss:
        """The loss of a micro-batch. Only response tokens reach the head.

        Args:
            hidden: ``[T, D]`` states that the head reads, final norm applied; row ``t`` predicts ``tokens.targets[t]``.
            weight: ``[V, D]`` of the head.
            tokens: targets, mask and sequences of the same ``T``.
            bias: ``[V]`` of the head.
            reference: of the same ``T`` tokens, the reference's :class:`Head` (signal ``reference``, or a divergence)
                or its :class:`TokenColumns` (signal ``cached``).
            num_items: response tokens of the optimiser step; None: of this micro-batch.
            previous: statistics of the step before, summed.
            precision: dtype of the products, by default that of the model. Under autocast, pass its dtype.

        Raises:
            DataError: a missing or unfitting reference, or shapes that do not fit.
        """
        self._check(hidden, weight, tokens, reference)
        rows = tokens.mask.nonzero()[:, 0]
        everything = len(rows) == len(hidden)
        targets = tokens.targets[rows]
        # index_select: its gradient is cheaper than that of an index.
        states = hidden if everything else hidden.index_select(0, rows)
        prior = None
        if isinstance(reference, Head):
            picked = reference.hidden.detach()
            prior = reference._replace(hidden=picked if everything else picked[rows])
        stored = reference[rows] if isinstance(reference, TokenColumns) else None
        if stored is None and prior is not None and self.signal == "reference":
            stored = token_columns(
                *prior[:2], targets, prior.bias, self.reference_columns, self.rule.top, precision
            )
        sequence = _numbered(tokens.sequence[rows]) if self.rule.sequential else None
        mean_loss = None if previous is None else previous.mean_signal_loss

        def weigh(online: TokenColumns, part: slice) -> Tensor:
            frozen = None if stored is None else stored[part]
            inputs = RuleInputs(
                signal=online if frozen is None else frozen,
                online=online.log_probability,
                reference=None if frozen is None else frozen.log_probability,
                sequence=None if sequence is None else sequence[part],
                mean_loss=mean_loss,
            )
            return self._bounded(self.rule.weights(inputs), targets[part])

        columns = self.rule.reads if self.signal == "online" else ()
        top = self.rule.top
        by: Tensor | None = None
        if self.rule.sequential:
            seen = token_columns(states, weight, targets, bias, columns, top, precision)
            by, columns = weigh(seen, slice(0, len(targets))), ()
        result = weighted_cross_entropy(
            states, weight, targets, weigh if by is None else by, bias,
            columns=columns, top=top, prior=prior, strength=self.rule.divergence, precision=precision,
        )  # fmt: skip
        divisor = len(targets) if num_items is None else num_items
        loss = result.total / (divisor if isinstance(divisor, Tensor) else max(divisor, 1))
        signal = result.log_probability if stored is None else stored.log_probability
        statistics = self._statistics(
            result.log_probability, result.weights, result.divergence, signal, targets
        )
        return WeightedLoss(loss, statistics, result.log_probability, result.weights)

    def _bounded(self, weights: Tensor, targets: Tensor) -> Tensor:
        if self.floor > 0 or self.ceil < math.inf:
            weights = weights.clamp(self.floor, self.ceil)
        if self.always_keep_ids:
            weights = torch.where(_among(targets, self.always_keep_ids), 1, weights)
        return weights

    def _statistics(
        self,
        log_probability: Tensor,
        weights: Tensor,
        divergence: Tensor,
        signal: Tensor,
        targets: Tensor,
    ) -> StepStatistics:
        tokens = weights.new_tensor(float(len(weights)))
        total = weights.sum()
        kept = (weights != 0).sum().to(weights.dtype)
        sums = {
            "tokens": tokens,
            "denominator": {"tokens": tokens, "kept": kept, "weights": total}[self.denominator],
            "weighted_loss": -(weights * log_probability).sum(),
            "divergence": self.rule.divergence * divergence.sum(),
            "weight_sum": total,
            "weight_squares": weights.square().sum(),
            "kept": kept,
            "eos_weight": (weights * _among(targets, self.eos_ids)).sum(),
            "loss_sum": -log_probability.sum(),
            "signal_loss": -signal.sum().to(weights),
        }
        return StepStatistics(torch.stack([sums[name] for name in FIELDS]))

    def _check(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: TargetTokens,
        reference: Head | TokenColumns | None,
    ) -> None:
        shape = hidden.shape[:1]
        for name in ("targets", "mask", "sequence"):
            found = getattr(tokens, name).shape
            if found != shape:
                raise DataError(
                    f"{name} has shape {tuple(found)} beside hidden states of shape {tuple(hidden.shape)}; expected "
                    "flat tokens: use TargetTokens.from_labels and TargetTokens.align."
                )
        if self.needs_reference_model:
            if not isinstance(reference, Head):
                raise DataError(
                    f"{self.rule.name} with signal {self.signal!r} needs the reference's hidden states and head "
                    f"on every micro-batch (a Head); got {type(reference).__name__}."
                )
            if len(reference.weight) != len(weight):
                raise DataError(
                    f"The reference has a vocabulary of {len(reference.weight)} words and the model one of "
                    f"{len(weight)}; they must be the same. Use the checkpoint that tuning starts from as the "
                    "reference."
                )
            length = len(reference.hidden)
        elif self.needs_reference:
            if not isinstance(reference, TokenColumns):
                raise DataError(
                    f"{self.rule.name} with signal 'cached' needs the reference's columns (TokenColumns); got "
                    f"{type(reference).__name__}."
                )
            for name in self.reference_columns:
                if getattr(reference, name) is None:
                    raise DataError(
                        f"The stored columns of the reference have no {name!r}, which {self.rule.name} reads; compute "
                        "them again with `postlude tune prior`."
                    )
            if "top_entropy" in self.rule.reads and reference.top != self.rule.top:
                raise DataError(
                    f"The stored top_entropy is of {reference.top} words and {self.rule.name} asks for {self.rule.top}."
                )
            length = len(reference.log_probability)
        else:
            return
        if length != len(hidden):
            raise DataError(
                f"The reference covers {length} tokens and the model {len(hidden)}; both must see the same tokens, "
                "truncated and packed alike."
            )


def _numbered(sequence: Tensor) -> Tensor:
    """Runs of equal numbers as 0, 1, 2, ..."""
    changed = torch.zeros_like(sequence)
    changed[1:] = sequence[1:] != sequence[:-1]
    return changed.cumsum(0)


def _among(targets: Tensor, ids: tuple[int, ...]) -> Tensor:
    return torch.isin(targets, torch.tensor(ids, dtype=targets.dtype, device=targets.device))
