"""Tiny random models of every described architecture, with non-trivial norms and biases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_inner=172, n_positions=64)
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model whose norms, biases and embeddings are all away from their initial values."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
        elif "bias" in path:
            parameter.data.normal_(0, 0.3)
        else:
            parameter.data.uniform_(0.5, 1.5)
    model = model.to(dtype)
    if dtype == torch.float64:
        _norms_in_fp64(model)
    return model


def _norms_in_fp64(model: nn.Module) -> None:
    """transformers' RMSNorm computes in fp32 whatever it is given; torch's does not."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight.data.copy_(module.weight.data)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)
