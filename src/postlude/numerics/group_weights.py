"""Learned weights of groups of parameters: which parts of a sum of scores carry signal.

A score is a sum over groups of parameters, ``tau(q, n; w) = sum_j w_j S[j, q, n]``. Groups that say the same of every
example only blur it. Without any label, a weighting is good where the examples it ranks first stand far above all the
others (arXiv:2506.05647)::

    L(w) = - mean over q of [ mean over the k largest of tau(q, .; w) ] / || tau(q, .; w) ||_2  +  reg * ||w / M||^2

The ``k`` largest are found again at every step. Weights are a softmax of free numbers, here times the number of groups
``M``, so that equal weights are ones and leave every score as it is; in the regulariser they sum to 1, which pulls
towards equal weights. The loss does not change when all of ``S`` is multiplied by a number.

The norm needs the ``M x M`` matrix ``S_q S_q^T`` alone, and the mean a vector of ``M`` numbers, so a step costs one
product of ``w`` with ``S`` to find the largest, and nothing of size ``N`` is differentiated.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = ["GroupWeights", "learn_group_weights"]


@dataclasses.dataclass(frozen=True)
class GroupWeights:
    """What was learned.

    Attributes:
        weights: fp64 ``[groups]``, positive, of mean 1.
        losses: fp64 ``[steps + 1]`` of ``L`` without the regulariser: at equal weights, and after every step.
    """

    weights: Tensor
    losses: Tensor


def learn_group_weights(
    contributions: Tensor,
    *,
    k: int,
    regularizer: float = 0.01,
    steps: int = 200,
    rate: float = 0.05,
    center: bool = False,
) -> GroupWeights:
    """Weights of groups from the contributions of each to the scores of some queries.

    Args:
        contributions: ``S [groups, queries, examples]``.
        k: how many of the largest scores count as found.
        regularizer: ``reg``; above 0.01 it takes the gain away.
        steps, rate: of Adam on the free numbers, from equal weights.
        center: subtract the mean over examples from every contribution first, for scores with a large common part.

    Raises:
        SettingsError: a number out of range, or ``k`` larger than the number of examples.
        DataError: contributions that are not finite, of another shape, or all zero for a query.
    """
    if contributions.ndim != 3 or 0 in contributions.shape:
        raise DataError(
            f"Contributions are {tuple(contributions.shape)}; expected [groups, queries, examples], none of them 0."
        )
    groups, queries, examples = contributions.shape
    if not 1 <= k <= examples:
        raise SettingsError(f"k is {k}; expected 1 to {examples}, the number of examples")
    for name, value, fine, expected in (
        ("regularizer", regularizer, regularizer >= 0, "0 or more"),
        ("steps", steps, steps >= 0, "0 or more"),
        ("rate", rate, rate > 0, "more than 0"),
    ):
        if not fine:
            raise SettingsError(f"{name} is {value}; expected {expected}")
    if not bool(contributions.isfinite().all()):
        raise DataError(
            "Some contributions are not finite, so nothing can be learned from them: look for what overflowed."
        )
    parts = contributions.float()
    # One number for all of them: the loss does not depend on it, and squares stay in range.
    largest = parts.abs().amax()
    parts = parts / torch.where(largest > 0, largest, 1.0)
    if center:
        parts = parts - parts.mean(2, keepdim=True)
    gram = torch.stack([(one @ one.mT).double() for one in parts.transpose(0, 1)])
    if not bool((gram.diagonal(dim1=1, dim2=2).sum(1) > 0).all()):
        raise DataError(
            "A query has a score of zero for every example, so there is nothing to rank."
        )
    flat = parts.reshape(groups, -1)
    free = torch.zeros(groups, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=rate)

    def loss(weights: Tensor) -> Tensor:
        with torch.no_grad():
            scores = (weights.to(flat) @ flat).view(queries, examples)
            top = scores.topk(k, dim=1, sorted=False).indices
            means = parts.gather(2, top.expand(groups, -1, -1)).double().mean(2)
        norms = torch.einsum("i,qij,j->q", weights, gram, weights).clamp(min=1e-300).sqrt()
        return -((weights @ means) / norms).mean()

    losses = []
    with torch.enable_grad():
        for step in range(steps + 1):
            weights = _weights(free)
            signal = loss(weights)
            losses.append(signal.detach())
            if step < steps:
                optimizer.zero_grad(set_to_none=True)
                (signal + regularizer * (weights / groups).square().sum()).backward()
                optimizer.step()
    return GroupWeights(_weights(free).detach(), torch.stack(losses))


def _weights(free: Tensor) -> Tensor:
    """Positive, of mean 1; exactly ones for equal numbers."""
    exponents = (free - free.max()).exp()
    return exponents / exponents.mean()
