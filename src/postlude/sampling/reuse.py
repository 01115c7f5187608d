"""Feature reuse: the blocks of a denoiser run at every n-th step of a sampler, and in between add what they added then.

Neighbouring steps see nearly the same image, so what all blocks together add to the tokens changes slowly::

    out = in + (blocks(in) - in)            at steps 0, n, 2n, ...; the bracket is kept
    out = in + what was kept                at all others

The embedding of the patches and the last layer, which know the timestep, run at every step. This caches the residual of
the whole trunk, the simplest member of a family that also caches single layers (FORA, arXiv:2407.01425) or some blocks
(Delta-DiT, arXiv:2406.01125). Cost: one tensor of the tokens for every pass of a step (two with guidance).

A sampler that asks twice at one timestep, as guidance does, has its passes kept apart by their order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from postlude.errors import ArchitectureError, SettingsError
from postlude.surgery.anatomy import Anatomy

__all__ = ["BlockReuse", "check_reuse"]


def check_reuse(every: int) -> None:
    """Refuse a number of steps that cannot be.

    Raises:
        SettingsError: below 1.
    """
    if every < 1:
        raise SettingsError(
            f"reuse is {every}; expected 1 (blocks run at every step) or more, as in 2: at every second one"
        )


class BlockReuse:
    """What the blocks of a model added last, and when they run next.

    Args:
        anatomy: of the model.
        every: at which steps the blocks run; 1 for all of them.
    """

    def __init__(self, anatomy: Anatomy, every: int) -> None:
        check_reuse(every)
        self._names = [block.name for block in anatomy.blocks]
        self.every = every
        self._step = self._pass = 0
        self._timestep: float | None = None
        self._kept: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def step(self, model: nn.Module, timestep: Tensor) -> Iterator[None]:
        """Within this context the model is called once, at a timestep of one number.

        A timestep above the last one begins another path through the sampler.

        Raises:
            ArchitectureError: blocks that hand on more than one tensor.
        """
        self._advance(float(timestep.flatten()[0]))
        if self.every == 1:
            yield
            return
        blocks = [model.get_submodule(name) for name in self._names]
        entered: list[Tensor] = []
        kept = self._kept.get(self._pass) if self._step % self.every else None

        def enter(_: nn.Module, args: tuple[Any, ...], names: dict[str, Any]) -> None:
            entered.append(args[0] if args else names["hidden_states"])

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.shape != entered[0].shape:
                raise ArchitectureError(
                    f"the blocks of {type(model).__name__} hand on {type(output).__name__}; reuse knows blocks that "
                    "take and return the tokens alone. Sample without it."
                )
            self._kept[self._pass] = (output - entered[0]).detach()

        with contextlib.ExitStack() as stack:
            if kept is None:
                for handle in (
                    blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
                    blocks[-1].register_forward_hook(leave),
                ):
                    stack.callback(handle.remove)
            else:
                # An attribute of the instance goes before the method of its class.
                for block in blocks:
                    block.forward = functools.partial(_add, kept if block is blocks[0] else None)
                    stack.callback(block.__dict__.pop, "forward")
            yield

    def _advance(self, timestep: float) -> None:
        if self._timestep is None or timestep > self._timestep:
            self._step = self._pass = 0
            self._kept = {}
        elif timestep < self._timestep:
            self._step, self._pass = self._step + 1, 0
        else:
            self._pass += 1
        self._timestep = timestep


def _add(kept: Tensor | None, tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of a block: the first one adds what all of them added, the others hand on."""
    return tokens if kept is None else tokens + kept
