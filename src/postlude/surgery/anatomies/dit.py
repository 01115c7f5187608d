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
    Site,
    describes,
)

__all__ = ["dit", "feed_forward", "rows"]

_PLAIN = ("GELU", "ApproximateGELU", "LinearActivation")
# Class name of the activation to the order of its two halves.
_GATED = {"GEGLU": ("up", "gate"), "SwiGLU": ("up", "gate")}


def rows(module: str, width: int, part: int) -> LinearRef:
    """The ``part``-th vector of the given width that a linear of the condition computes."""
    return LinearRef(module, "condition", (part * width, (part + 1) * width))


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
    heads = Heads(config.num_attention_heads, config.num_attention_heads, config.attention_head_dim)
    hidden = heads.query * heads.size
    # An affine norm before the modulation would have to take a scale in as well.
    plain = not config.norm_elementwise_affine

    def block(index: int) -> Block:
        name = f"transformer_blocks.{index}"
        attention, condition = f"{name}.attn1", f"{name}.norm1.linear"
        embedder = f"{name}.norm1.emb.timestep_embedder"
        q, k, v = (
            LinearRef(f"{attention}.to_q", "query"),
            LinearRef(f"{attention}.to_k", "key"),
            LinearRef(f"{attention}.to_v", "value"),
        )
        first = Modulation(scale=rows(condition, hidden, 1), shift=rows(condition, hidden, 0))
        second = Modulation(scale=rows(condition, hidden, 4), shift=rows(condition, hidden, 3))
        out = LinearRef(f"{attention}.to_out.0", "output")
        frequencies = model.get_submodule(f"{embedder}.linear_1").in_features
        return Block(
            index=index,
            name=name,
            sites=(
                Site("qkv_in", hidden, (q, k, v), norm=f"{name}.norm1.norm", modulation=first),
                Site("o_in", hidden, (out,), writers=(v,), heads=heads),
                *feed_forward(
                    model,
                    f"{name}.ff",
                    f"{name}.norm3" if plain else None,
                    second if plain else None,
                ),
            ),
            kept=(
                Site("time_in", frequencies, (LinearRef(f"{embedder}.linear_1", "condition"),)),
                Site("time_hidden", hidden, (LinearRef(f"{embedder}.linear_2", "condition"),)),
                Site("condition_in", hidden, (LinearRef(condition, "condition"),)),
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
