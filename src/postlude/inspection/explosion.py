"""What makes hidden states explode in one block: which directions, which tokens, and what depends on it.

All of it is measured on the model itself (singular defects, arXiv:2502.07004), at the block whose feed-forward layer
writes the massive activations:

* :func:`explosion_subspace`: every right singular vector of the linearised feed-forward layer, with both signs,
  through the true norm and feed-forward layer. In a large model only the leading one explodes.
* :func:`scan_vocabulary`: every token id as a sequence of its own. At position 0 with attention on, almost every
  trained id explodes; with all attention outputs at zero only the tokens that also explode elsewhere do.
* :func:`scan_random`: random directions in place of embeddings.
* :func:`second_position`: every id at position 1, behind a random token.
* :func:`prompt_norms`: tokens behind a prompt, through the whole model.
* :func:`ablate`: the loss without the exploding direction.

Cost: a few passes of the vocabulary through the blocks up to that one, and two forward passes over the text.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from postlude.inspection.report import rounded
from postlude.numerics.directions import leading_singular_directions, unit
from postlude.numerics.likelihood import token_log_probability
from postlude.surgery.anatomy import LanguageAnatomy, LanguageBlock
from postlude.surgery.batches import device_of, token_batches
from postlude.surgery.capture import observe
from postlude.surgery.probes import (
    Reached,
    attention_silenced,
    direction_hidden,
    feed_forward,
    norm_path,
    normalise,
    run_to,
)

if TYPE_CHECKING:
    from postlude.runs.checkpoint import Checkpoint

__all__ = [
    "Ablation",
    "Scan",
    "Subspace",
    "ablate",
    "explosion_subspace",
    "prompt_norms",
    "scan_random",
    "scan_vocabulary",
    "second_position",
    "trained_tokens",
]

TOKENS_PER_BATCH = 4096
SHOWN_DIRECTIONS = 16


@dataclasses.dataclass(frozen=True)
class Subspace:
    """Which inputs of a feed-forward layer explode.

    Attributes:
        direction: ``[hidden_size]`` float64 unit vector: the leading right singular vector, with the sign that
            gives the larger output.
        values: ``[hidden_size]`` singular values of the linear approximation ``F``.
        outputs: ``[hidden_size, 2]`` norms of the true output for every singular vector, as it is and negated.
        fed_norm: norm at which they are fed to the block's norm, ``sqrt(hidden_size)``: entries of about 1, so
            that the norm's epsilon does not show.
    """

    direction: Tensor
    values: Tensor
    outputs: Tensor
    fed_norm: float

    @property
    def leading(self) -> float:
        """Output norm of the leading direction, with the larger sign."""
        return float(self.outputs[0].max())

    @property
    def rest(self) -> Tensor:
        """``[hidden_size - 1]`` output norms of the others, each with its larger sign."""
        return self.outputs[1:].amax(1)

    @property
    def dimension(self) -> int:
        """Directions whose output is above a tenth of the largest output; 1 in the models of the paper."""
        largest = self.outputs.amax(1)
        return int((largest > largest.max() / 10).sum())

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON; the leading directions only."""
        return rounded(
            {
                "fed_norm": self.fed_norm,
                "leading_output_norm": self.leading,
                "largest_other_output_norm": float(self.rest.max()),
                "median_other_output_norm": float(self.rest.median()),
                "dimension": self.dimension,
                "singular_values": self.values[:SHOWN_DIRECTIONS],
                "output_norms": self.outputs[:SHOWN_DIRECTIONS],
            }
        )


class Scan(NamedTuple):
    """Sequences seen at one block.

    Attributes:
        norms: ``[n]`` norm of the last token after the block.
        coefficients: ``[n]`` dot product of the exploding direction with what the block's second norm is given.
    """

    norms: Tensor
    coefficients: Tensor


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What depends on a direction: the model with and without it in the input of one norm.

    Attributes:
        loss, loss_without: mean next-token loss in nats.
        max_norm, max_norm_without: largest norm of a hidden state in any layer.
    """

    loss: float
    loss_without: float
    max_norm: float
    max_norm_without: float

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON."""
        return rounded({**dataclasses.asdict(self), "change": self.loss_without - self.loss})


@torch.no_grad()
def explosion_subspace(model: nn.Module, block: LanguageBlock, linear: Tensor) -> Subspace:
    """Feed every singular direction through the true norm and feed-forward layer.

    Args:
        model: the model.
        block: the explosion block.
        linear: ``[hidden_size, hidden_size]`` the linear approximation ``F`` of its feed-forward layer.
    """
    found = leading_singular_directions(linear)
    fed_norm = linear.shape[1] ** 0.5
    inputs = (found.right.T * fed_norm).float()
    mlp, norm = feed_forward(model, block), norm_path(block, "ug_in")
    outputs = torch.stack(
        [mlp(normalise(model, norm, sign * inputs)).norm(dim=-1) for sign in (1, -1)], dim=1
    ).cpu()
    sign = 1.0 if outputs[0, 0] >= outputs[0, 1] else -1.0
    return Subspace(sign * found.right[:, 0].cpu(), found.values.cpu(), outputs, fed_norm)


def _embeddings(model: nn.Module, anatomy: LanguageAnatomy) -> Tensor:
    """The table of token embeddings, ``[vocabulary, hidden_size]``."""
    return model.get_parameter(f"{anatomy.embeddings[0]}.weight").detach()


def trained_tokens(model: nn.Module, anatomy: LanguageAnatomy) -> Tensor:
    """``[vocabulary]`` bool: ids whose embedding norm is at least a tenth of the mean; others were never trained."""
    norms = _embeddings(model, anatomy).float().norm(dim=1).cpu()
    return norms >= norms.mean() / 10


def _scan(batches: Iterable[Reached], direction: Tensor) -> Scan:
    """Take the last token of every sequence."""
    norms, dots = [], []
    for reached in batches:
        before = reached.before_norm[:, -1].double()
        norms.append(reached.stream[:, -1].float().norm(dim=-1).cpu())
        dots.append((before @ direction.to(before.device)).cpu())
    return Scan(torch.cat(norms), torch.cat(dots))


def scan_vocabulary(
    model: nn.Module, anatomy: LanguageAnatomy, block: int, direction: Tensor, *, attention: bool
) -> Scan:
    """Run every token id as a sequence of length 1 up to a block.

    With attention the token stands at position 0. Without, it stands for a token anywhere else; a model with learned
    positions is then told position 1, because the embedding of position 0 can itself be what explodes.

    Args:
        model: the model.
        anatomy: of that model.
        block: index of the explosion block.
        direction: ``[hidden_size]`` unit exploding direction.
        attention: whether attention is on; otherwise every attention output is replaced by zero.
    """
    ids = torch.arange(len(_embeddings(model, anatomy)), device=device_of(model))[:, None]
    with contextlib.nullcontext() if attention else attention_silenced(model, anatomy):
        position = 0 if attention else 1
        return _scan(
            (
                run_to(model, anatomy, block, tokens=batch, first_position=position)
                for batch in ids.split(TOKENS_PER_BATCH)
            ),
            direction,
        )


def second_position(
    model: nn.Module,
    anatomy: LanguageAnatomy,
    block: int,
    direction: Tensor,
    trained: Tensor,
    seed: int,
) -> Scan:
    """Run every token id at position 1, behind a random trained token, up to a block."""
    generator = torch.Generator().manual_seed(seed)
    candidates = trained.nonzero().flatten()
    first = candidates[torch.randint(len(candidates), (len(trained),), generator=generator)]
    ids = torch.stack([first, torch.arange(len(trained))], dim=1).to(device_of(model))
    batches = ids.split(TOKENS_PER_BATCH // 2)
    return _scan((run_to(model, anatomy, block, tokens=batch) for batch in batches), direction)


def scan_random(
    model: nn.Module, anatomy: LanguageAnatomy, block: int, direction: Tensor, count: int, seed: int
) -> Scan:
    """Run random directions of the average embedding norm at position 0, with attention, up to a block."""
    table = _embeddings(model, anatomy)
    generator = torch.Generator().manual_seed(seed)
    rows = unit(torch.randn(count, table.shape[1], generator=generator))
    rows = (rows * float(table.float().norm(dim=1).mean())).to(table)
    batches = rows[:, None].split(TOKENS_PER_BATCH)
    return _scan((run_to(model, anatomy, block, embeddings=batch) for batch in batches), direction)


def prompt_norms(checkpoint: Checkpoint, prompt: str, tokens: list[int]) -> Tensor | None:
    """Largest norm over all layers of each of ``tokens`` at the end of ``prompt``; None without a tokenizer.

    Returns:
        ``[len(tokens)]``.
    """
    if checkpoint.tokenizer is None:
        return None
    before = checkpoint.tokenizer(prompt)["input_ids"]
    if before and before[-1] == checkpoint.tokenizer.eos_token_id:
        before = before[:-1]  # some tokenizers end every text; the prompt is to go on
    ids = torch.tensor([[*before, token] for token in tokens])
    largest = torch.zeros(len(tokens))

    def residual(_: int, hidden: Tensor) -> None:
        torch.maximum(largest, hidden[:, -1].float().norm(dim=-1).cpu(), out=largest)

    observe(checkpoint.model, checkpoint.language, [ids], {}, residual=residual)
    return largest


@torch.no_grad()
def _loss(model: nn.Module, anatomy: LanguageAnatomy, tokens: Tensor) -> tuple[float, float]:
    """Mean next-token loss in nats, and the largest norm of a hidden state."""
    final, head = model.get_submodule(anatomy.final_norm), model.get_submodule(anatomy.head)
    weight = model.get_parameter(f"{anatomy.head}.weight")
    batches = list(token_batches(tokens))
    waiting = iter(batches)
    total = largest = 0.0

    def residual(layer: int, hidden: Tensor) -> None:
        nonlocal total, largest
        largest = max(largest, float(hidden.float().norm(dim=-1).max()))
        if layer == len(anatomy.blocks) - 1:
            states = final(hidden)[:, :-1].flatten(0, 1)
            targets = next(waiting)[:, 1:].flatten().to(states.device)
            bias = getattr(head, "bias", None)
            total -= float(token_log_probability(states, weight, targets, bias).double().sum())

    observe(model, anatomy, batches, {}, residual=residual)
    return total / (tokens.shape[0] * (tokens.shape[1] - 1)), largest


def ablate(
    model: nn.Module,
    anatomy: LanguageAnatomy,
    block: LanguageBlock,
    direction: Tensor,
    tokens: Tensor,
) -> Ablation:
    """Compare the model with one in which the block's second norm does not see ``direction``.

    Args:
        model: the model.
        anatomy: of that model.
        block: the explosion block.
        direction: ``[hidden_size]``.
        tokens: ``[samples, length]`` of at least 2 tokens.
    """
    loss, largest = _loss(model, anatomy, tokens)
    with direction_hidden(model, norm_path(block, "ug_in"), direction):
        loss_without, largest_without = _loss(model, anatomy, tokens)
    return Ablation(loss, loss_without, largest, largest_without)
