"""DiT of diffusers (arXiv:2212.09748): class-conditional, adaLN-zero in every block.

The linear of adaLN computes, from the timestep and the class, six vectors for its block: shift, scale and gate of
the attention, then of the perceptron. It and the embedding of the condition that every block has for itself are
kept in floating point by default, as in SVDQuant (arXiv:2411.05007).
"""

from __future__ import annotations

from typing import Any

from postlude.errors import ArchitectureError
from postlude.surgery.anatomy import (
    Anatomy,
    Block,
    Heads,
    Input,
    LinearRef,
    Modulation,
    Role,
    Site,
    describes,
)

__all__ = [
    "adaptive",
    "attention_sites",
    "cross_attention_sites",
    "dit",
    "feed_forward",
    "heads_of",
    "linear_site",
]

_PLAIN = ("GELU", "ApproximateGELU", "LinearActivation")
# Class name of the activation to the order of its two halves.
_GATED = {"GEGLU": ("up", "gate"), "SwiGLU": ("up", "gate")}


def adaptive(module: str, width: int, shift: int) -> Modulation:
    """Two vectors that a linear of the condition computes: number ``shift`` shifts, the next one scales."""

    def vector(part: int) -> LinearRef:
        return LinearRef(module, "condition", (part * width, (part + 1) * width))

    return Modulation(scale=vector(shift + 1), shift=vector(shift))


def linear_site(model: Any, name: str, readers: dict[str, Role], **more: Any) -> Site:
    """A site that these linears read, by path and role; its width is theirs."""
    width = model.get_submodule(next(iter(readers))).in_features
    return Site(name, width, tuple(LinearRef(*one) for one in readers.items()), **more)


def heads_of(config: Any) -> Heads:
    """Head structure of a transformer of diffusers, by its configuration."""
    return Heads(config.num_attention_heads, config.num_attention_heads, config.attention_head_dim)


def attention_sites(
    model: Any,
    path: str,
    heads: Heads,
    norm: str | None = None,
    modulation: Modulation | None = None,
) -> tuple[Site, Site]:
    """``qkv_in`` and ``o_in`` of an ``Attention`` of diffusers that attends to what it reads."""
    readers: dict[str, Role] = {
        f"{path}.to_q": "query",
        f"{path}.to_k": "key",
        f"{path}.to_v": "value",
    }
    value = LinearRef(f"{path}.to_v", "value")
    return (
        linear_site(model, "qkv_in", readers, norm=norm, modulation=modulation),
        linear_site(model, "o_in", {f"{path}.to_out.0": "output"}, writers=(value,), heads=heads),
    )


def cross_attention_sites(model: Any, path: str, heads: Heads) -> tuple[Site, Site, Site]:
    """``cross_q_in``, ``cross_o_in`` and, of the text, ``cross_kv_in`` of an ``Attention`` of diffusers to a text."""
    return (
        linear_site(model, "cross_q_in", {f"{path}.to_q": "query"}),
        linear_site(model, "cross_o_in", {f"{path}.to_out.0": "output"}, heads=heads),
        linear_site(model, "cross_kv_in", {f"{path}.to_k": "key", f"{path}.to_v": "value"}),
    )


def feed_forward(
    model: Any, path: str, norm: str | None = None, modulation: Modulation | None = None
) -> tuple[Site, Site]:
    """``ug_in`` and ``down_in`` of a ``FeedForward`` of diffusers.

    Raises:
        ArchitectureError: an activation that is not known here.
    """
    module = model.get_submodule(path)
    kind, width = type(module.net[0]).__name__, module.net[2].in_features
    projection, down = f"{path}.net.0.proj", LinearRef(f"{path}.net.2", "down")
    if kind in _PLAIN:
        widening: tuple[LinearRef, ...] = (LinearRef(projection, "up"),)
    elif kind in _GATED:
        widening = (
            LinearRef(projection, "up", (0, width)),
            LinearRef(projection, "gate", (width, 2 * width)),
        )
    else:
        known = ", ".join((*_PLAIN, *_GATED))
        raise ArchitectureError(
            f"{path} has the activation {kind}, which is not described; known: {known}"
        )
    hidden = module.net[2].out_features
    return (
        Site("ug_in", hidden, widening, norm=norm, modulation=modulation),
        Site("down_in", width, (down,), writers=widening),
    )


@describes("DiTTransformer2DModel", kind="diffusion")
def dit(model: Any) -> Anatomy:
    """Anatomy of a ``DiTTransformer2DModel``."""
    config = model.config
    heads = heads_of(config)
    hidden = heads.query * heads.size
    # An affine norm before the modulation would have to take a scale in as well.
    plain = not config.norm_elementwise_affine

    def block(index: int) -> Block:
        name = f"transformer_blocks.{index}"
        condition = f"{name}.norm1.linear"
        embedder = f"{name}.norm1.emb.timestep_embedder"
        first, second = adaptive(condition, hidden, 0), adaptive(condition, hidden, 3)
        return Block(
            index=index,
            name=name,
            sites=(
                *attention_sites(model, f"{name}.attn1", heads, f"{name}.norm1.norm", first),
                *(
                    feed_forward(model, f"{name}.ff", f"{name}.norm3", second)
                    if plain
                    else feed_forward(model, f"{name}.ff")
                ),
            ),
            kept=(
                linear_site(model, "time_in", {f"{embedder}.linear_1": "condition"}),
                linear_site(model, "time_hidden", {f"{embedder}.linear_2": "condition"}),
                linear_site(model, "condition_in", {condition: "condition"}),
            ),
        )

    return Anatomy(
        family="dit",
        kind="diffusion",
        hidden_size=hidden,
        blocks=tuple(block(index) for index in range(config.num_layers)),
        inputs=(
            Input("hidden_states", (config.in_channels, config.sample_size, config.sample_size)),
            Input("timestep", below=1000),
            Input("class_labels", below=config.num_embeds_ada_norm),
        ),
    )
