"""What a language-model head says about each token, without ever holding its logits.

The logits of ``T`` tokens over ``V`` words are ``hidden @ weight.T + bias``. They are usually the largest tensor of a
training step. Here they exist one piece at a time, at most ``chunk`` words by 1024 tokens, and are folded into running
sums (the streaming log-sum-exp of arXiv:1805.02867). Gradients recompute the pieces in the backward pass
(arXiv:2411.09009).

Precision: the products are formed in ``precision``, by default fp32, or fp64 for fp64 input. With the dtype
of the model (bfloat16, say), logits carry the same rounding as those ``transformers`` returns; their sums are
fp32 in any case. Autocast has no say here.
Everything is in nats.

Ties: a word with exactly the logit of the target is not above it, nor is the target itself. A word whose logit differs
from the target's by rounding alone may fall on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postlude.errors import DataError, SettingsError

__all__ = [
    "TokenStatistics",
    "check_head",
    "check_targets",
    "kl_divergence",
    "token_log_probability",
    "token_statistics",
]

_TOKENS = 1024  # tokens per piece of logits


class TokenStatistics(NamedTuple):
    """Of each token, ``[T]``, in fp32 (fp64 for fp64 input or precision).

    Attributes:
        log_probability: ``log p(target)``.
        mass_above: sum of the probabilities that exceed ``p(target)``, strictly; 0 where the target is the top word.
        entropy: ``-sum p log p``.
        top1: index of the most probable word, int64.
        logsumexp: log of the normaliser.
    """

    log_probability: Tensor
    mass_above: Tensor
    entropy: Tensor
    top1: Tensor
    logsumexp: Tensor


def token_log_probability(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int = 8192,
    precision: torch.dtype | None = None,
) -> Tensor:
    """``log p(target)`` of each token; differentiable in ``hidden``, ``weight`` and ``bias`` (once).

    One pass over the vocabulary, one more in the backward pass, which needs no logits from the first. Its
    mean, negated, is the cross-entropy loss.

    Args:
        hidden: ``[T, D]`` states that the head reads, final norm applied.
        weight: ``[V, D]`` of the head.
        targets: ``[T]`` indices in ``0..V-1``. Leave masked tokens out beforehand; there is no ignored index.
        bias: ``[V]`` of the head.
        chunk: words per piece of logits.
        precision: dtype of the products.

    Returns:
        ``[T]`` fp32, or fp64 for fp64 input or precision.

    Raises:
        DataError: shapes that do not fit, or a target outside of the vocabulary.
    """
    precision = check_head(hidden, weight, bias, chunk, precision)
    check_targets(targets, hidden, weight)
    return _log_probability(hidden, weight, bias, targets, chunk, precision)


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int = 8192,
    precision: torch.dtype | None = None,
) -> TokenStatistics:
    """Log-probability, mass above the target, entropy and top word of each token; not differentiable.

    Two passes over the vocabulary: the second compares logits formed exactly as the target's was, which a product
    formed for the target alone is not. Arguments as for ``token_log_probability``.
    """
    precision = check_head(hidden, weight, bias, chunk, precision)
    check_targets(targets, hidden, weight)
    with torch.no_grad():
        target_logit, total = _target_pass(hidden, weight, bias, targets, chunk, precision)
        logsumexp = total.logsumexp
        above = torch.zeros_like(logsumexp)
        for tokens, start, logits in _logits(hidden, weight, bias, chunk, precision):
            probability = (logits - logsumexp[tokens, None]).exp_()
            probability[logits <= target_logit[tokens, None]] = 0
            _at_target(probability, targets[tokens], start, probability.new_zeros(()))
            above[tokens] += probability.sum(1)
    return TokenStatistics(
        log_probability=target_logit - logsumexp,
        # Rounding can carry the sum of almost everything past one.
        mass_above=above.clamp_(max=1),
        entropy=total.entropy,
        top1=total.top1,
        logsumexp=logsumexp,
    )


def kl_divergence(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    chunk: int = 8192,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``KL(p || q)`` of two heads over one vocabulary, and whether their top words agree; not differentiable.

    Two passes. The sum runs over ``q - p - p log(q / p)``, which adds up to the same but has no negative terms:
    the small divergence of two nearly equal models does not drown in the rounding of large terms that cancel.

    Args:
        hidden_p: ``[T, D_p]`` states of the reference model.
        weight_p: ``[V, D_p]`` its head.
        hidden_q: ``[T, D_q]`` states of the other model on the same tokens.
        weight_q: ``[V, D_q]`` its head.
        bias_p: ``[V]`` bias of the reference head.
        bias_q: ``[V]`` bias of the other head.
        chunk: words per piece of logits.
        precision: dtype of the products.

    Returns:
        ``kl [T]`` in nats, fp32 or fp64, and ``agree [T]`` bool.
    """
    precision_p = check_head(hidden_p, weight_p, bias_p, chunk, precision)
    precision_q = check_head(hidden_q, weight_q, bias_q, chunk, precision)
    if len(hidden_p) != len(hidden_q) or len(weight_p) != len(weight_q):
        raise DataError(
            f"Cannot compare {len(hidden_p)} tokens over {len(weight_p)} words with {len(hidden_q)} tokens over "
            f"{len(weight_q)} words; both models need the same tokens and the same vocabulary."
        )
    with torch.no_grad():
        total_p = _Running(hidden_p, precision_p)
        for tokens, start, logits in _logits(hidden_p, weight_p, bias_p, chunk, precision_p):
            total_p.add(tokens, start, logits)
        total_q = _Running(hidden_q, precision_q)
        for tokens, start, logits in _logits(hidden_q, weight_q, bias_q, chunk, precision_q):
            total_q.add(tokens, start, logits)
        lse_p, lse_q = total_p.logsumexp, total_q.logsumexp
        kl = torch.zeros_like(lse_p, dtype=torch.promote_types(lse_p.dtype, lse_q.dtype))
        pairs = zip(
            _logits(hidden_p, weight_p, bias_p, chunk, precision_p),
            _logits(hidden_q, weight_q, bias_q, chunk, precision_q),
            strict=True,
        )
        for (tokens, _, logits_p), (_, _, logits_q) in pairs:
            log_p = logits_p - lse_p[tokens, None]
            log_q = logits_q - lse_q[tokens, None]
            ratio = log_q - log_p
            p = log_p.exp()
            # expm1 keeps the small ratios, the plain form the large ones, where expm1 overflows. A word of
            # probability 0 under p adds q and nothing else, whatever its ratio.
            near = p * (torch.expm1(ratio) - ratio)
            far = log_q.exp() - p - torch.where(p > 0, p * ratio, 0)
            kl[tokens] += torch.where(ratio.abs() < 1, near, far).sum(1)
    return kl, total_p.top1 == total_q.top1


class _Running:
    """Log-sum-exp, entropy and top word of ``[T]`` tokens while pieces of logits pass."""

    def __init__(self, hidden: Tensor, precision: torch.dtype) -> None:
        size, dtype = len(hidden), torch.promote_types(precision, torch.float32)
        self._max = torch.full((size,), -torch.inf, dtype=dtype, device=hidden.device)
        self._sum = torch.zeros_like(self._max)
        self._cross = torch.zeros_like(self._max)  # sum of exp(logit - max) * (logit - max)
        self.top1 = torch.zeros(size, dtype=torch.int64, device=hidden.device)

    def add(self, tokens: slice, start: int, logits: Tensor, entropy: bool = False) -> None:
        """Take in ``logits [tokens, words]`` of the words from ``start`` on."""
        old_max, old_sum = self._max[tokens], self._sum[tokens]
        piece_max, piece_top = logits.max(1)
        new_max = torch.maximum(old_max, piece_max)
        # While every logit of a token is -inf there is nothing to shift by.
        shift = torch.where(new_max == -torch.inf, 0, new_max)
        centred = logits - shift[:, None]
        exponential = centred.exp()
        shrink = (old_max - shift).exp()
        if entropy:
            moved = torch.where(old_sum > 0, self._cross[tokens] + old_sum * (old_max - shift), 0)
            # A logit of -inf has no part in the entropy; -inf * 0 would be NaN.
            terms = exponential * centred.clamp_(min=torch.finfo(centred.dtype).min)
            self._cross[tokens] = shrink * moved + terms.sum(1)
        self._sum[tokens] = shrink * old_sum + exponential.sum(1)
        self.top1[tokens] = torch.where(piece_max > old_max, piece_top + start, self.top1[tokens])
        self._max[tokens] = new_max

    @property
    def logsumexp(self) -> Tensor:
        return self._max + self._sum.log()

    @property
    def entropy(self) -> Tensor:
        return (self._sum.log() - self._cross / self._sum).clamp_(min=0)


def _target_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    precision: torch.dtype,
    entropy: bool = True,
) -> tuple[Tensor, _Running]:
    """Logit of each target ``[T]`` and the running sums, in one pass."""
    total = _Running(hidden, precision)
    target_logit = torch.zeros_like(total._max)
    for tokens, start, logits in _logits(hidden, weight, bias, chunk, precision):
        total.add(tokens, start, logits, entropy)
        offset = targets[tokens] - start
        inside = (offset >= 0) & (offset < logits.shape[1])
        found = logits.gather(1, offset.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        target_logit[tokens] = torch.where(inside, found, target_logit[tokens])
    return target_logit, total


class _LogProbability(torch.autograd.Function):
    """The gradient of a logit is ``grad * (one_hot(target) - p)``; ``p`` is recomputed piece by piece."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        precision: torch.dtype,
    ) -> Tensor:
        target_logit, total = _target_pass(
            hidden, weight, bias, targets, chunk, precision, entropy=False
        )
        ctx.chunk, ctx.precision = chunk, precision
        ctx.save_for_backward(hidden, weight, bias, targets, total.logsumexp)
        return target_logit - total.logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad_outputs[0].to(logsumexp.dtype)
        precision, wide = ctx.precision, logsumexp.dtype
        # Sums over words or over pieces of tokens are at least fp32 and are rounded to the parameter's dtype once.
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if need_bias else None
        block = torch.zeros(0, device=weight.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens, start, logits in _logits(hidden, weight, bias, ctx.chunk, precision):
                words = slice(start, start + logits.shape[1])
                slope = logits.sub_(logsumexp[tokens, None]).exp_().mul_(-grad[tokens, None])
                _at_target(slope, targets[tokens], start, grad[tokens], accumulate=True)
                if grad_bias is not None:
                    grad_bias[words] += slope.sum(0)
                slope = slope.to(precision)
                if grad_hidden is not None:
                    grad_hidden[tokens] += slope @ weight[words].to(precision)
                if grad_weight is not None:
                    if tokens.start == 0:
                        block = torch.zeros_like(weight[words], dtype=wide)
                    block += slope.T @ hidden[tokens].to(precision)
                    if tokens.stop >= len(hidden):
                        grad_weight[words] = block.to(weight.dtype)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


# torch leaves Function.apply untyped.
_log_probability: Callable[..., Tensor] = _LogProbability.apply


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, precision: torch.dtype
) -> Iterator[tuple[slice, int, Tensor]]:
    """Pieces ``(tokens, first word, logits [tokens, words])``, at least fp32; words outer, tokens inner.

    The order lets one conversion of the weight serve all tokens. Each piece is a fresh tensor the caller may overwrite.
    """
    wide = torch.promote_types(precision, torch.float32)
    for start in range(0, len(weight), chunk):
        words = weight[start : start + chunk].detach().to(precision)
        offset = None if bias is None else bias[start : start + chunk].detach().to(precision)
        for first in range(0, len(hidden), _TOKENS):
            tokens = slice(first, first + _TOKENS)
            rows = hidden[tokens].detach().to(precision)
            # Around the product only: a context left open across a yield would reach into the caller.
            with torch.autocast(hidden.device.type, enabled=False):
                logits = torch.nn.functional.linear(rows, words, offset)
            yield tokens, start, logits.to(wide)


def _at_target(
    piece: Tensor, targets: Tensor, start: int, value: Tensor, accumulate: bool = False
) -> None:
    """Write ``value`` (``[]`` or one per token) to the entries of the targets that lie in this piece."""
    offset = targets - start
    rows = ((offset >= 0) & (offset < piece.shape[1])).nonzero()[:, 0]
    piece.index_put_((rows, offset[rows]), value.expand(len(targets))[rows], accumulate=accumulate)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk: int,
    precision: torch.dtype | None,
) -> torch.dtype:
    """The dtype of the products: ``precision``, or at least fp32.

    Raises:
        DataError: shapes that do not fit.
        SettingsError: a chunk or a precision that cannot be.
    """
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1] != weight.shape[1]
        or not len(weight)
    ):
        raise DataError(
            f"Hidden states have shape {tuple(hidden.shape)} and the head {tuple(weight.shape)}; "
            "expected [tokens, width] and [vocabulary, width]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DataError(
            f"The bias of the head has shape {tuple(bias.shape)}; expected ({len(weight)},)."
        )
    if chunk < 1:
        raise SettingsError(f"chunk must be at least 1 word; got {chunk}.")
    if precision is None:
        return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if not precision.is_floating_point:
        raise SettingsError(f"precision must be a floating-point dtype; got {precision}.")
    return precision


def check_targets(targets: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Refuse targets ``[T]`` that are no words of the head.

    Raises:
        DataError: not one whole number for each token, or one outside of the vocabulary.
    """
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise DataError(
            f"Targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; expected ({len(hidden)},) integers."
        )
    if targets.numel():
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= len(weight):
            raise DataError(
                f"Targets range from {low} to {high}, but the vocabulary has {len(weight)} words. "
                "Leave masked tokens, such as the label -100, out before."
            )
