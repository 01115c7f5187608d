"""How tokens come to explode: the measurements of :mod:`postlude.inspection.explosion`, gathered and told.

For the inspection :mod:`postlude.inspection.singular_defects`, which finds the block (arXiv:2502.07004).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from postlude.inspection.explosion import (
    Ablation,
    Scan,
    Subspace,
    ablate,
    explosion_subspace,
    prompt_norms,
    scan_random,
    scan_vocabulary,
    second_position,
    trained_tokens,
)
from postlude.inspection.report import rounded, token_text

if TYPE_CHECKING:
    from postlude.runs.checkpoint import Checkpoint

__all__ = ["ExplosionPath", "NamedToken", "explosion_path"]

PLOTTED_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class NamedToken:
    """One of the tokens with the largest norm after the explosion block when nothing stands before it.

    Attributes:
        token_id: vocabulary id.
        text: what it reads as; None without a tokenizer.
        norm: after the explosion block, all attention being zero.
        prompt_norm: largest over all layers at the end of the prompt, attention being on; None without a tokenizer.
    """

    token_id: int
    text: str | None
    norm: float
    prompt_norm: float | None


@dataclasses.dataclass(frozen=True)
class ExplosionPath:
    """How tokens come to explode.

    Attributes:
        subspace: which inputs of the feed-forward layer explode.
        trained: ``[vocabulary]`` bool, ids with a trained embedding.
        alone: every id away from position 0 (attention silenced).
        initial: every id at position 0.
        second: every id at position 1, behind a random token.
        random: random directions in place of embeddings, at position 0.
        largest: tokens with the largest norms of ``alone``.
        ablation: the model without the exploding direction in the input of the norm.
    """

    subspace: Subspace
    trained: Tensor
    alone: Scan
    initial: Scan
    second: Scan
    random: Scan
    largest: tuple[NamedToken, ...]
    ablation: Ablation

    def to_dict(self, threshold: float) -> dict[str, Any]:
        """In the types of JSON; a state above ``threshold`` counts as exploded."""
        shown = self.trained.nonzero().flatten()
        if len(shown) > PLOTTED_TOKENS:
            shown = shown[torch.linspace(0, len(shown) - 1, PLOTTED_TOKENS).round().long()]
        return rounded(
            {
                "subspace": self.subspace.to_dict(),
                "untrained_tokens": int((~self.trained).sum()),
                "non_initial": {
                    **_spread(self.alone.norms[self.trained], threshold),
                    "largest": [dataclasses.asdict(token) for token in self.largest],
                },
                "initial": _spread(self.initial.norms[self.trained], threshold),
                "second": _spread(self.second.norms[self.trained], threshold),
                "random_directions": _spread(self.random.norms, threshold),
                "coefficients": {
                    "token_ids": shown,
                    "position_0": self.initial.coefficients[shown],
                    "position_1": self.second.coefficients[shown],
                },
                "ablation": self.ablation.to_dict(),
            }
        )

    def sentences(self, threshold: float) -> list[str]:
        """In words; a state above ``threshold`` counts as exploded."""
        space, change = self.subspace, self.ablation
        shares = [
            float((scan.norms > threshold).double().mean())
            for scan in (self.initial, self.second, self.alone, self.random)
        ]
        named = ", ".join(
            repr(token.text) if token.text is not None else f"id {token.token_id}"
            for token in self.largest
            if token.norm > threshold
        )
        return [
            f"Exploding inputs of that block's feed-forward layer: {space.dimension} direction(s); output norm "
            f"{space.leading:.4g}, of all others at most {float(space.rest.max()):.4g}.",
            f"Tokens that explode: {shares[0]:.1%} at position 0, {shares[1]:.1%} at position 1, {shares[2]:.1%} "
            f"without attention{f' ({named})' if named else ''}; {shares[3]:.1%} of random embeddings.",
            f"Without the direction the loss goes from {change.loss:.4f} to {change.loss_without:.4f} and the "
            f"largest norm from {change.max_norm:.4g} to {change.max_norm_without:.4g}.",
        ]


def explosion_path(
    checkpoint: Checkpoint,
    tokens: Tensor,
    layer: int,
    feed_forward: Tensor,
    *,
    prompt: str,
    top: int,
    random_directions: int,
    seed: int,
) -> ExplosionPath:
    """Follow how tokens come to explode; runs the whole vocabulary.

    Args:
        checkpoint: the model.
        tokens: ``[samples, length]`` that the ablation is measured on.
        layer: the explosion block.
        feed_forward: ``[hidden_size, hidden_size]``, the linear approximation of its feed-forward layer.
        prompt: what the tokens with the largest norms are put behind.
        top: how many of them.
        random_directions: how many are tried in place of embeddings.
        seed: of those, and of the tokens put before others.
    """
    model, anatomy = checkpoint.model, checkpoint.language
    block = anatomy.blocks[layer]
    subspace = explosion_subspace(model, block, feed_forward)
    v = subspace.direction
    trained = trained_tokens(model, anatomy)
    alone = scan_vocabulary(model, anatomy, layer, v, attention=False)
    initial = scan_vocabulary(model, anatomy, layer, v, attention=True)
    largest = alone.norms.topk(min(top, len(alone.norms)))
    behind = prompt_norms(checkpoint, prompt, largest.indices.tolist())
    named = tuple(
        NamedToken(
            token,
            token_text(checkpoint.tokenizer, token),
            norm,
            None if behind is None else float(behind[rank]),
        )
        for rank, (token, norm) in enumerate(
            zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
        )
    )
    return ExplosionPath(
        subspace=subspace,
        trained=trained,
        alone=alone,
        initial=initial,
        second=second_position(model, anatomy, layer, v, trained, seed),
        random=scan_random(model, anatomy, layer, v, random_directions, seed),
        largest=named,
        ablation=ablate(model, anatomy, block, v, tokens),
    )


def _spread(norms: Tensor, threshold: float) -> dict[str, float]:
    """Distribution of norms, and the share of those above the threshold."""
    low, middle, high = norms.double().quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    return {
        "exploding_share": float((norms > threshold).double().mean()),
        "min_norm": float(norms.min()),
        "p5_norm": low,
        "median_norm": middle,
        "p95_norm": high,
        "max_norm": float(norms.max()),
    }
