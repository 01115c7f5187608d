"""Planted models, and what every registered quantizer makes of them; everything is made once and then read only."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import postlude as pl
from postlude.registry import MethodInfo
from postlude.runs.checkpoint import Checkpoint

from ..conftest import TEXT, make_tokenizer
from ..inspection.planted import TRIGGERS, planted

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
# No multiple of any group: ragged last groups everywhere.
INNER = 172
SAMPLES, LENGTH = 6, 24


# Settings of a family whose other members take the same steps: theirs are the slow tests.
LIKE_OTHERS = ("qera-approx", "qera-exact", "repquant", "dopq-vit")


def marked(info: MethodInfo) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a method's tests."""
    return (pytest.mark.slow,) if info.name in LIKE_OTHERS else ()


class Bench:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.tokenizer = make_tokenizer()
        # The character that is token TRIGGERS[0] makes the planted neuron explode.
        trigger = self.tokenizer.decode([TRIGGERS[0]])
        self.text = TEXT.replace("small", f"sm{trigger}ll").replace("the", f"th{trigger}") * 2
        ids = torch.randint(20, 190, (4, LENGTH), generator=torch.Generator().manual_seed(5))
        ids[::2, 9] = TRIGGERS[0]
        self.tokens = ids

    @functools.cache  # noqa: B019
    def model(self, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Checkpoint:
        """The float model."""
        checkpoint = planted(architecture, 0, self.tokenizer, INNER).checkpoint
        for parameter in checkpoint.model.parameters():  # as a model of that type is loaded
            parameter.data = parameter.data.to(dtype)
        return checkpoint

    def copy(self, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Checkpoint:
        original = self.model(architecture, dtype)
        return dataclasses.replace(original, model=copy.deepcopy(original.model))

    @functools.cache  # noqa: B019
    def logits(self, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Tensor:
        return self.logits_of(self.model(architecture, dtype))

    def logits_of(self, checkpoint: Checkpoint) -> Tensor:
        with torch.no_grad():
            return checkpoint.model(self.tokens, use_cache=False).logits

    def quantized(
        self,
        info: MethodInfo,
        architecture: str = "llama",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **changes: Any,
    ) -> Checkpoint:
        """By that method with some of its settings changed."""
        return self._quantized(info, architecture, dtype, seed, tuple(sorted(changes.items())))

    @functools.cache  # noqa: B019
    def _quantized(
        self,
        info: MethodInfo,
        architecture: str,
        dtype: torch.dtype,
        seed: int,
        changes: tuple[tuple[str, Any], ...],
    ) -> Checkpoint:
        return self.quantize_afresh(info, architecture, dtype, seed, **dict(changes))

    def quantize_afresh(
        self,
        info: MethodInfo,
        architecture: str = "llama",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        *,
        out: Path | None = None,
        run: Path | None = None,
        **changes: Any,
    ) -> Checkpoint:
        return pl.quantize(
            self.model(architecture, dtype),
            info.settings(**few(info), **changes),
            calibration=[self.text],
            samples=SAMPLES,
            length=LENGTH,
            seed=seed,
            out=out,
            run=run,
        )

    def saved(self, info: MethodInfo, *args: Any, **changes: Any) -> Path:
        """Directory of :meth:`quantized`."""
        checkpoint = self.quantized(info, *args, **changes)
        if checkpoint.path is None:
            checkpoint.save(self._directory / f"{len(list(self._directory.iterdir()))}")
        assert checkpoint.path is not None
        return checkpoint.path


def few(info: MethodInfo) -> dict[str, Any]:
    """Settings that make a fit by iterations short."""
    names = {field.name for field in dataclasses.fields(info.settings)}
    return {name: few for name, few in {"iterations": 3, "grid": 2}.items() if name in names}


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL divergence in nats at every position, ``[batch, length]``."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
