"""The states that a language-model head reads, without the logits that it would make of them.

The model is called as a whole, through whatever wraps it (adapters, data-parallel hooks, autocast), while its head
hands on what it is given. So logits, usually the largest tensor of a forward pass, are never formed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from postlude.errors import ArchitectureError
from postlude.surgery.anatomy import AudioAnatomy, LanguageAnatomy
from postlude.surgery.shared_encoder import encode_once

__all__ = ["LanguageHead"]

_PROBE_TOKENS = 16


class LanguageHead:
    """The head of a model, and the states that it reads.

    Args:
        model: a transformers causal language model.
        anatomy: of it.

    Raises:
        ArchitectureError: the head is no plain linear layer.
    """

    def __init__(self, model: nn.Module, anatomy: LanguageAnatomy) -> None:
        head = model.get_submodule(anatomy.head)
        if (
            not isinstance(getattr(head, "weight", None), nn.Parameter)
            or type(head) is not nn.Linear
        ):
            raise ArchitectureError(
                f"The head {anatomy.head} is a {type(head).__name__}; expected a plain linear layer. Leave the head "
                "out of adapters and quantization."
            )
        self.model = model
        self.anatomy = anatomy
        self.module: nn.Linear = head

    @property
    def weight(self) -> Tensor:
        """``[V, D]``."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """``[V]``, or None."""
        return self.module.bias

    def states(
        self, caller: Any = None, *, recordings: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """``[rows, length, D]``: what the head reads.

        Args:
            caller: what to call instead of the model: a wrapper around it.
            recordings: of an audio language model, which rows of its features are equal, see ``encode_once``.
            inputs: of the model's forward.
        """
        shared = contextlib.nullcontext()
        if recordings is not None and isinstance(self.anatomy, AudioAnatomy):
            shared = encode_once(self.model, self.anatomy, recordings)  # type: ignore[assignment]
            inputs = {
                name: value.to(self.weight.dtype) if value.is_floating_point() else value
                for name, value in inputs.items()
            }
        with self._off(), shared:
            output = (self.model if caller is None else caller)(**inputs, use_cache=False)
        states: Tensor = output.logits
        return states

    @torch.no_grad()
    def check(self, ids: Tensor) -> None:
        """See on some tokens ``[length]`` that the model's logits are its head applied to these states.

        Raises:
            ArchitectureError: they are not; some architectures scale or cap them.
        """
        training = self.model.training
        self.model.eval()
        try:
            rows = ids[None, :_PROBE_TOKENS].to(self.weight.device)
            logits = self.model(input_ids=rows, use_cache=False).logits.float()
            plain = functional.linear(self.states(input_ids=rows), self.weight, self.bias).float()
        finally:
            self.model.train(training)
        difference = (logits - plain).abs()
        scale = logits.nan_to_num().abs().max()
        if bool((difference > 1e-3 * scale).any()):
            raise ArchitectureError(
                f"The logits of this {type(self.model).__name__} are not its head applied to its last hidden states "
                f"(they differ by {float(difference.max()):.3g}): it scales or caps them, which is not supported here."
            )

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        # An attribute of the instance goes before the method of its class.
        self.module.forward = _identity  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del self.module.forward


def _identity(states: Tensor) -> Tensor:
    return states
