"""Rewrites that leave a model's function unchanged, each with an undo.

Activations are row vectors, ``y = x W + b``; a torch weight is ``W^T``. With an orthogonal ``T`` on the
residual stream::

    E <- E T      W_{q,k,v,gate,up,head} <- T^T W      W_{o,down} <- W T,  b_{o,down} <- b T

in torch layout ``weight @ T`` for readers and ``T^T @ weight`` for writers. Arithmetic is done in fp64 and cast
to the parameter's type once per rewrite; a model in 16 bits should be raised to fp32 first (``quantize`` does).

Every function returns an :class:`Undo` that puts the very tensors and modules back that were there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from postlude.errors import ArchitectureError
from postlude.surgery.anatomy import (
    Block,
    LanguageAnatomy,
    LanguageBlock,
    LinearRef,
    Modulation,
    Site,
    is_transposed,
)
from postlude.surgery.key_values import KeyValueQuantizer, attach, detach, use_rotating_attention
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.transforms import BlockHadamard

__all__ = [
    "Undo",
    "fold_norms",
    "permute_product",
    "replace_module",
    "rotate_keys",
    "rotate_residual",
    "rotate_values",
    "scale_norm_site",
    "shift_norm_site",
    "transform_input",
    "untie_head",
]


class Undo:
    """Steps that take a rewrite back, run last first; bit-exact, since the old tensors are kept."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def extend(self, other: Undo) -> Undo:
        """Take over the steps of a later rewrite."""
        self._steps += other._steps
        return self

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


def _put(undo: Undo, parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter new values (cast to its type) and remember the old tensor."""
    old = parameter.data
    undo.add(lambda: setattr(parameter, "data", old))
    parameter.data = value.to(old.dtype).contiguous()


def _put_linear(
    undo: Undo,
    model: nn.Module,
    ref: LinearRef,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Give a linear, or its rows, a new weight ``[out, in]`` and bias ``[out]``."""
    module = model.get_submodule(ref.module)
    rows = slice(*ref.rows) if ref.rows else slice(None)
    if weight is not None:
        whole = cast(Tensor, module.weight).data.clone()
        (whole.T if is_transposed(module) else whole)[rows] = weight.to(whole.dtype)
        _put(undo, cast(nn.Parameter, module.weight), whole)
    if bias is not None:
        existing = cast("nn.Parameter | None", module.bias)
        if existing is None:
            module.bias = nn.Parameter(
                bias.to(cast(Tensor, module.weight).dtype), requires_grad=False
            )
            undo.add(lambda: setattr(module, "bias", None))
        else:
            whole = existing.data.clone()
            whole[rows] = bias.to(whole.dtype)
            _put(undo, existing, whole)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> Undo:
    """Put another module at a path."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    old = model.get_submodule(path)
    undo = Undo()
    undo.add(lambda: setattr(owner, name, old))
    setattr(owner, name, module)
    return undo


def untie_head(model: nn.Module, anatomy: LanguageAnatomy) -> Undo:
    """Give the head a weight of its own where it shares the token embedding's."""
    undo = Undo()
    head = model.get_submodule(anatomy.head)
    embedding = model.get_submodule(anatomy.embeddings[0])
    shared = cast(nn.Parameter, head.weight)
    if shared is not embedding.weight:
        return undo
    config = cast(Any, model.config)
    undo.add(lambda: setattr(head, "weight", shared))
    undo.add(lambda: setattr(config, "tie_word_embeddings", True))
    head.weight = nn.Parameter(shared.data.clone(), requires_grad=shared.requires_grad)
    config.tie_word_embeddings = False
    return undo


def fold_norms(model: nn.Module, anatomy: LanguageAnatomy) -> Undo:
    """Move the weight and bias of every norm into the linears that read it; the head included.

    ``norm(x) = gamma * xhat + beta`` read by ``W`` is ``xhat`` read by ``diag(gamma) W`` with the bias
    ``beta W``. For LayerNorm the mean that it subtracts is moved into whatever writes the residual stream, after
    which a gain-free RMSNorm takes its place; RMSNorm models keep their means, which their norm does not remove.
    A tied head must be untied first.
    """
    undo = Undo()
    head = model.get_submodule(anatomy.head)
    if head.weight is model.get_submodule(anatomy.embeddings[0]).weight:
        raise ValueError("untie the head before folding the final norm into it")
    reads = [(site.norm, site.readers) for _, site in anatomy.sites() if site.norm]
    reads.append((anatomy.final_norm, (LinearRef(anatomy.head, "output"),)))
    for path, readers in reads:
        norm = model.get_submodule(path)
        gamma = cast(nn.Parameter, norm.weight)
        beta = cast("nn.Parameter | None", getattr(norm, "bias", None))
        for reader in readers:
            weight = reader.weight(model).double()
            bias = None
            if beta is not None:
                shift = weight @ beta.data.double()
                old = reader.bias(model)
                bias = shift if old is None else old.double() + shift
            _put_linear(undo, model, reader, weight * gamma.data.double(), bias)
        if anatomy.norm_kind == "layer":
            plain = nn.RMSNorm(
                anatomy.hidden_size, eps=cast(float, norm.eps), elementwise_affine=False
            )
            undo.extend(replace_module(model, path, plain))
        else:
            _put(undo, gamma, torch.ones_like(gamma.data))
    if anatomy.norm_kind == "layer":
        _centre_residual(undo, model, anatomy)
    return undo


def _centre_residual(undo: Undo, model: nn.Module, anatomy: LanguageAnatomy) -> None:
    """Take the mean over channels out of everything that is added to the residual stream."""
    for path in anatomy.embeddings:
        table = cast(nn.Parameter, model.get_submodule(path).weight)
        rows = table.data.double()
        _put(undo, table, rows - rows.mean(1, keepdim=True))
    for writer in anatomy.residual_writers():
        weight, bias = writer.weight(model).double(), writer.bias(model)
        centred = None if bias is None else bias.double() - bias.double().mean()
        _put_linear(undo, model, writer, weight - weight.mean(0, keepdim=True), centred)


def rotate_residual(model: nn.Module, anatomy: LanguageAnatomy, rotation: Tensor) -> Undo:
    """Change the basis of the residual stream; norms must be folded.

    Args:
        rotation: orthogonal, ``[hidden_size, hidden_size]``, fp64.
    """
    undo = Undo()
    rotation = rotation.double()
    for path in anatomy.embeddings:
        table = cast(nn.Parameter, model.get_submodule(path).weight)
        _put(undo, table, table.data.double() @ rotation.to(table.device))
    for reader in (*anatomy.residual_readers(), LinearRef(anatomy.head, "output")):
        weight = reader.weight(model)
        _put_linear(undo, model, reader, weight.double() @ rotation.to(weight.device))
    for writer in anatomy.residual_writers():
        weight, bias = writer.weight(model), writer.bias(model)
        turned = rotation.to(weight.device)
        rotated = None if bias is None else bias.double() @ turned
        _put_linear(undo, model, writer, turned.T @ weight.double(), rotated)
    return undo


def rotate_values(model: nn.Module, block: Block, rotations: Tensor) -> Undo:
    """Rotate the values of each key/value head; the output projection of every query head undoes it.

    Args:
        rotations: orthogonal, ``[key/value heads, head size, head size]``, fp64.
    """
    undo = Undo()
    heads = block.heads
    value, output = block.linear("value"), block.linear("output")
    rotations = rotations.double().to(value.weight(model).device)
    if rotations.shape != (heads.key_value, heads.size, heads.size):
        raise ValueError(f"expected rotations for {heads}, got {tuple(rotations.shape)}")
    rows = value.weight(model).double().unflatten(0, (heads.key_value, heads.size))
    turned = torch.einsum("hij,hid->hjd", rotations, rows).flatten(0, 1)
    bias = value.bias(model)
    if bias is not None:
        parts = bias.double().unflatten(0, (heads.key_value, heads.size))
        bias = torch.einsum("hij,hi->hj", rotations, parts).flatten()
    _put_linear(undo, model, value, turned, bias)
    columns = output.weight(model).double().unflatten(1, (heads.query, heads.size))
    served = rotations.repeat_interleave(heads.shared, dim=0)
    _put_linear(undo, model, output, torch.einsum("dhi,hij->dhj", columns, served).flatten(1))
    return undo


def rotate_keys(model: nn.Module, block: LanguageBlock, quantizer: KeyValueQuantizer) -> Undo:
    """Rotate queries and keys after the rotary embedding; their products do not change.

    The key bias is left alone: it acts before the rotary embedding, the rotation after it.
    """
    undo = Undo()
    config = cast(Any, model.config)
    before = config._attn_implementation
    attach(model, block.attention, quantizer.to(block.linear("key").weight(model).device))
    undo.add(lambda: detach(model, block.attention))
    if quantizer.rotation is not None:
        use_rotating_attention(model)
        undo.add(lambda: cast(Any, model).set_attn_implementation(before))
    return undo


def permute_product(model: nn.Module, block: Block, index: Tensor) -> Undo:
    """Reorder the channels between the first and the last linear of the MLP.

    Args:
        index: ``[intermediate size]``; new channel ``j`` is old channel ``index[j]``.
    """
    undo = Undo()
    site = block.site("down_in")
    index = index.to(site.readers[0].weight(model).device)
    for writer in site.writers:
        bias = writer.bias(model)
        _put_linear(
            undo, model, writer, writer.weight(model)[index], None if bias is None else bias[index]
        )
    for reader in site.readers:
        _put_linear(undo, model, reader, reader.weight(model)[:, index])
    return undo


def transform_input(model: nn.Module, site: Site, transform: BlockHadamard) -> Undo:
    """Transform a site's tensor online, and let its readers' weights take the transform back.

    The readers become :class:`QuantizedLinear` layers that apply ``x -> T(x)`` and hold ``weight @ T``, in float.
    """
    undo = Undo()
    for path in site.modules:
        reader = LinearRef(path, site.readers[0].role)
        old = model.get_submodule(path)
        weight = reader.weight(model)
        layer = QuantizedLinear.like(old, transform=transform.to(weight.device))
        layer.weight.data.copy_(transform(weight.double()))
        undo.extend(replace_module(model, path, layer))
    return undo


def scale_norm_site(model: nn.Module, site: Site, scale: Tensor) -> Undo:
    """Divide a norm's output by ``scale`` per channel and multiply its readers' columns by it.

    Where the condition scales and shifts the output (adaLN), ``xhat (1 + a) + b`` with ``a = W_a c + b_a``, it is
    ``a <- (1 + a) / scale - 1`` and ``b <- b / scale``: rows of the linears that compute them.

    Args:
        site: one fed by a norm.
        scale: positive, ``[width]``.
    """
    if site.norm is None:
        raise ValueError(f"site {site.name} is not fed by a norm")
    undo = Undo()
    norm = model.get_submodule(site.norm)
    if site.modulation is not None:
        _scale_modulation(undo, model, site.modulation, scale.double())
    else:
        for name in ("weight", "bias"):
            parameter = cast("nn.Parameter | None", getattr(norm, name, None))
            if parameter is not None:
                _put(undo, parameter, parameter.data.double() / scale.double())
    for reader in site.readers:
        _put_linear(undo, model, reader, reader.weight(model).double() * scale.double())
    return undo


def shift_norm_site(model: nn.Module, site: Site, shift: Tensor) -> Undo:
    """Add ``shift`` to a norm's output per channel and take ``W shift`` from its readers' biases.

    Readers without a bias are given one.

    Args:
        site: one fed by a norm with a bias of its own.
        shift: ``[width]``.

    Raises:
        ArchitectureError: the norm has no bias to take the shift in.
    """
    norm = None if site.norm is None else model.get_submodule(site.norm)
    bias = cast("nn.Parameter | None", getattr(norm, "bias", None))
    if bias is None:
        raise ArchitectureError(
            f"site {site.name} is not fed by a norm with a bias, which could take a shift in"
        )
    undo = Undo()
    _put(undo, bias, bias.data.double() + shift.double())
    for reader in site.readers:
        moved = -(reader.weight(model).double() @ shift.double())
        old = reader.bias(model)
        _put_linear(undo, model, reader, bias=moved if old is None else old.double() + moved)
    return undo


def _scale_modulation(undo: Undo, model: nn.Module, modulation: Modulation, scale: Tensor) -> None:
    gain, shift = modulation.scale, modulation.shift
    for ref, offset in ((gain, 1.0), (shift, 0.0)):
        bias = ref.bias(model)
        if bias is None and offset:
            raise ArchitectureError(
                f"{ref.module} computes a modulation without a bias, which could not take a constant in"
            )
        # 1 + a is divided, so the 1 goes through the bias.
        moved = None if bias is None else (offset + bias.double()) / scale - offset
        _put_linear(undo, model, ref, ref.weight(model).double() / scale[:, None], moved)
