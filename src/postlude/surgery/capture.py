"""Run token batches through a model and look at what passes.

:func:`observe` runs the whole model and hands every asked-for site input to an observer. :class:`BlockWalk`
keeps the hidden states of all calibration sequences before one block, so that a block can be observed, changed
and then left behind: one block's activations are resident at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postlude.surgery.anatomy import Anatomy, Block
from postlude.surgery.layers import hold_dense

__all__ = ["BlockWalk", "Observer", "device_of", "observe", "token_batches"]

Observer = Callable[[Tensor], None]

# Tokens in one forward pass where the caller does not say.
TOKENS_PER_BATCH = 4096


class _Stop(Exception):
    """Raised by a hook when nothing after it is needed."""


def device_of(module: nn.Module) -> torch.device:
    """Device of the first parameter or buffer."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def token_batches(tokens: Tensor, tokens_per_batch: int = TOKENS_PER_BATCH) -> Iterator[Tensor]:
    """Split ``[sequences, length]`` into batches of at most ``tokens_per_batch`` tokens (at least a row)."""
    rows = max(1, tokens_per_batch // tokens.shape[1])
    yield from tokens.split(rows)


def _hidden(value: Any) -> Tensor:
    hidden: Tensor = value[0] if isinstance(value, tuple) else value
    return hidden


@contextlib.contextmanager
def _site_hooks(
    model: nn.Module,
    sites: Iterable[tuple[str, Observer]],
    *,
    stop: bool = False,
) -> Iterator[None]:
    """Call observers with the input of modules; with ``stop``, raise :class:`_Stop` after the last one."""
    handles = []
    given = list(sites)
    try:
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
                    raise _Stop

            handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    observers: Mapping[tuple[int, str], Observer],
    *,
    residual: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Run the model without its head and show its inner tensors to observers.

    Args:
        model: a transformers model.
        anatomy: of that model.
        batches: token ids, each ``[batch, length]``, without padding.
        observers: by ``(block index, site name)``; called with ``[batch, length, width]``.
        residual: called with ``(index, [batch, length, hidden_size])``: index -1 is the stream before the
            first block, index ``i`` the output of block ``i``, before any norm.
    """
    decoder = model.get_submodule(anatomy.decoder)
    device = device_of(model)
    wanted = [
        (anatomy.blocks[index].site(name).modules[0], observer)
        for (index, name), observer in observers.items()
    ]
    handles = []
    with _site_hooks(model, wanted):
        try:
            if residual is not None:
                look = residual  # bound here, so that the hooks below see a callable

                def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    look(-1, args[0] if args else kwargs["hidden_states"])

                first = model.get_submodule(anatomy.blocks[0].name)
                handles.append(first.register_forward_pre_hook(before, with_kwargs=True))
                for block in anatomy.blocks:

                    def after(_: nn.Module, __: Any, output: Any, index: int = block.index) -> None:
                        look(index, _hidden(output))

                    handles.append(model.get_submodule(block.name).register_forward_hook(after))
            for batch in batches:
                decoder(input_ids=batch.to(device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


class BlockWalk:
    """Hidden states of calibration sequences, moved through a model one block at a time.

    The walk starts before block 0. ``observe`` runs the current block as it is now; ``advance`` runs it a last
    time and moves on. Whatever the caller did to the block in between is what the next block sees.

    Args:
        model: a transformers model.
        anatomy: of that model.
        tokens: ``[sequences, length]``.
        tokens_per_batch: tokens in one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        tokens: Tensor,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        self._model = model
        self._rows = max(1, tokens_per_batch // tokens.shape[1])
        # A block's other arguments (masks, positions) depend on the batch only through its number of rows.
        self._arguments: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        hidden: list[Tensor] = []
        with torch.no_grad(), self._recording(anatomy, hidden):
            decoder = model.get_submodule(anatomy.decoder)
            for batch in tokens.split(self._rows):
                decoder(input_ids=batch.to(device_of(model)), use_cache=False)
        self._hidden = hidden
        # What the current block's output projection reads, batch by batch, once that is final.
        self._mixed: list[Tensor] | None = None

    @contextlib.contextmanager
    def _recording(self, anatomy: Anatomy, hidden: list[Tensor]) -> Iterator[None]:
        """Blocks that pass their input on and write down what else they were called with."""
        blocks = [(block, self._model.get_submodule(block.name)) for block in anatomy.blocks]
        for block, module in blocks:

            def record(
                hidden_states: Tensor, *args: Any, _index: int = block.index, **kwargs: Any
            ) -> Tensor:
                if _index == 0:
                    hidden.append(hidden_states)
                self._arguments[_index, hidden_states.shape[0]] = (args, kwargs)
                return hidden_states

            module.forward = record
        try:
            yield
        finally:
            for _, module in blocks:
                del module.forward  # the class's own method again

    def _call(self, block: Block, index: int) -> Tensor:
        """Output of the block for one batch; its attention is replayed if it was frozen."""
        args, kwargs = self._arguments[block.index, self._hidden[index].shape[0]]
        attention = self._model.get_submodule(block.attention)
        if self._mixed is not None:
            project = self._model.get_submodule(block.linear("output").module)
            mixed = self._mixed[index]
            # Attention modules return their output and its weights, which nobody reads here.
            attention.forward = lambda *_, **__: (project(mixed), None)
        try:
            module = self._model.get_submodule(block.name)
            return _hidden(module(self._hidden[index], *args, **kwargs))
        finally:
            attention.__dict__.pop("forward", None)

    @torch.no_grad()
    def observe(
        self, block: Block, observers: Mapping[str, Observer], *, freeze_attention: bool = False
    ) -> None:
        """Run the block and show site inputs to observers, stopping after the last one.

        Args:
            block: the current one.
            observers: by site name; called with ``[batch, length, width]``.
            freeze_attention: keep what the output projection reads and use it again until ``advance``, for a
                caller that changes nothing before that projection any more; ``o_in`` must be the last site.
        """
        sites = [site for site in block.sites if site.name in observers]
        hooks = [(site.modules[0], observers[site.name]) for site in sites]
        mixed: list[Tensor] = []
        if freeze_attention:
            if sites[-1].name != "o_in":
                raise ValueError("attention is frozen while its output site is observed last")
            hooks.insert(-1, (sites[-1].modules[0], mixed.append))
        module = self._model.get_submodule(block.name)
        with _site_hooks(self._model, hooks, stop=True), hold_dense(module):
            for index in range(len(self._hidden)):
                with contextlib.suppress(_Stop):
                    self._call(block, index)
        if freeze_attention:
            self._mixed = mixed

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Run the block and keep its output as the hidden states before the next one."""
        with hold_dense(self._model.get_submodule(block.name)):
            for index in range(len(self._hidden)):
                self._hidden[index] = self._call(block, index)
        self._mixed = None
