"""Run batches through a model and look at what passes.

:func:`observe` runs the whole model and hands every asked-for site input to an observer.
:class:`BlockWalk` keeps the hidden states of all calibration batches before one block, so that a block can be
observed, changed and then left behind: one block's activations are resident at a time.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postlude.surgery.anatomy import Anatomy, Block, LanguageBlock
from postlude.surgery.batches import (
    TOKENS_PER_BATCH,
    Batch,
    Calibration,
    copied_to_cpu,
    placed_on,
    token_batches,
)
from postlude.surgery.layers import hold_dense

__all__ = ["BlockWalk", "ForwardStopped", "Observer", "observe", "recorded_inputs", "streams_of"]

Observer = Callable[[Tensor], None]


class ForwardStopped(Exception):
    """Raised by a hook when nothing after it is needed."""


def streams_of(block: Block, output: Any) -> tuple[Tensor, ...]:
    """The residual streams that a block returned, in the order of ``block.streams``."""
    if len(block.streams) == 1:
        return (output[0] if isinstance(output, tuple) else output,)
    return tuple(output)


def _main(block: Block, streams: tuple[Tensor, ...]) -> Tensor:
    """The stream of the thing itself (tokens, patches), beside those of a text that conditions it."""
    return streams[block.streams.index("hidden_states")]


@contextlib.contextmanager
def _site_hooks(
    model: nn.Module,
    sites: Iterable[tuple[str, Observer]],
    *,
    stop: bool = False,
) -> Iterator[None]:
    """Call observers with the input of modules; with ``stop``, raise :class:`ForwardStopped` after the last one."""
    given = list(sites)
    with contextlib.ExitStack() as hooks:
        for number, (path, observer) in enumerate(given):
            last = stop and number == len(given) - 1

            def hook(
                _: nn.Module,
                args: tuple[Any, ...],
                observer: Observer = observer,
                last: bool = last,
            ) -> None:
                observer(args[0])
                if last:
                    raise ForwardStopped

            hooks.enter_context(model.get_submodule(path).register_forward_pre_hook(hook))
        yield


@torch.no_grad()
def observe(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Tensor | Batch],
    observers: Mapping[tuple[int, str], Observer],
    *,
    residual: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Run the model without its head and show its inner tensors to observers.

    Args:
        model: a model of transformers or diffusers.
        anatomy: of that model.
        batches: keyword arguments of its forward, or token ids ``[batch, length]`` without padding.
        observers: by ``(block index, site name)``; called with ``[batch, length, width]`` (``[batch, width]``
            where a site reads the condition).
        residual: called with ``(index, [batch, length, hidden_size])``: index -1 is the stream before the
            first block, index ``i`` the output of block ``i``, before any norm.
    """
    wanted = [
        (anatomy.blocks[index].site(name).modules[0], observer)
        for (index, name), observer in observers.items()
    ]
    with _site_hooks(model, wanted), contextlib.ExitStack() as hooks:
        if residual is not None:
            look = residual  # bound here, so that the hooks below see a callable

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                look(-1, args[0] if args else kwargs["hidden_states"])

            first = model.get_submodule(anatomy.blocks[0].name)
            hooks.enter_context(first.register_forward_pre_hook(before, with_kwargs=True))
            for block in anatomy.blocks:

                def after(_: nn.Module, __: Any, output: Any, block: Block = block) -> None:
                    look(block.index, _main(block, streams_of(block, output)))

                module = model.get_submodule(block.name)
                hooks.enter_context(module.register_forward_hook(after))
        for batch in batches:
            anatomy.forward(model, placed_on(batch, model))


@contextlib.contextmanager
def recorded_inputs(model: nn.Module, look: Callable[[Batch], None]) -> Iterator[None]:
    """Show what a model is called with: keyword arguments of its ``forward``, tensors on the CPU.

    ``return_dict`` and arguments that are None are left out, so that the batch can be given to the model again.
    """
    names = list(inspect.signature(model.forward).parameters)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop("return_dict", None)
        look(copied_to_cpu({name: value for name, value in given.items() if value is not None}))

    with model.register_forward_pre_hook(hook, with_kwargs=True):
        yield


class _Call:
    """How a block was called: everything but its residual streams, and where those belong."""

    def __init__(
        self, module: nn.Module, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._places: list[int | str] = [
            name if name in kwargs else names.index(name) for name in block.streams
        ]
        self._args, self._kwargs = list(args), dict(kwargs)
        self.streams: tuple[Tensor, ...] = tuple(self._take(place) for place in self._places)

    def _take(self, place: int | str) -> Any:
        held: Any = self._args if isinstance(place, int) else self._kwargs
        value, held[place] = held[place], None
        return value

    def withstreams_of(self, streams: tuple[Tensor, ...]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the block for these streams."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for place, stream in zip(self._places, streams, strict=True):
            held: Any = args if isinstance(place, int) else kwargs
            held[place] = stream
        return args, kwargs


class BlockWalk:
    """Hidden states of calibration batches, moved through a model one block at a time.

    The walk starts before block 0. ``observe`` runs the current block as it is now; ``advance`` runs it a last
    time and moves on. Whatever the caller did to the block in between is what the next block sees.

    Args:
        model: a model of transformers or diffusers.
        anatomy: of that model.
        calibration: batches, or tokens ``[sequences, length]``.
        tokens_per_batch: tokens in one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        calibration: Calibration,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        self._model = model
        tokens = isinstance(calibration, Tensor)
        batches: Iterable[Tensor | Batch] = (
            token_batches(calibration, tokens_per_batch)
            if isinstance(calibration, Tensor)
            else calibration
        )
        # A block's other arguments (masks, positions) depend on a batch of tokens only through its number of rows;
        # a condition is of its batch alone.
        self._keys: list[int] = []
        self._calls: dict[tuple[int, int], _Call] = {}
        self._states: list[tuple[Tensor, ...]] = []
        with torch.no_grad(), self._recording(anatomy):
            for number, batch in enumerate(batches):
                self._keys.append(len(batch) if tokens else number)
                anatomy.forward(model, placed_on(batch, model))
        # What the current block's output projection reads, batch by batch, once that is final.
        self._mixed: list[Tensor] | None = None

    @contextlib.contextmanager
    def _recording(self, anatomy: Anatomy) -> Iterator[None]:
        """Blocks that pass their input on and write down what else they were called with."""
        blocks = [(block, self._model.get_submodule(block.name)) for block in anatomy.blocks]
        for block, module in blocks:

            def record(
                *args: Any, _block: Block = block, _module: nn.Module = module, **kwargs: Any
            ) -> Any:
                call = _Call(_module, _block, args, kwargs)
                streams, call.streams = call.streams, ()
                self._calls[_block.index, self._keys[-1]] = call
                if _block.index == 0:
                    self._states.append(streams)
                return streams if len(streams) > 1 else streams[0]

            module.forward = record
        try:
            yield
        finally:
            for _, module in blocks:
                del module.forward  # the class's own method again

    def call(self, block: Block, index: int) -> tuple[Tensor, ...]:
        """Streams that the current block gives for one batch; its attention is replayed if it was frozen."""
        args, kwargs = self._calls[block.index, self._keys[index]].withstreams_of(
            self._states[index]
        )
        with self._replaying(block, index):
            return streams_of(block, self._model.get_submodule(block.name)(*args, **kwargs))

    @contextlib.contextmanager
    def _replaying(self, block: Block, index: int) -> Iterator[None]:
        if self._mixed is None or not isinstance(block, LanguageBlock):
            yield
            return
        attention = self._model.get_submodule(block.attention)
        project = self._model.get_submodule(block.linear("output").module)
        mixed = self._mixed[index]
        # Attention modules return their output and its weights, which nobody reads here.
        attention.forward = lambda *_, **__: (project(mixed), None)
        try:
            yield
        finally:
            del attention.forward

    @torch.no_grad()
    def observe(
        self,
        block: Block,
        observers: Mapping[str, Observer],
        *,
        freeze_attention: bool = False,
        before: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Run the block and show site inputs to observers, stopping after the last one.

        Args:
            block: the current one.
            observers: by site name; called with ``[batch, length, width]``.
            before: called with the number of each batch before it is run.
            freeze_attention: keep what the output projection reads and use it again until ``advance``, for a
                caller that changes nothing before that projection any more; ``o_in`` must be the last site.
                Saves time in language models; elsewhere attention is computed again.
        """
        sites = [site for site in block.sites if site.name in observers]
        hooks = [(site.modules[0], observers[site.name]) for site in sites]
        mixed: list[Tensor] = []
        freeze_attention = freeze_attention and isinstance(block, LanguageBlock)
        if freeze_attention:
            if sites[-1].name != "o_in":
                raise ValueError("attention is frozen while its output site is observed last")
            hooks.insert(-1, (sites[-1].modules[0], mixed.append))
        module = self._model.get_submodule(block.name)
        with _site_hooks(self._model, hooks, stop=True), hold_dense(module):
            for index in range(len(self._states)):
                before(index)
                with contextlib.suppress(ForwardStopped):
                    self.call(block, index)
        if freeze_attention:
            self._mixed = mixed

    @torch.no_grad()
    def outputs(self, block: Block) -> list[tuple[Tensor, ...]]:
        """Streams that the current block gives now, batch by batch."""
        with hold_dense(self._model.get_submodule(block.name)):
            return [self.call(block, index) for index in range(len(self._states))]

    def advance_to(self, outputs: list[tuple[Tensor, ...]]) -> None:
        """Move on with what the block gave when it was asked."""
        self._states, self._mixed = outputs, None

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Run the block and keep its output as the hidden states before the next one."""
        with hold_dense(self._model.get_submodule(block.name)):
            for index in range(len(self._states)):
                self._states[index] = self.call(block, index)
        self._mixed = None
