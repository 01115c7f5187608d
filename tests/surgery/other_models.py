"""Tiny random denoisers and vision transformers; nothing in them is zero or one by its initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

IMAGE = {"in_channels": 2, "sample_size": 8, "patch_size": 2, "num_layers": 2}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 86,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 5,
}


def pixart(sample_size: int = 8) -> Any:
    return diffusers.PixArtTransformer2DModel(
        **{**IMAGE, "sample_size": sample_size},
        num_attention_heads=2,
        attention_head_dim=24,  # the size of an image is embedded in thirds
        cross_attention_dim=48,
        caption_channels=12,
        norm_num_groups=1,
    )


DENOISERS: dict[str, Callable[[], Any]] = {
    "dit": lambda: diffusers.DiTTransformer2DModel(
        **IMAGE, **HEADS, norm_num_groups=1, num_embeds_ada_norm=10
    ),
    "dit-geglu": lambda: diffusers.DiTTransformer2DModel(
        **IMAGE, **HEADS, norm_num_groups=1, num_embeds_ada_norm=10, activation_fn="geglu"
    ),
    "pixart": pixart,
    "sana": lambda: diffusers.SanaTransformer2DModel(
        **IMAGE,
        **HEADS,
        out_channels=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=12,
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        **HEADS,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ),
}
VISION_MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
    "vit-headless": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**VISION)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"})
    ),
    "dinov2-swiglu": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(
            **{k: v for k, v in VISION.items() if k != "intermediate_size"}, use_swiglu_ffn=True
        )
    ),
}
OTHER_MODELS = {**DENOISERS, **VISION_MODELS}


def build_other(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose output is of the order of one, with every parameter away from its initial value."""
    torch.manual_seed(seed)
    model = OTHER_MODELS[name]().eval()
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1 and "table" not in path:
            parameter.data.normal_(0, 0.15)
        elif parameter.ndim > 1 or "bias" in path:
            parameter.data.normal_(0, 0.3)
        else:
            parameter.data.uniform_(0.5, 1.5)
    return model.to(dtype)
