"""Vision transformers: LayerNorm with bias, separate projections, plain MLP; ViT, DeiT, and DINOv2 with LayerScale.

LayerScale multiplies the output of a branch, so it changes nothing about what the linears read. DINOv2's giant
model has a gated MLP.
"""

from __future__ import annotations

from typing import Any

from postlude.surgery.anatomy import Anatomy, Block, Heads, Input, LinearRef, Site, describes

__all__ = ["vision_anatomy", "vit"]


@describes("vit", "deit", "dinov2", kind="vision")
def vit(model: Any) -> Anatomy:
    """Anatomy of the models of transformers, with or without a head."""
    backbone = model.config.model_type
    return vision_anatomy(model, f"{backbone}." if hasattr(model, backbone) else "")


def vision_anatomy(model: Any, prefix: str) -> Anatomy:
    """Anatomy of a model that holds a ``ViTModel``, ``DeiTModel`` or ``Dinov2Model`` somewhere.

    Args:
        prefix: the path of that module with a dot at its end; empty where it is the model itself.
    """
    backbone = model.get_submodule(prefix.rstrip("."))
    config = backbone.config
    hidden = config.hidden_size
    heads = Heads(
        config.num_attention_heads,
        config.num_attention_heads,
        getattr(config, "head_dim", None) or hidden // config.num_attention_heads,
    )
    nested = hasattr(backbone, "encoder")
    layers = backbone.encoder.layer if nested else backbone.layers
    first, second = (
        ("norm1", "norm2")
        if hasattr(layers[0], "norm1")
        else ("layernorm_before", "layernorm_after")
    )

    def block(index: int) -> Block:
        name = f"{prefix}{'encoder.layer' if nested else 'layers'}.{index}"
        q, k, v = (
            LinearRef(f"{name}.attention.q_proj", "query"),
            LinearRef(f"{name}.attention.k_proj", "key"),
            LinearRef(f"{name}.attention.v_proj", "value"),
        )
        out = LinearRef(f"{name}.attention.o_proj", "output")
        mlp = layers[index].mlp
        if hasattr(mlp, "gate_proj"):
            widening: tuple[LinearRef, ...] = (
                LinearRef(f"{name}.mlp.gate_proj", "gate"),
                LinearRef(f"{name}.mlp.up_proj", "up"),
            )
            down, product = LinearRef(f"{name}.mlp.down_proj", "down"), mlp.down_proj.in_features
        else:
            widening = (LinearRef(f"{name}.mlp.fc1", "up"),)
            down, product = LinearRef(f"{name}.mlp.fc2", "down"), mlp.fc2.in_features
        return Block(
            index=index,
            name=name,
            sites=(
                Site("qkv_in", hidden, (q, k, v), norm=f"{name}.{first}"),
                Site("o_in", heads.query * heads.size, (out,), writers=(v,), heads=heads),
                Site("ug_in", hidden, widening, norm=f"{name}.{second}"),
                Site("down_in", product, (down,), writers=widening),
            ),
        )

    return Anatomy(
        family="vit",
        kind="vision",
        hidden_size=hidden,
        blocks=tuple(block(index) for index in range(len(layers))),
        inputs=(Input("pixel_values", (config.num_channels, *_size(config.image_size))),),
    )


def _size(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
