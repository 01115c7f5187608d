"""Jobs for the objectives that run on TRL."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import anatomy_of
from postlude.tuning.objective import Job, TuneRun

CHAT = (
    "{% for message in messages %}{{ '<' + message['role'][0] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def with_lora(model: Any, **settings: Any) -> Any:
    import peft

    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(0)
        # peft asks a transformers model by an old name.
        warnings.filterwarnings(
            "ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        return peft.get_peft_model(model, config)


def make_job(
    model: Any,
    tokenizer: Any,
    data: Path,
    *,
    reference: Any = None,
    lora: bool = False,
    directory: str = "run",
    **run: Any,
) -> Job:
    """A job on a copy of a model; ``lora`` puts an adapter around it."""
    own = copy.deepcopy(model)
    checkpoint = Checkpoint(own, copy.deepcopy(tokenizer), anatomy_of(own))
    given = {"batch_size": 2, "learning_rate": 1e-2, "warmup": 0.0, **run}
    return Job(
        checkpoint=checkpoint,
        model=with_lora(own) if lora else own,
        data=data,
        run=TuneRun(**given),
        reference=None if reference is None else Checkpoint(reference, tokenizer, anatomy_of(own)),
        directory=data.parent / directory,
    )


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """The run after this dies once ``step`` is done, with a state of every step; call to let runs live again."""
    from postlude.tuning.trainer import Resumable

    monkeypatch.setattr("postlude.tuning.trainer._SECONDS_BETWEEN_STATES", 0.0)
    write = Resumable._write_row
    alive = False

    def dies(self: Any, at: int) -> None:
        if at == step and not alive:
            raise KeyboardInterrupt
        write(self, at)

    monkeypatch.setattr(Resumable, "_write_row", dies)

    def revive() -> None:
        nonlocal alive
        alive = True

    return revive
