"""Group advantages and the clipped objective of GRPO (arXiv:2402.03300), on tensors.

    A       = (r - mean(r)) / (std(r) + 1e-4)          over the answers to one prompt
    ratio   = p(token) / p(token) when it was sampled
    J       = min(ratio A, clip(ratio, 1 - e, 1 + e) A) - beta k3
    k3      = q/p - log(q/p) - 1                        of the reference q, an estimate of KL(p || q)

``std`` divides by the number of answers less one, as TRL's does. Rewards may have dimensions, each with an advantage of
its own; :func:`credited` gives every token the advantages of the dimensions that it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from postlude.errors import SettingsError

__all__ = [
    "MEANS",
    "clipped",
    "credited",
    "divergence",
    "equal_groups",
    "group_advantages",
]

_SMALLEST_SPREAD = 1e-4


def group_advantages(rewards: Tensor, generations: int, normalize: bool = True) -> Tensor:
    """How far each reward is above the mean of its group.

    Args:
        rewards: ``[N]`` or ``[N, D]``; ``generations`` answers to one prompt follow each other.
        generations: answers to each prompt.
        normalize: divide by the standard deviation of the group, plus 1e-4.

    Returns:
        The shape of ``rewards``; every dimension is compared with itself only.

    Raises:
        SettingsError: not a whole number of groups, or groups of one.
    """
    if generations < 2 or len(rewards) % generations:
        raise SettingsError(
            f"{len(rewards)} rewards are no whole number of groups of {generations}; expected groups of 2 or more"
        )
    grouped = rewards.unflatten(0, (-1, generations))
    advantages = grouped - grouped.mean(1, keepdim=True)
    if normalize:
        advantages = advantages / (grouped.std(1, keepdim=True) + _SMALLEST_SPREAD)
    flat: Tensor = advantages.flatten(0, 1)
    return flat


def equal_groups(rewards: Tensor, generations: int) -> Tensor:
    """Groups whose answers all got the same reward, which teach nothing: ``bool [groups]`` or ``[groups, D]``."""
    grouped = rewards.unflatten(0, (-1, generations))
    return torch.isclose(grouped, grouped[:, :1]).all(1)


def credited(advantages: Tensor, segments: Tensor) -> Tensor:
    """The advantage of each token: the mean over the dimensions that it speaks of.

    Args:
        advantages: ``[N, D]``.
        segments: ``bool [N, T, D]``: whether a token belongs to what an answer says of a dimension.

    Returns:
        ``[N, T]``; 0 for tokens that speak of nothing.
    """
    among = segments.to(advantages.dtype)
    return (among @ advantages[:, :, None]).squeeze(-1) / among.sum(-1).clamp(min=1)


def clipped(log_probabilities: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``min(ratio A, clip(ratio) A)`` of each token; its gradient moves towards what is above the mean.

    Args:
        log_probabilities: ``[N, T]`` of the sampled tokens.
        old: the same when they were sampled, without gradient.
        advantages: ``[N, T]``, or ``[N, 1]`` for one to all tokens of an answer.
        clip: how far the ratio may move from 1.
    """
    ratio = (log_probabilities - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def divergence(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """``k3`` of each token: never negative, 0 where both agree, and its mean over sampled tokens is the divergence."""
    delta = reference - log_probabilities
    return delta.exp() - delta - 1


def _of_answers(values: Tensor, mask: Tensor, longest: int) -> Tensor:
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _of_tokens(values: Tensor, mask: Tensor, longest: int) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _of_longest(values: Tensor, mask: Tensor, longest: int) -> Tensor:
    return (values * mask).sum() / (len(values) * longest)


MEANS: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "grpo": _of_answers,
    "bnpo": _of_tokens,
    "dr_grpo": _of_longest,
}
"""What a sum over ``values [N, T]`` where ``mask [N, T]`` is 1 is divided by, given the longest answer allowed: each
answer by its own tokens (the paper's), all by all tokens, all by the longest (arXiv:2503.20783)."""
