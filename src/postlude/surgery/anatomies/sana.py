"""Sana of diffusers (arXiv:2410.10629): linear attention, cross-attention to a text, an MLP of convolutions.

Timestep and text are as in PixArt. The perceptron is made of 1 x 1 and depthwise convolutions; they are no linear
layers and stay in floating point.
"""

from __future__ import annotations

from typing import Any

from postlude.errors import ArchitectureError
from postlude.surgery.anatomies.dit import attention_sites, cross_attention_sites, heads_of
from postlude.surgery.anatomy import Anatomy, Block, Heads, Input, describes

__all__ = ["sana"]

_CONVOLUTIONS = ("conv_inverted", "conv_depth", "conv_point")


@describes("SanaTransformer2DModel", kind="diffusion")
def sana(model: Any) -> Anatomy:
    """Anatomy of a ``SanaTransformer2DModel``."""
    config = model.config
    if config.cross_attention_dim is None:
        raise ArchitectureError("Sana without cross-attention is not described")
    own, count = heads_of(config), config.num_cross_attention_heads
    cross_heads = Heads(count, count, config.cross_attention_head_dim)

    def block(index: int) -> Block:
        name = f"transformer_blocks.{index}"
        queries, output, keys_values = cross_attention_sites(model, f"{name}.attn2", cross_heads)
        return Block(
            index=index,
            name=name,
            sites=(
                *attention_sites(model, f"{name}.attn1", own),
                queries,
                output,
            ),
            kept=(keys_values,),
            float_modules=tuple(f"{name}.ff.{part}" for part in _CONVOLUTIONS),
        )

    image = (config.in_channels, config.sample_size, config.sample_size)
    return Anatomy(
        family="sana",
        kind="diffusion",
        hidden_size=own.query * own.size,
        blocks=tuple(block(index) for index in range(config.num_layers)),
        inputs=(
            Input("hidden_states", image),
            Input("encoder_hidden_states", (8, config.caption_channels)),
            Input("timestep", below=1000),
            *((Input("guidance"),) if config.guidance_embeds else ()),
        ),
    )
