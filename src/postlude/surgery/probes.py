"""Small experiments on a model: silence its attention, hide a direction from a norm, stop half-way, linearise a block.

Everything here leaves the model as it was and finds its way by the anatomy alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from postlude.errors import ArchitectureError
from postlude.numerics.directions import gaussian_linearisation, project_out
from postlude.surgery.anatomy import LanguageAnatomy, LanguageBlock, Site
from postlude.surgery.batches import device_of
from postlude.surgery.capture import ForwardStopped, streams_of

__all__ = [
    "BlockApproximation",
    "Reached",
    "approximate_block",
    "attention_silenced",
    "direction_hidden",
    "feed_forward",
    "norm_path",
    "normalise",
    "run_to",
]


class Reached(NamedTuple):
    """Where :func:`run_to` stopped.

    Attributes:
        stream: ``[batch, length, hidden_size]``, the output of the block.
        before_norm: the same shape, what that block's second norm was given.
    """

    stream: Tensor
    before_norm: Tensor


class BlockApproximation(NamedTuple):
    """A block as a linear map of one token, float64 ``[hidden_size, hidden_size]`` for column vectors.

    Attributes:
        attention: what attention adds to the residual stream when the token sees only itself.
        feed_forward: what the multi-layer perceptron adds.
    """

    attention: Tensor
    feed_forward: Tensor

    @property
    def with_attention(self) -> Tensor:
        """``I + A``."""
        return _identity(self.attention) + self.attention

    @property
    def with_feed_forward(self) -> Tensor:
        """``I + F``."""
        return _identity(self.feed_forward) + self.feed_forward

    @property
    def whole(self) -> Tensor:
        """``M = (I + F)(I + A)``."""
        return self.with_feed_forward @ self.with_attention

    @property
    def change(self) -> Tensor:
        """``Delta = M - I``."""
        return self.whole - _identity(self.attention)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[0], dtype=like.dtype, device=like.device)


def norm_path(block: LanguageBlock, site: str) -> str:
    """Path of the norm that makes this site from the residual stream.

    Raises:
        ArchitectureError: the site has none.
    """
    norm = block.site(site).norm
    if norm is None:
        raise ArchitectureError(f"{site} of {block.name} is not made by a norm")
    return norm


@contextlib.contextmanager
def attention_silenced(model: nn.Module, anatomy: LanguageAnatomy) -> Iterator[None]:
    """Within this context every attention module's output is zero, its bias included."""

    def silence(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with contextlib.ExitStack() as hooks:
        for block in anatomy.blocks:
            attention = model.get_submodule(block.attention)
            hooks.enter_context(attention.register_forward_hook(silence))
        yield


@contextlib.contextmanager
def direction_hidden(model: nn.Module, module: str, direction: Tensor) -> Iterator[None]:
    """Within this context ``module`` is given ``h - (h . v) v`` instead of ``h``; others still see ``h``.

    Args:
        model: the model.
        module: path, usually of a norm.
        direction: ``[hidden_size]``; ``v`` is the unit vector along it.
    """

    def hide(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (project_out(args[0], direction), *args[1:])

    with model.get_submodule(module).register_forward_pre_hook(hide):
        yield


@torch.no_grad()
def run_to(
    model: nn.Module,
    anatomy: LanguageAnatomy,
    block: int,
    *,
    tokens: Tensor | None = None,
    embeddings: Tensor | None = None,
    first_position: int = 0,
) -> Reached:
    """Run a batch up to and including one block.

    Args:
        model: a transformers model.
        anatomy: of that model.
        block: its index.
        tokens: ids ``[batch, length]``.
        embeddings: ``[batch, length, hidden_size]`` to use instead of rows of the embedding table.
        first_position: what the first token is told its position is.
    """
    found: dict[str, Tensor] = {}
    given = embeddings if tokens is None else tokens
    if given is None:
        raise ArchitectureError("run_to needs tokens or embeddings")

    def at_norm(_: nn.Module, args: tuple[Any, ...]) -> None:
        found["before_norm"] = args[0]

    def after(_: nn.Module, __: Any, output: Any) -> None:
        (found["stream"],) = streams_of(last, output)
        raise ForwardStopped

    last = anatomy.blocks[block]
    length = given.shape[1]
    positions = torch.arange(first_position, first_position + length, device=given.device)
    inputs = {"input_ids": tokens} if tokens is not None else {"inputs_embeds": embeddings}
    with (
        model.get_submodule(norm_path(last, "ug_in")).register_forward_pre_hook(at_norm),
        model.get_submodule(last.name).register_forward_hook(after),
        contextlib.suppress(ForwardStopped),
    ):
        model.get_submodule(anatomy.decoder)(
            **inputs, position_ids=positions.expand(given.shape[0], length), use_cache=False
        )
    return Reached(**found)


def normalise(model: nn.Module, norm: str, x: Tensor) -> Tensor:
    """``x`` ``[..., hidden_size]`` through the model's own norm at path ``norm``, returned in ``x``'s dtype."""
    module = model.get_submodule(norm)
    dtype = next(module.parameters()).dtype
    result: Tensor = module(x.to(dtype)).to(x.dtype)
    return result


def feed_forward(
    model: nn.Module, block: LanguageBlock, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """A block's multi-layer perceptron, without the norm before it, as a function of ``[..., hidden_size]``.

    Args:
        model: the model.
        block: one of its blocks.
        bias: whether the biases take part.
        dtype: what the weights are converted to, once.
    """
    activation = model.get_submodule(block.activation)

    def load(role: Any) -> tuple[Tensor, Tensor | None]:
        linear = block.linear(role)
        offset = linear.bias(model) if bias else None
        return linear.weight(model).to(dtype), None if offset is None else offset.to(dtype)

    up, down = load("up"), load("down")
    gate = load("gate") if block.gated else None

    def apply(x: Tensor) -> Tensor:
        inner = functional.linear(x, *up)
        if gate is None:
            return functional.linear(activation(inner), *down)
        return functional.linear(activation(functional.linear(x, *gate)) * inner, *down)

    return apply


def _norm_matrix(model: nn.Module, anatomy: LanguageAnatomy, norm: str) -> Tensor:
    """A norm without its division and bias: ``diag(gamma)``, after centring for a LayerNorm."""
    gamma: object = model.get_submodule(norm).weight
    if gamma is None:
        # Folded: its gain is in the linears that read it, its centring in those that write the stream.
        return torch.eye(anatomy.hidden_size, dtype=torch.float64, device=device_of(model))
    if not isinstance(gamma, Tensor):
        raise ArchitectureError(f"{norm} has no weight")
    matrix = torch.diag(gamma.detach().double())
    if anatomy.norm_kind == "layer":
        matrix = matrix - gamma.detach().double()[:, None] / len(gamma)
    return matrix


def _attention_path(model: nn.Module, anatomy: LanguageAnatomy, block: LanguageBlock) -> Tensor:
    """``Wt_O rep_kv(Wt_V)``: attention to oneself only, whose softmax is 1."""
    heads = block.heads
    value = block.linear("value").weight(model).double()
    value = value.reshape(heads.key_value, heads.size, -1)
    value = value.repeat_interleave(heads.shared, dim=0).flatten(0, 1)
    return block.linear("output").weight(model).double() @ value


@torch.no_grad()
def approximate_block(
    model: nn.Module, anatomy: LanguageAnatomy, block: LanguageBlock, samples: int, seed: int
) -> BlockApproximation:
    """The linear approximation of a block for a single token (singular defects, arXiv:2502.07004).

        A = Wt_O rep_kv(Wt_V) N_in        F = Wt_D B N_post

    ``B`` is the least-squares linear map of the MLP's inner product for Gaussian inputs, without intercept, and
    ``N`` a norm without its division: ``diag(gamma)``, times ``I - 1 1^T / D`` for a LayerNorm (SINDER,
    arXiv:2407.16826). Biases are ignored. Time: about ``6 samples hidden_size product_size`` operations in float32.

    Args:
        model: the model.
        anatomy: of that model.
        block: one of its blocks.
        samples: Gaussian rows of the least squares.
        seed: of those rows.

    Raises:
        SettingsError: fewer samples than the hidden size.
        ArchitectureError: a layer without plain weights, for example a quantized one.
    """
    site: Site = block.site("ug_in")
    before, after = norm_path(block, "qkv_in"), norm_path(block, site.name)
    attention = _attention_path(model, anatomy, block) @ _norm_matrix(model, anatomy, before)
    generator = torch.Generator(attention.device).manual_seed(seed)
    # Wt_D is applied to every row: the fit is linear in its target, so this is Wt_D B without a wide B.
    mlp = gaussian_linearisation(
        feed_forward(model, block, bias=False), site.width, samples, generator
    )
    return BlockApproximation(attention, mlp @ _norm_matrix(model, anatomy, after))
