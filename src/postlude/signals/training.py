"""The loop that fits a network: Adam, a schedule of its rate, chunks that are kept, so a killed run resumes.

What is fitted says how: a function that draws from a generator and returns a loss. The picture, the radiance field and
the learned rounding of weights all go through here.

A chunk of steps is a unit of work. It starts from tensors and hands tensors on: parameters and both moments of Adam,
and where the plateau schedule stands. Random numbers come from the seed and the chunk's number, so no generator
has to be kept, and a run that resumes takes the same steps with the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from postlude.errors import SettingsError, UnknownNameError
from postlude.runs.progress import Progress

__all__ = ["Training", "Unit", "generator", "optimise"]

Unit = Callable[[str, Callable[[], Mapping[str, Tensor]]], dict[str, Tensor]]
Loss = Callable[[int, torch.Generator], Tensor]


@dataclasses.dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: of Adam.
        learning_rate: at the start.
        batch: points of a step; a picture of fewer pixels is taken whole.
        schedule: ``cosine`` falls to a fiftieth by the last step (our choice, for runs of a fixed length);
            ``plateau`` halves when the loss of a batch was no better for 100 steps, down to 1e-5
            (arXiv:2602.16337).
        chunk: steps between two states on the disk.
    """

    steps: int = 2000
    learning_rate: float = 1e-3
    batch: int = 16384
    schedule: Literal["cosine", "plateau"] = "cosine"
    chunk: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise SettingsError(
                f"learning rate is {self.learning_rate}; expected a positive number, such as 1e-3"
            )
        if self.schedule not in _SCHEDULES:
            raise UnknownNameError("schedule", self.schedule, _SCHEDULES)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one named random choice, independent of the order in which choices are made."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


def optimise(
    module: nn.Module,
    loss: Loss,
    training: Training,
    *,
    seed: int = 0,
    unit: Unit | None = None,
    progress: Progress | None = None,
    name: str = "fit",
    watch: Callable[[], str] | None = None,
) -> list[float]:
    """Lower a loss over the parameters of a module, in place.

    Args:
        module: its parameters that require a gradient are trained.
        loss: of a step, given its number and a generator to draw from.
        training: steps, rate, schedule.
        seed: of what the loss draws.
        unit: keeps finished chunks, see :meth:`postlude.runs.directory.RunDirectory.unit`.
        progress: where to show it.
        name: of the units, and shown.
        watch: a few words on the state of things, shown after every chunk.

    Returns:
        The loss of every step.

    Raises:
        SettingsError: the loss is not finite.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    state = _start(parameters)
    losses: list[float] = []
    with progress or Progress(show=False) as shown:
        task = shown.task(name, training.steps)
        for first in range(0, training.steps, training.chunk):
            last = min(first + training.chunk, training.steps)

            def compute(
                first: int = first, last: int = last, state: Mapping[str, Tensor] = state
            ) -> Mapping[str, Tensor]:
                draw = generator(seed, f"{name} {first}")
                return _chunk(
                    parameters, state, loss, training, range(first, last), draw, task.advance
                )

            before = task.done
            state = unit(f"{name}-{last:07d}", compute) if unit else dict(compute())
            if task.done == before:  # it was there
                task.advance(last - first)
            losses += state.pop("losses").tolist()
            with torch.no_grad():
                for index, parameter in enumerate(parameters):
                    parameter.copy_(state[f"{index}.value"])
            if watch is not None and (last == training.steps or first % (4 * training.chunk) == 0):
                shown.log(f"{name}: step {last}, {watch()}")
        task.close()
    return losses


def _start(parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    state = {"plateau": torch.tensor([1.0, math.inf, 0.0], dtype=torch.float64)}
    for index, parameter in enumerate(parameters):
        state[f"{index}.value"] = parameter.detach().clone()
        state[f"{index}.first"] = torch.zeros_like(parameter)
        state[f"{index}.second"] = torch.zeros_like(parameter)
    return state


def _chunk(
    parameters: list[nn.Parameter],
    state: Mapping[str, Tensor],
    loss: Loss,
    training: Training,
    steps: range,
    draw: torch.Generator,
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    """Some steps of Adam, from a state to the next."""
    optimizer = torch.optim.Adam(parameters, lr=training.learning_rate)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(state[f"{index}.value"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps.start)),
                "exp_avg": state[f"{index}.first"].to(parameter.device, copy=True),
                "exp_avg_sq": state[f"{index}.second"].to(parameter.device, copy=True),
            }
    plateau = state["plateau"].clone()
    losses = torch.empty(len(steps), dtype=torch.float64)
    for place, step in enumerate(steps):
        factor = _SCHEDULES[training.schedule](step, training, plateau)
        optimizer.param_groups[0]["lr"] = factor
        optimizer.zero_grad(set_to_none=True)
        value = loss(step, draw)
        value.backward()
        optimizer.step()
        losses[place] = found = value.item()
        if not math.isfinite(found):
            raise SettingsError(
                f"the loss is {found} at step {step + 1}: the learning rate {training.learning_rate:g} is too "
                "high for this network; give a smaller one."
            )
        _observe(plateau, found)
        advance()
    after = {"plateau": plateau, "losses": losses}
    for index, parameter in enumerate(parameters):
        moments = optimizer.state[parameter]
        after[f"{index}.value"] = parameter.detach().clone()
        after[f"{index}.first"], after[f"{index}.second"] = (
            moments["exp_avg"],
            moments["exp_avg_sq"],
        )
    return after


def _cosine(step: int, training: Training, plateau: Tensor) -> float:
    share = step / max(training.steps - 1, 1)
    return training.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def _plateau(step: int, training: Training, plateau: Tensor) -> float:
    return max(training.learning_rate * float(plateau[0]), 1e-5)


_SCHEDULES: dict[str, Callable[[int, Training, Tensor], float]] = {
    "cosine": _cosine,
    "plateau": _plateau,
}
_PATIENCE = 100


def _observe(plateau: Tensor, loss: float) -> None:
    """Count as PyTorch's ``ReduceLROnPlateau`` does: factor 0.5, relative threshold 1e-4."""
    if loss < plateau[1] * (1 - 1e-4):
        plateau[1], plateau[2] = loss, 0
        return
    plateau[2] += 1
    if plateau[2] > _PATIENCE:
        plateau[0], plateau[2] = plateau[0] / 2, 0
