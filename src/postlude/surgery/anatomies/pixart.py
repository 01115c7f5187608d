"""PixArt of diffusers (arXiv:2310.00426, arXiv:2403.04692): DiT with cross-attention to a text.

One embedding of the timestep modulates all blocks, each adding a table of its own, so no norm of one block alone can
take a scale in. Keys and values of the cross-attention read the text; they are kept in floating point by default, as
in SVDQuant (arXiv:2411.05007).
"""

from __future__ import annotations

from typing import Any

from postlude.errors import ArchitectureError
from postlude.surgery.anatomies.dit import (
    attention_sites,
    cross_attention_sites,
    feed_forward,
    heads_of,
)
from postlude.surgery.anatomy import Anatomy, Block, Input, describes

__all__ = ["pixart"]


@describes("PixArtTransformer2DModel", kind="diffusion")
def pixart(model: Any) -> Anatomy:
    """Anatomy of a ``PixArtTransformer2DModel``."""
    config = model.config
    if config.attention_type != "default" or config.cross_attention_dim is None:
        raise ArchitectureError(
            f"PixArt with attention_type {config.attention_type!r} and cross_attention_dim "
            f"{config.cross_attention_dim} is not described; expected 'default' and a number"
        )
    heads = heads_of(config)

    def block(index: int) -> Block:
        name = f"transformer_blocks.{index}"
        queries, output, keys_values = cross_attention_sites(model, f"{name}.attn2", heads)
        return Block(
            index=index,
            name=name,
            sites=(
                *attention_sites(model, f"{name}.attn1", heads),
                queries,
                output,
                *feed_forward(model, f"{name}.ff"),
            ),
            kept=(keys_values,),
        )

    text = config.caption_channels or config.cross_attention_dim
    image = (config.in_channels, config.sample_size, config.sample_size)
    sizes = (
        Input("added_cond_kwargs.resolution", (2,)),
        Input("added_cond_kwargs.aspect_ratio", (1,)),
    )
    return Anatomy(
        family="pixart",
        kind="diffusion",
        hidden_size=heads.query * heads.size,
        blocks=tuple(block(index) for index in range(config.num_layers)),
        inputs=(
            Input("hidden_states", image),
            Input("encoder_hidden_states", (8, text)),
            Input("timestep", below=1000),
            *(sizes if model.use_additional_conditions else ()),
        ),
    )
