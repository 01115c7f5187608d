"""Where the parts of a model are.

An :class:`Anatomy` describes a model as blocks and each block as sites. A site is one tensor of the forward
pass that linear layers read. Everything that rotates, folds, scales, calibrates, measures or rounds walks
sites and never module names; architectures are known in ``postlude/surgery/anatomies`` and nowhere else.

Weights are read and written through :class:`LinearRef` in torch layout ``[out_features, in_features]``,
whatever class holds them (``nn.Linear``, or transformers' transposed ``Conv1D``, or rows of a fused
projection).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor, nn

from postlude.errors import ArchitectureError

__all__ = [
    "Anatomy",
    "Block",
    "Heads",
    "LinearRef",
    "Site",
    "anatomy_of",
    "check_supported",
    "describes",
    "supported_model_types",
]

Role = Literal["query", "key", "value", "output", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Head structure: ``query`` heads share ``key_value`` heads in equal, consecutive runs."""

    query: int
    key_value: int
    size: int

    @property
    def shared(self) -> int:
        """Query heads of one key/value head."""
        return self.query // self.key_value


@dataclasses.dataclass(frozen=True)
class LinearRef:
    """A linear layer of a model, or some rows of one.

    Attributes:
        module: dotted path.
        role: what it computes.
        rows: ``(start, stop)`` of the output features, where one module computes several things.
    """

    module: str
    role: Role
    rows: tuple[int, int] | None = None

    def _whole(self, model: nn.Module) -> tuple[nn.Parameter, bool]:
        module = model.get_submodule(self.module)
        weight = module.weight
        if not isinstance(weight, nn.Parameter):
            raise ArchitectureError(
                f"{self.module} is a {type(module).__name__} without a plain weight; "
                "quantized layers cannot be rewritten"
            )
        return weight, type(module).__name__ == "Conv1D"

    def weight(self, model: nn.Module) -> Tensor:
        """``[out_features, in_features]``, a view of the parameter where possible."""
        parameter, transposed = self._whole(model)
        matrix = parameter.data.T if transposed else parameter.data
        return matrix[slice(*self.rows)] if self.rows else matrix

    def bias(self, model: nn.Module) -> Tensor | None:
        """``[out_features]``, or None."""
        bias: nn.Parameter | None = getattr(model.get_submodule(self.module), "bias", None)
        if bias is None:
            return None
        return bias.data[slice(*self.rows)] if self.rows else bias.data


@dataclasses.dataclass(frozen=True)
class Site:
    """One tensor that linear layers read.

    Attributes:
        name: ``qkv_in``, ``o_in``, ``ug_in`` or ``down_in``.
        width: size of its last axis.
        readers: the linears that read it.
        norm: path of the norm that produces it from the residual stream; None inside a branch.
        writers: the linears whose output becomes this tensor without leaving its axis (values for ``o_in``,
            gate and up for ``down_in``); empty for sites on the residual stream.
        heads: head structure of the axis, where it has one.
    """

    name: str
    width: int
    readers: tuple[LinearRef, ...]
    norm: str | None = None
    writers: tuple[LinearRef, ...] = ()
    heads: Heads | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that read it, each once."""
        return tuple(dict.fromkeys(reader.module for reader in self.readers))


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block: attention, then a multi-layer perceptron.

    Attributes:
        index: from 0.
        name: path of the module that is called with the hidden states.
        attention: path of the attention module.
        activation: path of the activation function's module.
        gated: whether the product is ``act(gate) * up`` rather than ``act(up)``.
        sites: in the order in which they are computed.
    """

    index: int
    name: str
    attention: str
    activation: str
    gated: bool
    sites: tuple[Site, ...]

    def site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"block {self.index} has no site {name!r}: {[s.name for s in self.sites]}")

    def linear(self, role: Role) -> LinearRef:
        """The linear with this role."""
        for site in self.sites:
            for reader in site.readers:
                if reader.role == role:
                    return reader
        raise KeyError(f"block {self.index} has no {role} projection")

    @property
    def heads(self) -> Heads:
        heads = self.site("o_in").heads
        if heads is None:
            raise KeyError(f"block {self.index} has no head structure")
        return heads


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A model as blocks and sites.

    Attributes:
        family: file in ``surgery/anatomies`` that describes it.
        hidden_size: width of the residual stream.
        embeddings: tables whose rows are added to start the residual stream (tokens, learned positions).
        blocks: in order.
        decoder: path of the model without its head.
        final_norm: path of the norm after the last block.
        head: path of the linear that reads it and gives logits.
        norm_kind: ``rms`` (``x / rms(x) * weight``) or ``layer`` (centred, with bias).
        context: longest sequence it was made for.
    """

    family: str
    hidden_size: int
    embeddings: tuple[str, ...]
    blocks: tuple[Block, ...]
    decoder: str
    final_norm: str
    head: str
    norm_kind: Literal["rms", "layer"]
    context: int

    def sites(self) -> Iterator[tuple[Block, Site]]:
        """Every site of every block, in the order of the forward pass."""
        for block in self.blocks:
            for site in block.sites:
                yield block, site

    def linears(self) -> Iterator[str]:
        """Paths of every linear of every block, each once."""
        for _, site in self.sites():
            yield from site.modules

    def residual_writers(self) -> Iterator[LinearRef]:
        """The linears that add to the residual stream."""
        for block in self.blocks:
            yield block.linear("output")
            yield block.linear("down")

    def residual_readers(self) -> Iterator[LinearRef]:
        """The linears that read the residual stream through a norm; the head is not among them."""
        for _, site in self.sites():
            if site.norm:
                yield from site.readers

    def attention_bias(self, model: nn.Module) -> bool:
        """Whether any key projection has a bias that is not zero."""
        biases = [block.linear("key").bias(model) for block in self.blocks]
        return any(bias is not None and bool(bias.any()) for bias in biases)


Builder = Callable[[nn.Module], Anatomy]
_BUILDERS: dict[str, Builder] = {}


def describes(*model_types: str) -> Callable[[Builder], Builder]:
    """Register a function that builds the anatomy of these ``config.model_type`` values."""

    def register(builder: Builder) -> Builder:
        for model_type in model_types:
            _BUILDERS[model_type] = builder
        return builder

    return register


def _builders() -> dict[str, Builder]:
    package = importlib.import_module("postlude.surgery.anatomies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _BUILDERS


def supported_model_types() -> list[str]:
    """Every ``config.model_type`` with an anatomy."""
    return sorted(_builders())


def check_supported(model_type: str) -> None:
    """Raise for a model type without an anatomy.

    Raises:
        ArchitectureError: names the types known and the page on adding one.
    """
    if model_type not in _builders():
        raise ArchitectureError(
            f"no anatomy describes models of type {model_type!r}. Known types: "
            f"{', '.join(supported_model_types())}. docs/add-an-architecture.md shows how to add one."
        )


def anatomy_of(model: nn.Module) -> Anatomy:
    """Describe a transformers model.

    Raises:
        ArchitectureError: no anatomy describes it, or the description does not fit the modules found.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    check_supported(model_type)
    anatomy = _builders()[model_type](model)
    for path in (*anatomy.linears(), *anatomy.embeddings, anatomy.final_norm, anatomy.head):
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(
                f"the anatomy of {model_type!r} expects a module {path!r} that this "
                f"{type(model).__name__} does not have"
            ) from error
    return anatomy
