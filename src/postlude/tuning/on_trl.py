"""What the objectives that run on TRL share: its silence, the numbers of a step, and model and tokenizer left as found.

TRL trains; nothing of its loop is written again. What it does beside that is turned off or undone: it reports its use
to a server, logs, and leaves a padding token in the tokenizer and the configuration, no dropout and another forward in
the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError
from postlude.runs.quiet import quiet_transformers
from postlude.tuning.libraries import import_library
from postlude.tuning.states import seeded
from postlude.tuning.trainer import Resumable

if TYPE_CHECKING:
    from postlude.tuning.objective import Job

__all__ = [
    "NoReference",
    "OnTRL",
    "check_job",
    "import_trl",
    "keep_activations",
    "length_limit",
    "mean",
    "training",
    "unpatch",
]


def import_trl() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it, or what it needs, is not installed.
    """
    what = "This objective runs on TRL"
    import_library("datasets", what)
    return import_library("trl", what)


def check_job(job: Job, name: str) -> None:
    """What no objective on TRL can do without.

    Raises:
        DataError: no tokenizer, or one that has no token to end a text with.
        SettingsError: packed rows.
    """
    tokenizer = job.checkpoint.tokenizer
    if tokenizer is None:
        raise DataError(
            f"{name} needs a tokenizer, and the checkpoint has none: put its tokenizer files beside the weights."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{name} needs a token that ends a text, and the tokenizer has no eos_token: set one in its "
            "tokenizer_config.json."
        )
    if job.run.packing:
        raise SettingsError(f"{name} does not pack rows: leave packing out.")


def length_limit(job: Job) -> int:
    """Longest sequence of a run in tokens."""
    context = job.checkpoint.context
    return min(2048, context) if job.run.max_length is None else min(job.run.max_length, context)


def keep_activations(config: type) -> dict[str, bool]:
    """TRL drops activations and computes them again unless told not to; the setting was renamed in transformers."""
    names = {field.name for field in dataclasses.fields(config)}
    new = "activation_checkpointing"
    return {new if new in names else "gradient_checkpointing": False}


@contextlib.contextmanager
def training(job: Job) -> Iterator[None]:
    """Seeded and quiet; afterwards model and tokenizer are as they were, but for the weights."""
    import datasets

    model, tokenizer = job.model, job.checkpoint.tokenizer
    inner = model.get_base_model() if job.adapters else model
    pad, side = tokenizer.pad_token, tokenizer.padding_side
    config, generation = inner.config, inner.generation_config
    pads = config.pad_token_id, generation.pad_token_id
    dropouts = [one for one in model.modules() if isinstance(one, torch.nn.Dropout)]
    shares = [one.p for one in dropouts]
    bars = datasets.is_progress_bar_enabled()
    logger = logging.getLogger("trl")
    level = logger.level
    datasets.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers(), seeded(job.run.seed), warnings.catch_warnings():
            # TRL and peft ask a transformers model by names of before.
            warnings.filterwarnings(
                "ignore", r"`\w+` is deprecated and will be removed", FutureWarning
            )
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bar()
        tokenizer.pad_token, tokenizer.padding_side = pad, side
        config.pad_token_id, generation.pad_token_id = pads
        for one, share in zip(dropouts, shares, strict=True):
            one.p = share
        unpatch(inner)
        model.eval()


def unpatch(model: Any) -> None:
    """Give a model its own forward back."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def mean(rows: Sequence[Mapping[str, Any]], name: str, last: int = 0) -> float | None:
    """Mean of a column over the rows that have it, or over the last few of them; None where none has."""
    values = [row[name] for row in rows if name in row][-last:]
    return sum(values) / len(values) if values else None


class OnTRL(Resumable):
    """Overrides for a trainer of TRL.

    Attributes:
        names: what TRL calls a number of a step, and what it is called in the log; others are left out.
    """

    names: ClassVar[Mapping[str, str]] = {}

    # Of the trainer that this is joined with.
    _metrics: Any

    _loss: Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch; its share of the loss of the step is kept."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._loss = loss if self._loss is None else self._loss + loss
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        found = math.nan if self._loss is None else self._loss.detach().double()
        loss = self.accelerator.gather(torch.as_tensor(found, device=self.args.device)).mean()
        self._loss = None
        self._numbers = {
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "loss": float(loss),
            "gradient_norm": float(norm),
        }
        self._refuse_not_finite(self._numbers)
        return norm

    def _row(self) -> dict[str, Any]:
        metrics, row = self._metrics["train"], dict(self._numbers)
        for theirs, ours in self.names.items():
            if metrics.get(theirs):
                row[ours] = sum(metrics[theirs]) / len(metrics[theirs])
        metrics.clear()
        return row

    def _send_telemetry(self) -> None:
        """Nothing is sent."""


class NoReference(torch.nn.Module):
    """Stands where TRL would make a reference model, or an adapter of that name.

    TRL's adapter is initialised like the trained one before it is overwritten, which for some kinds of
    initialisation changes the weights below both.

    Args:
        config: of the model that is trained.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
