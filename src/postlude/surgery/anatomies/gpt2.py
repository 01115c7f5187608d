"""GPT-2: LayerNorm with bias, learned positions, fused QKV in a transposed ``Conv1D``, plain MLP."""

from __future__ import annotations

from typing import Any

from postlude.errors import ArchitectureError
from postlude.surgery.anatomy import (
    Heads,
    LanguageAnatomy,
    LanguageBlock,
    LinearRef,
    Site,
    describes,
)

__all__ = ["gpt2"]


@describes("gpt2")
def gpt2(model: Any) -> LanguageAnatomy:
    """Anatomy of a ``GPT2LMHeadModel``."""
    config = model.config
    if config.add_cross_attention:
        raise ArchitectureError(
            "GPT-2 with cross-attention is not described; use a decoder-only model"
        )
    hidden = config.n_embd
    product = config.n_inner or 4 * hidden
    heads = Heads(config.n_head, config.n_head, hidden // config.n_head)

    def block(index: int) -> LanguageBlock:
        name = f"transformer.h.{index}"
        fused = f"{name}.attn.c_attn"
        q = LinearRef(fused, "query", (0, hidden))
        k = LinearRef(fused, "key", (hidden, 2 * hidden))
        v = LinearRef(fused, "value", (2 * hidden, 3 * hidden))
        out = LinearRef(f"{name}.attn.c_proj", "output")
        up = LinearRef(f"{name}.mlp.c_fc", "up")
        down = LinearRef(f"{name}.mlp.c_proj", "down")
        return LanguageBlock(
            index=index,
            name=name,
            attention=f"{name}.attn",
            activation=f"{name}.mlp.act",
            gated=False,
            sites=(
                Site("qkv_in", hidden, (q, k, v), norm=f"{name}.ln_1"),
                Site("o_in", hidden, (out,), writers=(v,), heads=heads),
                Site("ug_in", hidden, (up,), norm=f"{name}.ln_2"),
                Site("down_in", product, (down,), writers=(up,)),
            ),
        )

    return LanguageAnatomy(
        family="gpt2",
        hidden_size=hidden,
        embeddings=("transformer.wte", "transformer.wpe"),
        blocks=tuple(block(index) for index in range(config.n_layer)),
        decoder="transformer",
        final_norm="transformer.ln_f",
        head="lm_head",
        norm_kind="layer",
        context=config.n_positions,
    )
