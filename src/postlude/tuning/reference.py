"""The frozen reference: a model that is run beside the one in training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from postlude.numerics.weighted_likelihood import Head
from postlude.surgery.head import LanguageHead
from postlude.tuning.batches import model_inputs

__all__ = ["Reference", "cast", "frozen"]


class Reference:
    """A frozen model run on the batches of training: in evaluation mode, without gradients.

    Args:
        model: what to call; for adapters the wrapped model, whose adapters are switched off meanwhile.
        head: of the model.
    """

    def __init__(self, model: Any, head: LanguageHead) -> None:
        self.model = model
        self.head = head
        self._adapters = hasattr(model, "peft_config")

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Head:
        """States ``[T, D]`` of the learned tokens of a batch of ``collate``, and the head."""
        device = self.head.weight.device
        inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
        training = self.model.training
        if training:
            self.model.eval()
        off = self.model.disable_adapter() if self._adapters else contextlib.nullcontext()
        try:
            with off:
                states = self.head.states(self.model, **inputs)
        finally:
            if training:
                self.model.train()
        rows = states.flatten(0, 1).index_select(0, batch["predictors"].to(device))
        bias = self.head.bias
        return Head(rows, self.head.weight.detach(), None if bias is None else bias.detach())


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Parameters in another type, in place. Buffers stay: frequencies of rotary embeddings must not be rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def frozen(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A model to be a reference: itself, or a copy in ``dtype``; on a CPU, which is slow in 16 bits, in fp32."""
    if dtype is None and model.device.type == "cpu" and model.dtype.itemsize == 2:
        dtype = torch.float32
    return model if dtype in (None, model.dtype) else cast(copy.deepcopy(model), dtype)
