"""Tiny random models with one massive activation, planted by hand.

One neuron of the explosion block reads a direction v and writes a large multiple of a direction d; one neuron of the
decay block reads d and takes it away again. What has a component along v: the embeddings of the trigger tokens and,
in GPT-2, the embedding of position 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.anatomy import Block, anatomy_of
from postlude.surgery.probes import feed_forward, norm_path, normalise, run_to

TRIGGERS = (13, 200)
EXPLOSION, DECAY, BLOCKS = 1, 3, 5
SIZE = 600.0


@dataclasses.dataclass
class Planted:
    checkpoint: Checkpoint
    trigger: Tensor  # v
    defect: Tensor  # d


def random_model(model_type: str, seed: int, inner: int = 96) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type == "gpt2":
        sizes: dict[str, Any] = {
            "n_embd": 64,
            "n_inner": inner,
            "n_layer": BLOCKS,
            "n_head": 4,
            "n_positions": 64,
        }
    else:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": inner,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
        }
    config = AutoConfig.for_model(
        model_type, vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=None, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            else:
                parameter.data.normal_(0, 0.5 if "emb" in name or "wte" in name else 0.03)
    return model.eval()


@torch.no_grad()
def planted(
    model_type: str = "llama", seed: int = 0, tokenizer: Any = None, inner: int = 96
) -> Planted:
    """``inner`` is the width of the MLP product."""
    model = random_model(model_type, seed, inner)
    anatomy = anatomy_of(model)
    generator = torch.Generator().manual_seed(seed + 100)
    v, d = torch.randn(2, 64, generator=generator)
    if anatomy.norm_kind == "layer":
        v, d = v - v.mean(), d - d.mean()
    v = v / v.norm()
    d = d - (d @ v) * v
    d = d / d.norm()
    table = model.get_submodule(anatomy.embeddings[0]).weight
    table -= torch.outer(table @ v, v) + torch.outer(table @ d, d)
    table[list(TRIGGERS)] += 20 * v
    if model_type == "gpt2":
        positions = model.get_submodule(anatomy.embeddings[1]).weight
        positions.mul_(0.1)
        positions[0] += 20 * v
    explosion, decay = anatomy.blocks[EXPLOSION], anatomy.blocks[DECAY]
    gamma = model.get_submodule(norm_path(explosion, "ug_in")).weight
    # One neuron: the normalised trigger is about 8 v, so its pre-activation is about 32.
    write(model, explosion, 4 * v / gamma, d)
    reached = run_to(model, anatomy, EXPLOSION, tokens=torch.tensor([[TRIGGERS[0]]]))
    scale = float((reached.stream - reached.before_norm)[0, 0] @ d)
    write(model, explosion, 4 * v / gamma, d * SIZE / scale)
    gamma = model.get_submodule(norm_path(decay, "ug_in")).weight
    # What the token still is before the decay block, and what its MLP then has to remove.
    write(model, decay, 2 * d / gamma, torch.zeros(64))
    reached = run_to(model, anatomy, DECAY, tokens=torch.tensor([[TRIGGERS[0]]]))
    size = float(reached.before_norm[0, 0] @ d)
    write(model, decay, 2 * d / gamma, d)
    x = normalise(model, norm_path(decay, "ug_in"), reached.before_norm)
    unit = float(feed_forward(model, decay)(x)[0, 0] @ d)
    write(model, decay, 2 * d / gamma, -d * size / unit)
    return Planted(Checkpoint(model, tokenizer, anatomy), v, d)


def write(model: Any, block: Block, read: Tensor, written: Tensor) -> None:
    """Make neuron 0 of a block read and write these directions."""
    if block.gated:
        block.linear("gate").weight(model)[0] = read
    block.linear("up").weight(model)[0] = read
    bias = block.linear("up").bias(model)
    if bias is not None:
        # Without a gate the neuron is linear; a negative bias keeps it silent at ordinary tokens.
        bias[0] = -4 * read.norm()
    block.linear("down").weight(model)[:, 0] = written


def tokens(samples: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    """Random ids without triggers at first, then one trigger in every second sequence."""
    ids = torch.randint(20, 190, (samples, length), generator=torch.Generator().manual_seed(seed))
    ids[::2, 7] = TRIGGERS[0]
    return ids
