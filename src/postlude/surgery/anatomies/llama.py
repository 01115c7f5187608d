"""Llama and its relatives: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Mistral has the same modules; Qwen2 adds biases to Q, K and V; Qwen3 adds an RMSNorm on every query and key
head before the rotary embedding. None of that changes where the sites are.

Models that hold such a decoder somewhere else (audio language models) take its parts from :func:`decoder_parts`.
"""

from __future__ import annotations

from typing import Any

from postlude.surgery.anatomy import (
    Heads,
    LanguageAnatomy,
    LanguageBlock,
    LinearRef,
    Site,
    describes,
)

__all__ = ["decoder_parts", "llama"]


@describes("llama", "mistral", "qwen2", "qwen3")
def llama(model: Any) -> LanguageAnatomy:
    """Anatomy of a ``LlamaForCausalLM``-shaped model."""
    return LanguageAnatomy(family="llama", head="lm_head", **decoder_parts(model.config, "model"))


def decoder_parts(config: Any, decoder: str) -> dict[str, Any]:
    """What a :class:`LanguageAnatomy` says of a decoder of this shape, wherever it is.

    Args:
        config: of the decoder.
        decoder: its path.
    """
    query = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // query
    heads = Heads(query, config.num_key_value_heads, size)
    hidden, product = config.hidden_size, config.intermediate_size

    def block(index: int) -> LanguageBlock:
        name = f"{decoder}.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        q, k, v = (
            LinearRef(f"{attention}.q_proj", "query"),
            LinearRef(f"{attention}.k_proj", "key"),
            LinearRef(f"{attention}.v_proj", "value"),
        )
        gate, up = LinearRef(f"{mlp}.gate_proj", "gate"), LinearRef(f"{mlp}.up_proj", "up")
        out, down = (
            LinearRef(f"{attention}.o_proj", "output"),
            LinearRef(f"{mlp}.down_proj", "down"),
        )
        return LanguageBlock(
            index=index,
            name=name,
            attention=attention,
            activation=f"{mlp}.act_fn",
            gated=True,
            sites=(
                Site("qkv_in", hidden, (q, k, v), norm=f"{name}.input_layernorm"),
                Site("o_in", query * size, (out,), writers=(v,), heads=heads),
                Site("ug_in", hidden, (gate, up), norm=f"{name}.post_attention_layernorm"),
                Site("down_in", product, (down,), writers=(gate, up)),
            ),
        )

    return {
        "hidden_size": hidden,
        "embeddings": (f"{decoder}.embed_tokens",),
        "blocks": tuple(block(index) for index in range(config.num_hidden_layers)),
        "decoder": decoder,
        "final_norm": f"{decoder}.norm",
        "norm_kind": "rms",
        "context": config.max_position_embeddings,
    }
