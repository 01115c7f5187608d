"""Flux of diffusers: blocks with an image and a text stream that attend to both, then blocks on the joined stream.

In a joined block, attention and perceptron read the same tensor and one linear reads both of their outputs. What
modulates, and the text stream while it is separate, is kept in floating point by default, as in SVDQuant
(arXiv:2411.05007).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from postlude.surgery.anatomies.dit import (
    adaptive,
    attention_sites,
    feed_forward,
    heads_of,
    linear_site,
)
from postlude.surgery.anatomy import Anatomy, Block, Input, Role, Site, describes

__all__ = ["flux"]

# Both kinds of blocks return the text first.
_STREAMS = ("encoder_hidden_states", "hidden_states")


@describes("FluxTransformer2DModel", kind="diffusion")
def flux(model: Any) -> Anatomy:
    """Anatomy of a ``FluxTransformer2DModel``."""
    config = model.config
    heads = heads_of(config)
    hidden = heads.query * heads.size

    def of_text(site: Site) -> Site:
        return dataclasses.replace(site, name=f"context_{site.name}")

    def separate(index: int) -> Block:
        name = f"transformer_blocks.{index}"
        attention, condition = f"{name}.attn", f"{name}.norm1.linear"
        text = f"{name}.norm1_context.linear"
        queries: dict[str, Role] = {
            f"{attention}.add_q_proj": "query",
            f"{attention}.add_k_proj": "key",
            f"{attention}.add_v_proj": "value",
        }
        ug, down = feed_forward(
            model, f"{name}.ff_context", f"{name}.norm2_context", adaptive(text, hidden, 3)
        )
        return Block(
            index=index,
            name=name,
            sites=(
                *attention_sites(
                    model, attention, heads, f"{name}.norm1.norm", adaptive(condition, hidden, 0)
                ),
                *feed_forward(model, f"{name}.ff", f"{name}.norm2", adaptive(condition, hidden, 3)),
            ),
            kept=(
                linear_site(model, "condition_in", {condition: "condition", text: "condition"}),
                linear_site(
                    model,
                    "context_qkv_in",
                    queries,
                    norm=f"{name}.norm1_context.norm",
                    modulation=adaptive(text, hidden, 0),
                ),
                linear_site(model, "context_o_in", {f"{attention}.to_add_out": "output"}),
                of_text(ug),
                of_text(down),
            ),
            streams=_STREAMS,
        )

    def joint(index: int) -> Block:
        name = f"single_transformer_blocks.{index}"
        readers: dict[str, Role] = {
            f"{name}.attn.to_q": "query",
            f"{name}.attn.to_k": "key",
            f"{name}.attn.to_v": "value",
            f"{name}.proj_mlp": "up",
        }
        return Block(
            index=config.num_layers + index,
            name=name,
            sites=(
                linear_site(
                    model,
                    "qkv_in",
                    readers,
                    norm=f"{name}.norm.norm",
                    modulation=adaptive(f"{name}.norm.linear", hidden, 0),
                ),
                linear_site(model, "o_in", {f"{name}.proj_out": "output"}),
            ),
            kept=(linear_site(model, "condition_in", {f"{name}.norm.linear": "condition"}),),
            streams=_STREAMS,
        )

    return Anatomy(
        family="flux",
        kind="diffusion",
        hidden_size=hidden,
        blocks=(
            *(separate(index) for index in range(config.num_layers)),
            *(joint(index) for index in range(config.num_single_layers)),
        ),
        inputs=(
            Input("hidden_states", (16, config.in_channels)),
            Input("encoder_hidden_states", (8, config.joint_attention_dim)),
            Input("pooled_projections", (config.pooled_projection_dim,)),
            Input("timestep"),
            Input("img_ids", (16, 3), below=4, rows=False),
            Input("txt_ids", (8, 3), below=1, rows=False),
            *((Input("guidance"),) if config.guidance_embeds else ()),
        ),
    )
