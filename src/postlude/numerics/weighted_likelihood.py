"""Cross-entropy with a weight per token, its gradient found while its logits exist.

    total = sum_t w_t * (-log p_t(y_t))  +  strength * sum_t KL(q_t || p_t)

The logits of a few hundred tokens are formed over the whole vocabulary, read for whatever the weights depend on, turned
into the gradient of the logits,

    w_t * (p_t - one_hot(y_t))  +  strength * (p_t - q_t),

and folded into the gradients of the hidden states and of the head before the next piece is formed. So every logit is
formed once, as in plain training, and no tensor holds more than a piece of them. That is possible because weights are
constants of the gradient. (Gradients in the forward pass: Liger, arXiv:2410.10989.)

Precision: products are formed in ``precision``, by default the dtype of the model, which is what ``transformers`` does;
sums over words and tokens are at least fp32. Autocast has no say. Everything is in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postlude.errors import DataError, SettingsError
from postlude.numerics.likelihood import check_head, check_targets

__all__ = [
    "COLUMNS",
    "Head",
    "TokenColumns",
    "WeightedCrossEntropy",
    "token_columns",
    "weighted_cross_entropy",
]

COLUMNS = ("log_probability", "mass_above", "mass_tied", "entropy", "top_entropy")

_ROWS = 256  # tokens per piece: enough that adding up the head's gradient costs little beside the products
_PIECE = 2**22  # a piece of a small vocabulary may have more tokens, up to this many logits


@dataclasses.dataclass(frozen=True)
class TokenColumns:
    """What one distribution says about each target, ``[T]`` each; None where it was not asked for.

    Attributes:
        log_probability: ``log p(target)``.
        mass_above: sum of the probabilities strictly above ``p(target)``; 0 where the target is a top word.
        mass_tied: sum of the probabilities of the other words whose logit equals the target's.
        entropy: ``-sum p log p``.
        top_entropy: entropy of the ``top`` most probable words, renormalised.
        top: how many words ``top_entropy`` is of.
    """

    log_probability: Tensor
    mass_above: Tensor | None = None
    mass_tied: Tensor | None = None
    entropy: Tensor | None = None
    top_entropy: Tensor | None = None
    top: int | None = None

    def __getitem__(self, tokens: slice | Tensor) -> TokenColumns:
        """The same columns of some of the tokens: a slice, or a mask or indices of any shape."""
        present = {name: getattr(self, name) for name in COLUMNS if getattr(self, name) is not None}
        return dataclasses.replace(
            self, **{name: column[tokens] for name, column in present.items()}
        )

    def column(self, name: str) -> Tensor:
        """The column ``name [T]``.

        Raises:
            DataError: it was not computed.
        """
        column: Tensor | None = getattr(self, name)
        if column is None:
            raise DataError(f"The column {name!r} was not computed.")
        return column


class Head(NamedTuple):
    """States that a language-model head reads, ``hidden [T, D]``, and the head, ``weight [V, D]``, ``bias [V]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


class WeightedCrossEntropy(NamedTuple):
    """Result of :func:`weighted_cross_entropy`; only ``total`` is differentiable.

    Attributes:
        total: ``[]``, the sum over tokens.
        log_probability: ``[T]``.
        weights: ``[T]``.
        divergence: ``KL(q || p) [T]``, zeros without a prior.
    """

    total: Tensor
    log_probability: Tensor
    weights: Tensor
    divergence: Tensor


Weigh = Callable[[TokenColumns, slice], Tensor]


def token_columns(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    columns: Collection[str] = ("log_probability",),
    top: int = 20,
    precision: torch.dtype | None = None,
) -> TokenColumns:
    """Columns of each token in one pass, not differentiable.

    Args:
        hidden: ``[T, D]`` states that the head reads.
        weight: ``[V, D]`` of the head.
        targets: ``[T]`` indices in ``0..V-1``.
        bias: ``[V]`` of the head.
        columns: names out of ``COLUMNS``; the log-probability always comes along.
        top: words of ``top_entropy``.
        precision: dtype of the products, by default that of the model.

    Raises:
        DataError: shapes that do not fit, or a target outside of the vocabulary.
        SettingsError: an unknown column, or ``top`` beyond the vocabulary.
    """
    precision = _check_all(hidden, weight, targets, bias, columns, top, precision)
    head = Head(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
    pieces = []
    with torch.no_grad():
        for tokens, logits in _pieces(head, precision):
            log_p = logits.log_softmax(1)
            read, _ = _read(logits, log_p, targets[tokens], columns, top)
            pieces.append(read)
    return _concatenate(pieces, columns, top, hidden, precision)


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weigh: Tensor | Weigh,
    bias: Tensor | None = None,
    *,
    columns: Collection[str] = (),
    top: int = 20,
    prior: Head | None = None,
    strength: float = 0.0,
    precision: torch.dtype | None = None,
) -> WeightedCrossEntropy:
    """Sum over tokens of ``w * (-log p(target)) + strength * KL(prior || p)``, weights detached.

    Differentiable once in ``hidden``, ``weight`` and ``bias``; the gradients are kept from the forward pass, so a
    second backward pass is refused. Memory beyond the inputs: those gradients (the head's in at least fp32) and a few
    pieces.

    Args:
        hidden: ``[T, D]`` states that the head reads.
        weight: ``[V, D]`` of the head.
        targets: ``[T]`` indices in ``0..V-1``.
        weigh: weights ``[T]``, or a function of the columns of some tokens and the slice that they are, giving theirs.
        bias: ``[V]`` of the head.
        columns: what ``weigh`` reads beside the log-probability, out of ``COLUMNS``.
        top: words of ``top_entropy``.
        prior: head of the frozen reference on the same tokens; its width may differ.
        strength: factor of the divergence; 0 leaves it out.
        precision: dtype of the products, by default that of the model.

    Raises:
        DataError: shapes that do not fit, or a target outside of the vocabulary.
        SettingsError: an unknown column, or a divergence without a prior.
    """
    precision = _check_all(hidden, weight, targets, bias, columns, top, precision)
    if strength and prior is None:
        raise SettingsError("A divergence from a prior needs the prior's hidden states and head.")
    if strength and prior is not None:
        check_head(prior.hidden, prior.weight, prior.bias, 1, None)
        if len(prior.weight) != len(weight) or len(prior.hidden) != len(hidden):
            raise DataError(
                f"The reference has {len(prior.hidden)} tokens over {len(prior.weight)} words, the model "
                f"{len(hidden)} over {len(weight)}; both need the same tokens and the same vocabulary."
            )
    if isinstance(weigh, Tensor) and weigh.shape != targets.shape:
        raise DataError(
            f"{tuple(weigh.shape)} weights for {len(targets)} tokens; expected one each."
        )
    plan = _Plan(
        weigh, tuple(columns), top, prior if strength else None, float(strength), precision,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return WeightedCrossEntropy(*_apply(hidden, weight, bias, targets, plan))


class _Plan(NamedTuple):
    weigh: Tensor | Weigh
    columns: tuple[str, ...]
    top: int
    prior: Head | None
    strength: float
    precision: torch.dtype
    gradients: bool


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, ...]:
        precision, wide = plan.precision, torch.promote_types(plan.precision, torch.float32)
        needs = [plan.gradients and need for need in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        grad_bias = weight.new_zeros(len(weight), dtype=wide) if needs[2] else None
        log_probability = hidden.new_empty(len(hidden), dtype=wide)
        weights, divergence = torch.empty_like(log_probability), torch.zeros_like(log_probability)
        rows = _rows(weight)
        words = weight.to(precision)
        head = Head(hidden, words, bias)
        prior_pieces = None if plan.prior is None else _prior(plan.prior, precision, rows)
        for tokens, logits in _pieces(head, precision, rows):
            target = targets[tokens]
            log_p = logits.log_softmax(1)
            read, p = _read(logits, log_p, target, plan.columns, plan.top)
            w = plan.weigh[tokens] if isinstance(plan.weigh, Tensor) else plan.weigh(read, tokens)
            w = w.to(wide)
            log_probability[tokens], weights[tokens] = read.log_probability, w
            del logits
            if prior_pieces is not None:
                log_q = next(prior_pieces)
                q = log_q.exp()
                # A word that the reference rules out adds nothing, whatever the model makes of it.
                divergence[tokens] = torch.where(q > 0, q * (log_q - log_p), 0).sum(1)
                del log_q
            if not any(needs):
                continue
            slope = log_p.exp_() if p is None else p
            slope.mul_((w + plan.strength)[:, None])
            if prior_pieces is not None:
                slope.sub_(q, alpha=plan.strength)
            slope.scatter_add_(1, target[:, None], -w[:, None])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(precision)
            if grad_hidden is not None:
                grad_hidden[tokens] = (slope @ words).to(hidden.dtype)
            if grad_weight is not None:
                seen = hidden[tokens].to(precision)
                if precision == wide:
                    grad_weight.addmm_(slope.T, seen)
                else:
                    grad_weight += slope.T @ seen
        # Rounded to the parameter's dtype once.
        ctx.grads = [
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        ]
        total = -(weights * log_probability).sum() + plan.strength * divergence.sum()
        ctx.mark_non_differentiable(log_probability, weights, divergence)
        return total, log_probability, weights, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "weighted_cross_entropy was differentiated twice; its gradients are kept for one backward pass. "
                "Compute the loss again."
            )
        grads, ctx.grads = ctx.grads, None
        return (*(None if g is None else g.mul_(grad_outputs[0]) for g in grads), None, None)


# torch leaves Function.apply untyped.
def _apply(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _WeightedCrossEntropy.apply(
            hidden, weight, bias, targets, plan
        )
    return result


def _rows(weight: Tensor) -> int:
    return max(_ROWS, _PIECE // len(weight))


def _pieces(
    head: Head, precision: torch.dtype, rows: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """``(tokens, logits [tokens, V])``, at least fp32; each a fresh tensor."""
    wide = torch.promote_types(precision, torch.float32)
    words = head.weight.to(precision)
    bias = None if head.bias is None else head.bias.to(precision)
    step = rows or _rows(words)
    for first in range(0, len(head.hidden), step):
        tokens = slice(first, min(first + step, len(head.hidden)))
        with torch.autocast(words.device.type, enabled=False):
            logits = torch.nn.functional.linear(head.hidden[tokens].to(precision), words, bias)
        yield tokens, logits.to(wide)


def _prior(prior: Head, precision: torch.dtype, rows: int) -> Iterator[Tensor]:
    """Log-probabilities of the reference, in the pieces of the model."""
    head = Head(prior.hidden.detach(), prior.weight.detach(), prior.bias)
    for _, logits in _pieces(head, precision, rows):
        yield logits.log_softmax(1)


def _read(
    logits: Tensor, log_p: Tensor, targets: Tensor, columns: Collection[str], top: int
) -> tuple[TokenColumns, Tensor | None]:
    """Columns of a piece, and its probabilities where they had to be formed."""
    log_probability = log_p.gather(1, targets[:, None])[:, 0]
    found: dict[str, Tensor] = {}
    p = None
    if {"mass_above", "mass_tied", "entropy"} & set(columns):
        p = log_p.exp()
    target_logit = logits.gather(1, targets[:, None])
    if p is not None and "mass_above" in columns:
        # Logits are compared, not probabilities: shifting and rounding would make ties of near ties. Rounding can
        # carry the sum of almost everything past one.
        found["mass_above"] = (p * (logits > target_logit)).sum(1).clamp_(max=1)
    if p is not None and "mass_tied" in columns:
        # Equal logits have equal probabilities, so counting is exact.
        found["mass_tied"] = log_probability.exp() * ((logits == target_logit).sum(1) - 1)
    if p is not None and "entropy" in columns:
        # A logit of -inf has no part in the entropy; -inf * 0 would be NaN.
        found["entropy"] = -(p * log_p.clamp(min=torch.finfo(p.dtype).min)).sum(1).clamp_(max=0)
    if "top_entropy" in columns:
        best = logits.topk(top, dim=1, sorted=False).values.log_softmax(1)
        terms = best.exp() * best.clamp(min=torch.finfo(best.dtype).min)
        found["top_entropy"] = -terms.sum(1).clamp_(max=0)
    of = top if "top_entropy" in columns else None
    return TokenColumns(log_probability, top=of, **found), p


def _concatenate(
    pieces: list[TokenColumns],
    columns: Collection[str],
    top: int,
    hidden: Tensor,
    precision: torch.dtype,
) -> TokenColumns:
    wanted = [name for name in COLUMNS if name == "log_probability" or name in columns]
    empty = hidden.new_empty(0, dtype=torch.promote_types(precision, torch.float32))
    joined = {
        name: torch.cat([getattr(piece, name) for piece in pieces]) if pieces else empty
        for name in wanted
    }
    return TokenColumns(**joined, top=top if "top_entropy" in wanted else None)


def _check_all(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    columns: Collection[str],
    top: int,
    precision: torch.dtype | None,
) -> torch.dtype:
    """The dtype of the products."""
    if precision is None:
        precision = torch.promote_types(hidden.dtype, weight.dtype)
    precision = check_head(hidden, weight, bias, 1, precision)
    check_targets(targets, hidden, weight)
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise SettingsError(f"No column named {unknown[0]!r}; known: {', '.join(COLUMNS)}.")
    if "top_entropy" in columns and not 2 <= top <= len(weight):
        raise SettingsError(
            f"top_entropy of {top} words; expected 2 to {len(weight)}, the size of the vocabulary."
        )
    return precision
