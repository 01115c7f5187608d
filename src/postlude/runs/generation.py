"""Continue a text token by token, and measure what that took.

The prompt is read in one pass (prefill), then every token in a pass of its own (decode). Keys and values of the
tokens so far are kept in a cache, packed where the model quantizes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from postlude.errors import DataError, NonFiniteError, SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.kernels import AUTO, Assignment, extra_bytes, use
from postlude.surgery.key_values import KeyValueQuantizer, fast_attention

__all__ = ["Generation", "generate"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A continuation and its cost.

    Attributes:
        text: the continuation, without the prompt.
        tokens: how many tokens it has; an end-of-text token is counted and not shown.
        prompt_tokens: tokens of the prompt.
        tokens_per_second: of decoding, the first token (which prefill gives) left out; None with one token.
        prefill_seconds: from the prompt to the first token.
        peak_bytes: most memory the process ever held, loading and libraries included; on an accelerator, of its
            memory.
        weight_bytes: parameters and buffers of the model, and what kernels keep beside them.
        kv_bytes_per_token: of the cache at the end, all layers together.
        kernels: layers by the kernels that computed them, for example ``{"int4pack / tiled": 28}`` (decode /
            prefill).
        seed: of sampling.
    """

    text: str
    tokens: int
    prompt_tokens: int
    tokens_per_second: float | None
    prefill_seconds: float
    peak_bytes: int
    weight_bytes: int
    kv_bytes_per_token: float
    kernels: dict[str, int]
    seed: int


def generate(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    kernel: str = AUTO,
    kv_recent: int = 0,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        checkpoint: float or quantized; as it was afterwards.
        prompt: text; the tokenizer adds what it puts before texts.
        max_new_tokens: where to stop if the model does not end the text.
        temperature: 0 takes the most probable token; 1 samples from the model's distribution.
        kernel: what computes quantized layers, see :func:`postlude.surgery.kernels.use`.
        kv_recent: tokens at the end of a quantized cache that stay in floating point.
        seed: of sampling.
        stream: called with every new piece of text.

    Raises:
        ArchitectureError: no language model.
        DataError: no tokenizer, or a prompt that gives no tokens.
        SettingsError: a number out of range, or more tokens than the model's context holds.
        NonFiniteError: the model gives no probabilities.
    """
    _check(max_new_tokens, temperature, kv_recent)
    context = checkpoint.context
    tokens = _prompt_tokens(checkpoint, prompt)
    total = len(tokens) + max_new_tokens
    if total > context:
        raise SettingsError(
            f"the prompt has {len(tokens)} tokens and {max_new_tokens} new ones make {total}, but the model's "
            f"context holds {context}. Ask for at most "
            f"{max(context - len(tokens), 0)} new tokens, or shorten the prompt."
        )
    model = checkpoint.model
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with (
        _recent_tokens(model, kv_recent),
        _kernels(model, kernel) as used,
        fast_attention(model),
        torch.inference_mode(),
    ):
        run = _Run(checkpoint, tokens, temperature, seed)
        text = _Text(checkpoint.tokenizer, tokens, stream)
        started = time.perf_counter()
        first = started
        for count in range(max_new_tokens):
            token = run.step()
            if count == 0:
                first = time.perf_counter()
            if token in run.ends:
                break
            text.push(token)
        ended = time.perf_counter()
        decoded = count
        return Generation(
            text=text.finish(),
            tokens=count + 1,
            prompt_tokens=len(tokens),
            tokens_per_second=decoded / (ended - first) if decoded else None,
            prefill_seconds=first - started,
            peak_bytes=_peak_bytes(model.device),
            weight_bytes=_weight_bytes(model) + extra_bytes(model),
            kv_bytes_per_token=_cache_bytes_per_token(run.cache),
            kernels=_count(used),
            seed=seed,
        )


def _check(max_new_tokens: int, temperature: float, kv_recent: int) -> None:
    if max_new_tokens < 1:
        raise SettingsError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise SettingsError(
            f"temperature is {temperature}; expected 0 (the most probable token) or a positive number"
        )
    if kv_recent < 0:
        raise SettingsError(f"kv_recent is {kv_recent}; expected 0 or more tokens")


def _prompt_tokens(checkpoint: Checkpoint, prompt: str) -> list[int]:
    if checkpoint.tokenizer is None:
        raise DataError(
            f"{checkpoint.path or 'this checkpoint'} has no tokenizer, so it cannot read a prompt; "
            "put its tokenizer files beside the weights"
        )
    tokens = [int(token) for token in checkpoint.tokenizer(prompt)["input_ids"]]
    if not tokens:
        raise DataError(
            "the prompt is empty, and this tokenizer puts nothing before a text: give the model a word to "
            "continue from"
        )
    return tokens


class _Run:
    """One sequence and its cache."""

    def __init__(
        self, checkpoint: Checkpoint, tokens: list[int], temperature: float, seed: int
    ) -> None:
        from transformers import DynamicCache

        self.model, self.temperature = checkpoint.model, temperature
        self.cache = DynamicCache(config=self.model.config)
        self.ends = _end_tokens(checkpoint)
        self._next = torch.tensor([tokens], device=self.model.device)
        self._generator = torch.Generator().manual_seed(seed)

    def step(self) -> int:
        """Read what is new, and choose the next token."""
        logits = self.model(
            input_ids=self._next, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]
        logits = logits.float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                "the model gives logits that are NaN or infinite, so there is no next token; try "
                "--dtype float32 (float16 overflows in many models), or check it with `postlude inspect`"
            )
        if self.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = torch.softmax(logits.double() / self.temperature, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._next = torch.tensor([[token]], device=self.model.device)
        return token


def _end_tokens(checkpoint: Checkpoint) -> set[int]:
    """Tokens after which the model's makers, or its tokenizer, stop."""
    settings = getattr(checkpoint.model, "generation_config", None)
    found: set[int] = set()
    for end in (
        getattr(settings, "eos_token_id", None),
        getattr(checkpoint.tokenizer, "eos_token_id", None),
    ):
        found.update(end if isinstance(end, list | tuple) else [] if end is None else [end])
    return found


class _Text:
    """Text of a growing list of tokens, handed on as soon as later tokens cannot change it.

    Decoded together with the tokens before, because a tokenizer may drop the space at the start of a text.
    """

    def __init__(
        self, tokenizer: Any, prompt: list[int], stream: Callable[[str], object] | None
    ) -> None:
        self._tokenizer, self._stream = tokenizer, stream
        self._tokens = list(prompt)
        self._shown = ""
        # Tokens before the first are not looked at again; those before the second are shown.
        self._first, self._second = 0, len(prompt)

    def _decode(self, tokens: list[int]) -> str:
        return cast(str, self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _news(self) -> str:
        before = self._decode(self._tokens[self._first : self._second])
        return self._decode(self._tokens[self._first :])[len(before) :]

    def push(self, token: int) -> None:
        """Show what one more token adds; wait while its last character is incomplete."""
        self._tokens.append(token)
        news = self._news()
        if news and not news.endswith("\ufffd"):
            self._show(news)
            self._first, self._second = self._second, len(self._tokens)

    def finish(self) -> str:
        """Show what is left, and return the whole text."""
        self._show(self._news())
        self._second = len(self._tokens)
        return self._shown

    def _show(self, piece: str) -> None:
        self._shown += piece
        if self._stream is not None and piece:
            self._stream(piece)


@contextlib.contextmanager
def _kernels(model: Any, name: str) -> Iterator[list[Assignment]]:
    """Run on kernels, and leave the model simulating as it was."""
    try:
        yield use(model, name)
    finally:
        use(model, "simulate")


@contextlib.contextmanager
def _recent_tokens(model: Any, recent: int) -> Iterator[None]:
    quantizers = [module for module in model.modules() if isinstance(module, KeyValueQuantizer)]
    if recent and not any(one.key or one.value for one in quantizers):
        raise SettingsError(
            f"kv_recent is {recent}, but the keys and values of this model are not quantized: leave it out"
        )
    before = [one.recent for one in quantizers]
    try:
        for one in quantizers:
            one.recent = recent
        yield
    finally:
        for one, old in zip(quantizers, before, strict=True):
            one.recent = old


def _count(used: list[Assignment]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in used:
        name = one.decode if one.decode == one.prefill else f"{one.decode} / {one.prefill}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _weight_bytes(model: Any) -> int:
    """Of parameters and buffers, each shared one once."""
    seen: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr() or id(tensor)] = tensor
    return sum(tensor.nbytes for tensor in seen.values())


def _cache_bytes_per_token(cache: Any) -> float:
    total = 0.0
    for layer in cache.layers:
        if hasattr(layer, "stored_bytes"):
            stored, tokens = layer.stored_bytes(), layer.stored_tokens()
        else:
            stored, tokens = layer.keys.nbytes + layer.values.nbytes, layer.keys.shape[-2]
        total += stored / tokens
    return total


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
