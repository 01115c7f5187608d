"""Many answers to each of some prompts, and the probabilities of their tokens.

A prompt is read once, however many answers it gets: keys and values of its tokens (and of what an encoder put among
them) are repeated for the answers. That holds when answers are sampled and when gradients are taken, so a recording is
encoded once for a group, and the results are those of reading every answer with its prompt (tested).

Prompts of different lengths are padded on the left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from postlude.errors import NonFiniteError

__all__ = ["Answers", "Prefix", "log_probabilities", "read_prompts", "sample_answers"]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prompts that were read.

    Attributes:
        cache: keys and values of their tokens.
        mask: ``int64 [N, P]``: 1 for tokens, 0 for padding on the left.
        logits: ``[N, V]`` of what follows.
    """

    cache: Any
    mask: Tensor
    logits: Tensor

    def repeated(self, times: int) -> Prefix:
        """Each prompt ``times`` times, one after the other; this one is used up."""
        self.cache.batch_repeat_interleave(times)
        return Prefix(
            self.cache,
            self.mask.repeat_interleave(times, 0),
            self.logits.repeat_interleave(times, 0),
        )


@dataclasses.dataclass(frozen=True)
class Answers:
    """Sampled tokens.

    Attributes:
        tokens: ``int64 [N, T]``.
        mask: ``bool [N, T]``: the answer with the token that ends it; what is behind that is padding.
        ended: ``bool [N]``: whether it was ended rather than cut off.
    """

    tokens: Tensor
    mask: Tensor
    ended: Tensor

    def ids(self) -> list[list[int]]:
        """The tokens of each answer, the last one included."""
        return [
            row[keep].tolist() for row, keep in zip(self.tokens.cpu(), self.mask.cpu(), strict=True)
        ]


def read_prompts(model: Any, inputs: Mapping[str, Tensor]) -> Prefix:
    """Read prompts in one pass.

    Args:
        model: a causal language model of transformers, audio language models among them, wrapped or not.
        inputs: of its forward: ``input_ids`` ``[N, P]`` and ``attention_mask`` padded on the left, features.
    """
    from transformers import DynamicCache

    mask = inputs["attention_mask"]
    output = model(
        **inputs,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=DynamicCache(),
        use_cache=True,
    )
    return Prefix(output.past_key_values, mask, output.logits[:, -1])


@torch.no_grad()
def sample_answers(
    model: Any,
    prefix: Prefix,
    ends: Collection[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Answers:
    """One answer to each prompt; ask for several by repeating the prefix, which is used up.

    Args:
        model: that read the prompts.
        prefix: of them.
        ends: tokens that end an answer.
        max_new_tokens: where answers are cut off.
        temperature: 0 takes the most probable token; 1 samples from the model's distribution.
        generator: of random numbers, on the CPU; results do not depend on the device's own.

    Raises:
        NonFiniteError: the model gives no probabilities.
    """
    device = prefix.mask.device
    logits, mask = prefix.logits, prefix.mask
    stops = torch.tensor(sorted(ends), device=device)
    ended = torch.zeros(len(mask), dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    kept: list[Tensor] = []
    for _ in range(max_new_tokens):
        token = _choose(logits, temperature, generator)
        tokens.append(token)
        kept.append(~ended)
        ended = ended | torch.isin(token, stops)
        if bool(ended.all()) or len(tokens) == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=prefix.cache,
            use_cache=True,
        ).logits[:, -1]
    return Answers(torch.stack(tokens, 1), torch.stack(kept, 1), ended)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise NonFiniteError(
            "the model gives logits that are NaN or infinite, so there is no next token; load it in float32"
        )
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / temperature, -1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


def log_probabilities(
    model: Any, prefix: Prefix, answers: Answers, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What a model gives each token of answers, and how undecided it was.

    Args:
        model: that read the prompts.
        prefix: of them, one for each answer; used up.
        answers: from any model.
        temperature: that logits are divided by.

    Returns:
        Log-probabilities ``[N, T]``, with gradients where the model and the prefix have them, and entropies ``[N, T]``
        in nats, without.
    """
    tokens = answers.tokens
    mask = torch.cat([prefix.mask, answers.mask.to(prefix.mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    later = model(
        input_ids=tokens[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, prefix.mask.shape[1] : -1],
        past_key_values=prefix.cache,
        use_cache=True,
    ).logits
    logits = torch.cat([prefix.logits[:, None], later], 1).float() / temperature
    every = torch.log_softmax(logits, -1)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
    return every.gather(-1, tokens[:, :, None]).squeeze(-1), entropy
