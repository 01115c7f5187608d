"""Where the parts of a model are.

An :class:`Anatomy` describes a model as blocks and each block as sites. A site is one tensor of the forward
pass that linear layers read. Everything that rotates, folds, scales, calibrates, measures or rounds walks
sites and never module names; architectures are known in ``postlude/surgery/anatomies`` and nowhere else.

What every transformer has is in :class:`Anatomy` and :class:`Block`; what only language models have (an embedding
of tokens, a head of logits, a stream that a rotation may turn) is in :class:`LanguageAnatomy` and
:class:`LanguageBlock`.

Weights are read and written through :class:`LinearRef` in torch layout ``[out_features, in_features]``,
whatever class holds them (``nn.Linear``, or transformers' transposed ``Conv1D``, or rows of a fused
projection).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postlude.errors import ArchitectureError

__all__ = [
    "Anatomy",
    "AudioAnatomy",
    "Block",
    "Heads",
    "Input",
    "Kind",
    "LanguageAnatomy",
    "LanguageBlock",
    "LinearRef",
    "Modulation",
    "Role",
    "Site",
    "anatomy_of",
    "check_supported",
    "describes",
    "is_transposed",
    "kind_of",
    "supported_model_types",
]

Kind = Literal["language", "diffusion", "vision", "audio"]
Role = Literal["query", "key", "value", "output", "gate", "up", "down", "condition"]


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


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps ``[in_features, out_features]``, as transformers' ``Conv1D`` does."""
    return type(module).__name__ == "Conv1D"


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
        return weight, is_transposed(module)

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
class Modulation:
    """Rows of linears that scale and shift a normalised stream: ``norm(x) * (1 + scale) + shift`` (adaLN).

    Attributes:
        scale, shift: each computes ``[batch, width]`` from the condition.
    """

    scale: LinearRef
    shift: LinearRef


@dataclasses.dataclass(frozen=True)
class Site:
    """One tensor that linear layers read.

    Attributes:
        name: ``qkv_in``, ``o_in``, ``ug_in`` or ``down_in`` where there is one attention and one perceptron;
            others are named by what sets them apart, as in ``cross_q_in``.
        width: size of its last axis.
        readers: the linears that read it.
        norm: path of the norm that produces it from the residual stream; None inside a branch, and where what
            scales the norm's output is shared with other sites.
        writers: the linears whose output becomes this tensor without leaving its axis (values for ``o_in``,
            gate and up for ``down_in``); empty for sites on the residual stream.
        heads: head structure of the axis, where it has one.
        modulation: what scales and shifts the output of ``norm``, where the condition does that.
    """

    name: str
    width: int
    readers: tuple[LinearRef, ...]
    norm: str | None = None
    writers: tuple[LinearRef, ...] = ()
    heads: Heads | None = None
    modulation: Modulation | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that read it, each once."""
        return tuple(dict.fromkeys(reader.module for reader in self.readers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block: what is computed between two states of the residual stream.

    Attributes:
        index: from 0.
        name: path of the module that is called with the residual streams.
        sites: in the order in which they are computed.
        kept: sites whose linears stay in floating point by default: those that compute modulations and
            embeddings of the condition, and streams that published methods leave alone.
        float_modules: paths of other modules with a matrix that no site describes (convolutions).
        streams: parameters of the module's ``forward`` that carry residual streams, in the order in which it
            returns them; the first also if it returns one tensor.
    """

    index: int
    name: str
    sites: tuple[Site, ...]
    kept: tuple[Site, ...] = ()
    float_modules: tuple[str, ...] = ()
    streams: tuple[str, ...] = ("hidden_states",)

    def site(self, name: str) -> Site:
        for site in (*self.sites, *self.kept):
            if site.name == name:
                return site
        raise KeyError(f"block {self.index} has no site {name!r}: {[s.name for s in self.sites]}")

    def linear(self, role: Role) -> LinearRef:
        """The first linear with this role."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageBlock(Block):
    """A block of a language model: attention, then a multi-layer perceptron.

    Attributes:
        attention: path of the attention module.
        activation: path of the activation function's module.
        gated: whether the product is ``act(gate) * up`` rather than ``act(up)``.
    """

    attention: str
    activation: str
    gated: bool


@dataclasses.dataclass(frozen=True)
class Input:
    """One argument that a model's ``forward`` needs.

    Attributes:
        name: of the argument; ``a.b`` for entry ``b`` of a dictionary ``a``.
        shape: of one row.
        below: whole numbers from 0 to this one are expected; None for any numbers.
        rows: whether there is one for every row; positions belong to all of them.
    """

    name: str
    shape: tuple[int, ...] = ()
    below: int | None = None
    rows: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model as blocks and sites.

    Attributes:
        family: file in ``surgery/anatomies`` that describes it.
        kind: what the model computes.
        hidden_size: width of the residual stream.
        blocks: in order.
        inputs: what the model's ``forward`` needs; empty for language models, which read tokens.
    """

    family: str
    kind: Kind
    hidden_size: int
    blocks: tuple[Block, ...]
    inputs: tuple[Input, ...] = ()

    def example(self, rows: int = 2, seed: int = 0) -> dict[str, Any]:
        """Random keyword arguments of the model's ``forward``, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        batch: dict[str, Any] = {}
        for one in self.inputs:
            shape = (rows, *one.shape) if one.rows else one.shape
            value = (
                torch.randn(shape, generator=generator)
                if one.below is None
                else torch.randint(0, one.below, shape, generator=generator)
            )
            owner, _, name = one.name.rpartition(".")
            (batch.setdefault(owner, {}) if owner else batch)[name] = value
        return batch

    def sites(self) -> Iterator[tuple[Block, Site]]:
        """Every site of every block, in the order of the forward pass; those that are kept are not among them."""
        for block in self.blocks:
            for site in block.sites:
                yield block, site

    def linears(self) -> Iterator[str]:
        """Paths of every linear that reads a site, each once."""
        for _, site in self.sites():
            yield from site.modules

    def kept(self) -> Iterator[str]:
        """Paths of the linears and other matrices of the blocks that stay in floating point by default."""
        for block in self.blocks:
            for site in block.kept:
                yield from site.modules
            yield from block.float_modules

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Run everything up to the last block, and as little else as the model allows.

        Args:
            batch: the keyword arguments of the model's ``forward``, on its device.
        """
        model(**batch)

    def paths(self) -> Iterator[str]:
        """Paths of every module that is named here; all of them have to exist."""
        yield from self.linears()
        yield from self.kept()
        for block, site in self.sites():
            yield block.name
            if site.norm:
                yield site.norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageAnatomy(Anatomy):
    """A language model as blocks and sites.

    Attributes:
        blocks: in order.
        embeddings: tables whose rows are added to start the residual stream (tokens, learned positions).
        decoder: path of the model without its head.
        final_norm: path of the norm after the last block.
        head: path of the linear that reads it and gives logits.
        norm_kind: ``rms`` (``x / rms(x) * weight``) or ``layer`` (centred, with bias).
        context: longest sequence it was made for.
    """

    kind: Kind = "language"
    blocks: tuple[LanguageBlock, ...]
    embeddings: tuple[str, ...]
    decoder: str
    final_norm: str
    head: str
    norm_kind: Literal["rms", "layer"]
    context: int

    def forward(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Run the model without its head, and without a cache."""
        model.get_submodule(self.decoder)(**batch, use_cache=False)

    def paths(self) -> Iterator[str]:
        """Paths of every module that is named here; all of them have to exist."""
        yield from super().paths()
        yield from (*self.embeddings, self.final_norm, self.head)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioAnatomy(LanguageAnatomy):
    """An audio language model: the blocks are those of its language model, and an encoder writes embeddings for it.

    Everything that works on the tokens of a language model works on its language model. The encoder and the projector
    stay in floating point.

    Attributes:
        encoder: path of what reads log-mel features.
        positions: last part of the path of its table of positions, which is not learned.
        projector: path of what makes embeddings of the decoder from what the encoder gives.
        projection: path of its last linear.
        audio_token: token whose embeddings are replaced by those of the audio.
    """

    kind: Kind = "audio"
    encoder: str
    positions: str
    projector: str
    projection: str
    audio_token: int

    def paths(self) -> Iterator[str]:
        """Paths of every module that is named here; all of them have to exist."""
        yield from super().paths()
        yield from (self.encoder, self.projector, self.projection)

    def residual_writers(self) -> Iterator[LinearRef]:
        """The linears that add to the residual stream, or start it."""
        yield LinearRef(self.projection, "output")
        yield from super().residual_writers()


# A builder may be asked for any class of its models; what it finds there decides what it says.
Builder = Callable[[Any], Anatomy]


@dataclasses.dataclass(frozen=True)
class _Entry:
    builder: Builder
    kind: Kind


_ENTRIES: dict[str, _Entry] = {}


def describes(*names: str, kind: Kind = "language") -> Callable[[Builder], Builder]:
    """Register a function that builds the anatomy of models of these names.

    Args:
        names: values of ``config.model_type`` of transformers, or class names of diffusers.
        kind: of those models.
    """

    def register(builder: Builder) -> Builder:
        for name in names:
            _ENTRIES[name] = _Entry(builder, kind)
        return builder

    return register


def _entries() -> dict[str, _Entry]:
    package = importlib.import_module("postlude.surgery.anatomies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _ENTRIES


def supported_model_types(kind: Kind | None = None) -> list[str]:
    """Every ``config.model_type`` and diffusers class with an anatomy; of one kind only where it is given."""
    return sorted(name for name, entry in _entries().items() if kind in (None, entry.kind))


def kind_of(name: str) -> Kind:
    """The kind of the models of a ``config.model_type`` or diffusers class.

    Raises:
        ArchitectureError: names the types known and the page on adding one.
    """
    entries = _entries()
    if name not in entries:
        raise ArchitectureError(
            f"no anatomy describes models of type {name!r}. Known types: "
            f"{', '.join(supported_model_types())}. docs/add-an-architecture.md shows how to add one."
        )
    return entries[name].kind


def check_supported(model_type: str) -> None:
    """Raise for a model type without an anatomy.

    Raises:
        ArchitectureError: names the types known and the page on adding one.
    """
    kind_of(model_type)


def anatomy_of(model: nn.Module) -> Anatomy:
    """Describe a model of transformers or diffusers.

    Raises:
        ArchitectureError: no anatomy describes it, or the description does not fit the modules found.
    """
    name = str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)
    check_supported(name)
    anatomy = _entries()[name].builder(model)
    for path in anatomy.paths():
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(
                f"the anatomy of {name!r} expects a module {path!r} that this "
                f"{type(model).__name__} does not have"
            ) from error
    return anatomy
