"""What an objective has to do, and what it is handed.

An objective is a frozen dataclass registered with ``@method("tune", NAME, family="objective")`` that extends
:class:`Objective`. It is handed a :class:`Job`, trains ``job.model`` in place and returns an :class:`Outcome`.
Everything around it is done by :func:`postlude.tuning.run.tune`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from postlude import registry
from postlude.errors import SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = ["Job", "Objective", "Outcome", "TuneRun"]

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class TuneRun:
    """How long, on how much at once and how fast.

    Defaults are those published for PriFT (arXiv:2606.09396) where it says something, but for the batch.

    Attributes:
        epochs: passes over the data; not looked at where ``steps`` is given.
        steps: optimiser steps.
        batch_size: sequences of one forward pass on one device.
        accumulate: forward passes of one optimiser step. The loss is a mean over the tokens of the whole step, on
            all devices, so only the product of batch size, accumulation and devices matters to it.
        learning_rate: highest.
        warmup: share of the steps in which the learning rate rises from 0.
        schedule: how it falls after: ``cosine``, ``linear`` or ``constant``.
        weight_decay: of AdamW, whose betas are 0.9 and 0.95.
        clip: largest norm of the gradient.
        max_length: longest sequence in tokens; None for the model's context, at most 2048. What is longer loses its
            end, which is counted and reported.
        packing: fill rows with several sequences, which do not see each other.
        seed: of the order of the data, of dropout and of new adapters.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-5
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int | None = None
    packing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise SettingsError(f"epochs is {self.epochs}; expected a number above 0")
        for name in ("steps", "batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; expected 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise SettingsError(
                f"learning_rate is {self.learning_rate}; expected 0 or more (0 changes nothing)"
            )
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"warmup is {self.warmup}; expected a share of the steps, 0 to 1")
        if self.schedule not in SCHEDULES:
            raise SettingsError(f"schedule is {self.schedule!r}; expected {', '.join(SCHEDULES)}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise SettingsError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if not self.clip > 0:
            raise SettingsError(f"clip is {self.clip}; expected a number above 0 (inf never clips)")
        if self.max_length is not None and self.max_length < 2:
            raise SettingsError(f"max_length is {self.max_length}; expected at least 2 tokens")


@dataclasses.dataclass(frozen=True)
class Job:
    """What an objective is given.

    Attributes:
        checkpoint: the model before tuning, its tokenizer and its anatomy.
        model: what to train, in place: a transformers model, or one of peft around it. Trainable parameters are in
            fp32, or in the type that was asked for.
        data: a .jsonl file.
        run: length, batch, rate, seed.
        reference: the frozen model; None where none was given. With adapters, ``model`` with its adapters off is
            the model before tuning.
        directory: where to keep what a killed run resumes from. It belongs to exactly this run.
        progress: where to show how far it is; None shows nothing.
        fingerprint: of the checkpoint as it was loaded.
        reference_fingerprint: of the reference that was given; None where none was.
    """

    checkpoint: Checkpoint
    model: Any
    data: Path
    run: TuneRun
    reference: Checkpoint | None
    directory: Path
    progress: Progress | None = None
    fingerprint: str = ""
    reference_fingerprint: str | None = None

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained rather than the weights."""
        return hasattr(self.model, "peft_config")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an objective hands back.

    Attributes:
        result: numbers for the caller, ``loss`` among them.
        log: one row for every optimiser step: ``step``, ``loss``, ``learning_rate`` and whatever else it measured.
    """

    result: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]


class Objective(abc.ABC):
    """What is minimised or maximised.

    Attributes:
        hears: whether lines may name recordings (``audio``), for audio language models.
    """

    hears: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model is run beside the one in training; without adapters a copy is then kept of it."""
        return False

    def describe(self) -> dict[str, Any]:
        """Everything of it that decides the result, as plain values."""
        settings = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"objective": registry.info_of(self).name, **settings}

    def check(self, job: Job) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse, before anything is computed, what cannot be done."""

    @abc.abstractmethod
    def train(self, job: Job) -> Outcome:
        """Train ``job.model`` in place."""
