"""transformers' Trainer with states that are safe to keep.

:class:`Resumable` is a set of overrides, joined with a Trainer class of transformers or TRL when a run starts
(importing it takes seconds):

- what a killed run resumes from is written as safetensors and JSON, whole or not at all. Trainer itself writes
  pickles, which can run code when they are read.
- one row a step in ``steps.jsonl``, a progress bar, nothing printed.
- a loss or a gradient that is not finite stops the run before the step is taken, by an error that names it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from postlude.errors import NonFiniteError
from postlude.runs.atomic import atomic_directory, atomic_write, sync_directory
from postlude.runs.checksums import write_sums
from postlude.runs.progress import Progress
from postlude.tuning.libraries import import_library
from postlude.tuning.sharded import check_cut, is_sharded, local, put_local, trained_on
from postlude.tuning.states import (
    STEP,
    TRAINER,
    flatten,
    last_state,
    plain_schedule,
    random_states,
    restore,
    set_random_states,
)

if TYPE_CHECKING:
    from postlude.tuning.objective import TuneRun

__all__ = ["Resumable", "arguments", "autocasts", "joined", "only"]

LOG = "steps.jsonl"
_STATE, _TENSORS = "state.json", "tensors.safetensors"
_SECONDS_BETWEEN_STATES = 60.0
_STATES_PER_RUN = 20


def arguments(
    run: TuneRun,
    directory: Path,
    model: Any,
    steps: int,
    kind: type | None = None,
    **settings: Any,
) -> Any:
    """transformers' ``TrainingArguments`` for a run.

    Args:
        run: rate, schedule, accumulation, seed.
        directory: where the Trainer may write.
        model: what is trained; decides the device and whether autocast is on.
        steps: optimiser steps.
        kind: a subclass of ``TrainingArguments``, such as TRL's configurations.
        settings: more of them, or others.

    Raises:
        MissingDependencyError: accelerate is not installed.
    """
    import_library("accelerate", "tune needs accelerate")
    from transformers import TrainingArguments

    device = trained_on(model)
    schedule = {"constant": "constant_with_warmup"}.get(run.schedule, run.schedule)
    chosen = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": run.accumulate,
        "max_steps": steps,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": int(run.warmup * steps),
        "optim": "adamw_torch_fused" if device in ("cpu", "cuda") else "adamw_torch",
        "adam_beta2": 0.95,
        "weight_decay": run.weight_decay,
        "max_grad_norm": run.clip,
        "seed": run.seed,
        "use_cpu": device == "cpu",
        "bf16": autocasts(model),
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device == "cuda",
        "ddp_find_unused_parameters": False,
        **settings,
    }
    made = (kind or TrainingArguments)(**chosen)
    # One process drives one device: several are torchrun's business, not that of threads.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def autocasts(model: Any) -> bool:
    """Whether products are formed in bfloat16: on a device that is fast at it, where weights are kept in fp32."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    return bool(
        trained_on(model) == "cuda"
        and torch.cuda.is_bf16_supported()
        and trained == {torch.float32}
    )


def joined(*classes: type) -> type:
    """A Trainer class with overrides; the Trainer comes last."""
    return type(classes[-1].__name__, classes, {})


def only(items: list[Any]) -> Any:
    """The one item of a batch that is made already."""
    return items[0]


def _part(rank: int) -> str:
    """The file of what one rank holds."""
    return f"tensors-{rank:05d}.safetensors"


class Resumable:
    """Overrides of a Trainer; call :meth:`prepare` after it is made, then :meth:`run`.

    Attributes:
        rows: one for each step so far, also those before a kill.
        seconds: spent in steps so far, likewise.
    """

    # Of the Trainer that this is joined with.
    args: Any
    model: Any
    state: Any
    control: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    is_fsdp_enabled: Any
    is_world_process_zero: Any

    def prepare(
        self, directory: Path, progress: Progress | None = None, save_every: int | None = None
    ) -> None:
        """Set up what a run keeps.

        Args:
            directory: for states and the log; belongs to this run.
            progress: where to show a bar.
            save_every: steps from state to state; None for twenty a run, but not one a minute.
        """
        from transformers.trainer_callback import PrinterCallback

        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]
        self._directory = directory
        self._save_every = save_every
        self._progress = progress or Progress(show=False)
        self._task: Any = None
        self._saved = self._said = time.monotonic()
        self._tick = time.monotonic()
        self._saved_step = 0
        self._more: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        if self.is_world_process_zero():
            directory.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Train from the last state in the directory, or from the start.

        Raises:
            NonFiniteError: names the step; the state before it is in the directory.
        """
        state = last_state(self._directory)
        steps, done = self.args.max_steps, 0
        if state is not None:
            done = int(state.name.partition("-")[2])
            self._progress.log(f"resuming at step {done} of {steps}")
        self._read_log(done)
        self._saved_step = done
        with self._progress:
            self._task = self._progress.task("tune", steps, done)
            self._tick = time.monotonic()
            try:
                self.train(resume_from_checkpoint=None if state is None else str(state))  # type: ignore[attr-defined]
            finally:
                self._task.close()

    # ------------------------------------------------------------------------------------------- around a step

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The last thing before the first step: from here on it is steps that take time."""
        made = super().create_scheduler(*args, **kwargs)  # type: ignore[misc]
        check_cut(self.model)
        self._tick = time.monotonic()
        return made

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        step = self.state.global_step
        if not self.rows or self.rows[-1]["step"] < step:
            self._write_row(step)
        if self._due(step):
            self._save_checkpoint(self.model, None)
            self._tick = time.monotonic()

    def _row(self) -> dict[str, Any]:
        """What to log of the step just taken."""
        return {}

    def _pace(self, row: dict[str, Any]) -> str:
        """How fast the step just taken was, in words."""
        return ""

    def _write_row(self, step: int) -> None:
        now = time.monotonic()
        row = {"step": step, **self._row(), "seconds": round(now - self._tick, 6)}
        self._tick = now
        self.rows.append(row)
        pace = self._pace(row)
        self._task.rename(f"tune, {pace}" if pace else "tune")
        self._task.advance()
        if self.is_world_process_zero():
            with open(self._directory / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _read_log(self, steps: int) -> None:
        """Take up the log of a killed run at the state it resumes from."""
        file = self._directory / LOG
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.rows = [json.loads(line) for line in lines[:steps]]
        if self.is_world_process_zero():
            text = "".join(line + "\n" for line in lines[:steps])
            file.write_text(text, encoding="utf-8")

    def _due(self, step: int) -> bool:
        if step == self._saved_step or step == self.args.max_steps:
            return False
        if self._save_every is not None:
            return step % self._save_every == 0
        if step % max(1, self.args.max_steps // _STATES_PER_RUN):
            return False
        # Every rank has to decide alike.
        late = torch.tensor(float(time.monotonic() - self._saved >= _SECONDS_BETWEEN_STATES))
        if self.args.world_size > 1:
            from accelerate.utils import broadcast

            late = broadcast(late.to(self.args.device))
        return bool(late)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Take what the Trainer would print into the row of the step."""
        self._more.update(logs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it would walk over all parameters in every step."""
        return 0

    # ------------------------------------------------------------------------------------------------ the state

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write ``step-N``: trained parameters, optimizer, schedule, random states; drop the one before."""
        step = self.state.global_step
        randoms = random_states()
        gathered = [randoms]
        if self.args.world_size > 1:
            from accelerate.utils import gather_object

            gathered = gather_object([randoms])
        cut = is_sharded(self.model)
        if cut or self.is_world_process_zero():
            tensors: dict[str, Tensor] = {
                f"parameter.{name}": parameter.detach()
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
            about: dict[str, Any] = {"scheduler": plain_schedule(self.lr_scheduler.state_dict())}
            about["optimizer"] = flatten(self.optimizer.state_dict(), "optimizer", tensors)
            about["own"] = flatten(self._own_state(), "own", tensors)
            about["random"] = [
                flatten(one, f"random.{rank}", tensors) for rank, one in enumerate(gathered)
            ]
            kept = {
                name: local(tensor).cpu().contiguous().clone() for name, tensor in tensors.items()
            }
        if cut:
            self._keep_parts(step, kept)
        if self.is_world_process_zero():
            with open(self._directory / LOG, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())
            with atomic_directory(self._directory / f"step-{step}", overwrite=True) as directory:
                if cut:
                    for part in self._parts(step):
                        os.replace(part, directory / part.name.partition(".")[2])
                else:
                    save_file(kept, directory / _TENSORS)
                (directory / _STATE).write_text(json.dumps(about), encoding="utf-8")
                self.state.save_to_json(str(directory / TRAINER))
                write_sums(directory, "*")
            sync_directory(self._directory)
            for path in self._directory.glob("step-*"):
                if path.name != f"step-{step}" and STEP.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
        if cut:
            self.accelerator.wait_for_everyone()
        self._saved, self._saved_step = time.monotonic(), step

    def _keep_parts(self, step: int, kept: Mapping[str, Tensor]) -> None:
        """Write what this rank holds beside the states, and wait for the others to have done so."""
        with atomic_write(self._parts(step)[self.args.process_index]) as temporary:
            save_file(dict(kept), temporary)
        self.accelerator.wait_for_everyone()

    def _parts(self, step: int) -> list[Path]:
        return [
            self._directory / f"part-{step}.{_part(rank)}" for rank in range(self.args.world_size)
        ]

    def _stored(self, checkpoint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values of a state; of a model that is cut, this rank's."""
        name = _part(self.args.process_index) if is_sharded(self.model) else _TENSORS
        tensors = load_file(Path(checkpoint) / name)
        return tensors, json.loads((Path(checkpoint) / _STATE).read_text(encoding="utf-8"))

    def _own_state(self) -> dict[str, Any]:
        """What else a resumed run needs."""
        return {}

    def _take_own_state(self, state: dict[str, Any]) -> None:
        """Take it up again."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled and not is_sharded(self.model):
            return  # Trainer asks again once the model is cut
        stored, about = self._stored(resume_from_checkpoint)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    local(parameter).copy_(stored[f"parameter.{name}"])
        self._take_own_state(restore(about["own"], stored))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stored, about = self._stored(checkpoint)
        state = restore(about["optimizer"], stored)
        if is_sharded(self.model):
            groups = self.optimizer.param_groups
            state = put_local(state, [one for group in groups for one in group["params"]])
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(about["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stored, about = self._stored(checkpoint)
        set_random_states(restore(about["random"][self.args.process_index], stored))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: fp16 is not trained in."""

    def _refuse_not_finite(self, numbers: Mapping[str, float]) -> None:
        """Before a step that cannot be taken: keep the state, and say which.

        Raises:
            NonFiniteError: loss or gradient norm are not finite.
        """
        name = next(
            (one for one in ("loss", "gradient_norm") if not math.isfinite(numbers[one])), None
        )
        if name is None:
            return
        step = self.state.global_step + 1
        kept = "Nothing was learned before it."
        if step > 1:
            if self._saved_step != step - 1:
                self._save_checkpoint(self.model, None)
            kept = f"The state before it is kept in {self._directory / f'step-{step - 1}'}."
        raise NonFiniteError(
            f"Step {step} of {self.args.max_steps} has a {name.replace('_', ' ')} of {numbers[name]}. Expected finite "
            f"values: the learning rate ({self.args.learning_rate:g}) may be too high, or the model may compute in "
            f"float16. {kept}"
        )
