"""The empirical direction of a model's massive activations (singular defects, arXiv:2502.07004).

    direction = mean of all massive hidden states, over all layers and positions

The hidden states are those after the embeddings and after every block; the last one is taken before the final norm.
Which are massive: by default those whose norm is above 10 times the median norm of their layer and above a tenth of
the largest such norm (:mod:`postlude.numerics.massive`); a threshold sets an absolute norm instead, as the paper
does, whose values, chosen by eye, run from 200 (pythia-160m) to 8000 (qwen2.5). The automatic rule takes for granted
that fewer than half of the tokens are massive, which sequences of more than a few tokens ensure.

A model may have none (small models usually do not). Its direction is then the mean of the 1 % of tokens with the
largest norm in the layer where norms are most uneven, and ``massive`` is False.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.inspection.report import checked_tokens, rounded, token_text
from postlude.numerics.directions import mean_pairwise_acute_angle
from postlude.numerics.massive import Massive, find_massive
from postlude.surgery.batches import token_batches
from postlude.surgery.capture import observe

if TYPE_CHECKING:
    from postlude.runs.checkpoint import Checkpoint
    from postlude.runs.progress import Progress

__all__ = ["EmpiricalDirection", "MassiveToken", "empirical_direction"]

# States whose pairwise angles are averaged; more are drawn from at random.
MOST_STATES = 2048
# Share of the tokens that stands in for massive ones where there are none.
LARGEST_SHARE = 0.01
TOP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class MassiveToken:
    """A token that had massive hidden states.

    Attributes:
        token_id: vocabulary id.
        text: what it reads as; None without a tokenizer.
        initial: occurrences at position 0 that were massive in some layer.
        later: occurrences elsewhere.
    """

    token_id: int
    text: str | None
    initial: int
    later: int


@dataclasses.dataclass(frozen=True)
class EmpiricalDirection:
    """The direction of the massive hidden states of a model on a text.

    Attributes:
        vector: ``[hidden_size]`` float64, their mean; not of unit length.
        massive: whether they are massive; else they are only the largest there are.
        threshold: norm above which they lie.
        automatic: whether the threshold was found rather than given.
        states: how many there are.
        spread: mean acute angle between two of them, in degrees.
        norms: ``[layers + 1, samples, length]`` norms of all hidden states, from the embeddings on.
        mask: which of those are meant; the same shape.
        tokens: the tokens they belong to, the most frequent first.
    """

    vector: Tensor
    massive: bool
    threshold: float
    automatic: bool
    states: int
    spread: float
    norms: Tensor
    mask: Tensor
    tokens: tuple[MassiveToken, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers after which there are such states; -1 is after the embeddings."""
        return tuple(int(row) - 1 for row in self.mask.flatten(1).any(1).nonzero().flatten())

    @property
    def initial_share(self) -> float:
        """Share of the states that are at position 0."""
        return float(self.mask[:, :, 0].sum() / self.mask.sum())

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON, without the norms of every token."""
        return rounded(
            {
                "massive": self.massive,
                "threshold": self.threshold,
                "automatic_threshold": self.automatic,
                "states": self.states,
                "layers": self.layers,
                "initial_share": self.initial_share,
                "mean_pairwise_angle_degrees": self.spread,
                "tokens": [dataclasses.asdict(token) for token in self.tokens],
                "vector": self.vector,
            }
        )


def empirical_direction(
    checkpoint: Checkpoint,
    tokens: Tensor | None,
    threshold: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> EmpiricalDirection:
    """Find the direction of the massive hidden states.

    Args:
        checkpoint: the model.
        tokens: ids ``[samples, length]`` of at least 2 tokens: a first token alone has no neighbours to stand out from.
        threshold: norm above which a hidden state counts; None finds one.
        seed: of the choice of states whose pairwise angles are averaged, where there are many.
        progress: where to show how far it is.

    Raises:
        DataError: no tokens, or some that the model cannot read, or none above a given threshold.
    """
    ids = checked_tokens(checkpoint, tokens, shortest=2)
    model, anatomy = checkpoint.model, checkpoint.language
    batches = list(token_batches(ids))
    seen: list[list[Tensor]] = [[] for _ in range(len(anatomy.blocks) + 1)]
    observe(
        model,
        anatomy,
        progress.iterate(batches, "hidden states: norms") if progress else batches,
        {},
        residual=lambda layer, hidden: seen[layer + 1].append(hidden.float().norm(dim=-1).cpu()),
    )
    norms = torch.stack([torch.cat(layer) for layer in seen])
    flat = norms.flatten(1)
    found = find_massive(flat, threshold)
    if not found.any and threshold is not None:
        raise DataError(
            f"No hidden state has a norm above threshold={threshold:g}; the largest is {float(norms.max()):.4g}. "
            "Lower the threshold, or leave it out to have one found."
        )
    chosen = found if found.any else _largest(flat)
    mask = chosen.mask.view_as(norms)
    total = torch.zeros(anatomy.hidden_size, dtype=torch.float64)
    kept: list[Tensor] = []
    keep = _some_of(mask, seed)
    done = [0] * len(seen)

    def collect(layer: int, hidden: Tensor) -> None:
        row, start = layer + 1, done[layer + 1]
        rows = slice(start, start + len(hidden))
        done[row] += len(hidden)
        selected = mask[row, rows]
        if selected.any():
            states = hidden[selected.to(hidden.device)].double().cpu()
            total.add_(states.sum(0))
            kept.append(states[keep[row, rows][selected]])

    observe(
        model,
        anatomy,
        progress.iterate(batches, "hidden states: direction") if progress else batches,
        {},
        residual=collect,
    )
    states = int(mask.sum())
    return EmpiricalDirection(
        vector=total / states,
        massive=found.any,
        threshold=chosen.threshold,
        automatic=threshold is None,
        states=states,
        spread=mean_pairwise_acute_angle(torch.cat(kept)),
        norms=norms,
        mask=mask,
        tokens=_tokens(checkpoint, ids, mask),
    )


def _largest(norms: Tensor) -> Massive:
    """The largest norms of the layer ``[layers + 1, tokens]`` in which they are most uneven."""
    layer = int((norms.amax(1) / norms.median(1).values.clamp_min(1e-30)).argmax())
    count = max(1, round(LARGEST_SHARE * norms.shape[1]))
    top = norms[layer].topk(count)
    mask = torch.zeros_like(norms, dtype=torch.bool)
    mask[layer, top.indices] = True
    return Massive(mask, float(top.values[-1]))


def _some_of(mask: Tensor, seed: int) -> Tensor:
    """``mask`` with at most MOST_STATES entries left."""
    places = mask.nonzero()
    if len(places) <= MOST_STATES:
        return mask
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros_like(mask)
    kept[tuple(places[order[:MOST_STATES]].T)] = True
    return kept


def _tokens(checkpoint: Checkpoint, ids: Tensor, mask: Tensor) -> tuple[MassiveToken, ...]:
    anywhere = mask.any(0).cpu()
    initial = Counter(ids[:, 0][anywhere[:, 0]].tolist())
    later = Counter(ids[:, 1:][anywhere[:, 1:]].tolist())
    # Tokens away from the start say more: at the start every token can be massive.
    order = sorted({*initial, *later}, key=lambda token: (-later[token], -initial[token], token))
    return tuple(
        MassiveToken(token, token_text(checkpoint.tokenizer, token), initial[token], later[token])
        for token in order[:TOP_TOKENS]
    )
