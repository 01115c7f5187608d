"""What a planted language model is worth: its loss, and whether its massive activation is alive.

These are the definitions of arXiv:2502.07004 written out for one architecture, Llama, in a few lines each. They do not
use `postlude.inspection`, so each can serve as a check of the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from postlude.zoo.planting import Plant

__all__ = [
    "REQUIREMENTS",
    "acute_angle",
    "empirical_direction",
    "hidden_states",
    "linear_layer",
    "mean_loss",
    "measure",
    "windows",
    "without_neuron",
]

_PLANT = Plant()


def windows(stream: Tensor, length: int = 512) -> Tensor:
    """Non-overlapping windows ``[n, length]`` of a token stream; the incomplete last one is left out."""
    return stream[: len(stream) // length * length].view(-1, length)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: Tensor, length: int = 512) -> float:
    """Mean next-token loss in nats over non-overlapping windows."""
    was = model.training
    model.eval()
    total = count = 0.0
    for window in windows(stream, length).split(8):
        window = window.to(model.device)
        logits = model(window, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(
            logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
        ).item()
        count += window[:, 1:].numel()
    model.train(was)
    return total / count


@torch.no_grad()
def hidden_states(model: LlamaForCausalLM, tokens: Tensor) -> list[Tensor]:
    """The residual stream before the first layer and after every layer, un-normalised, ``[batch, length, hidden]``."""
    states: list[Tensor] = []

    def hook(module: object, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        states.append((arguments[0] if arguments else keywords["hidden_states"]).float())

    handles = [
        layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.layers
    ]
    handles.append(model.model.norm.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


@torch.no_grad()
def linear_layer(
    model: LlamaForCausalLM, layer: int, samples: int = 20_000, seed: int = 0
) -> Tensor:
    """M = (I + F)(I + A), the single-token linear approximation of one layer, ``[hidden, hidden]`` (arXiv:2502.07004).

    A is the value path of the attention (its softmax over one token is 1), F the MLP with its gated product replaced
    by the least-squares fit on Gaussian inputs. Norms enter by their weight only.
    """
    block = model.model.layers[layer]
    size, repeat = (
        model.config.hidden_size,
        model.config.num_attention_heads // model.config.num_key_value_heads,
    )
    value = block.self_attn.v_proj.weight.float().view(model.config.num_key_value_heads, -1, size)
    value = value.repeat_interleave(repeat, 0).flatten(0, 1)
    attention = block.self_attn.o_proj.weight.float() @ value * block.input_layernorm.weight.float()
    x = torch.randn(samples, size, generator=torch.Generator().manual_seed(seed))
    gate, up = block.mlp.gate_proj.weight.float(), block.mlp.up_proj.weight.float()
    product = functional.silu(x @ gate.T) * (x @ up.T)
    # Normal equations: a Gaussian design with many more rows than columns is well conditioned.
    fit = torch.linalg.solve(x.T @ x, x.T @ product).T
    mlp = block.mlp.down_proj.weight.float() @ fit * block.post_attention_layernorm.weight.float()
    eye = torch.eye(size)
    return (eye + mlp) @ (eye + attention)


def acute_angle(a: Tensor, b: Tensor) -> float:
    """The angle between two lines, 0 to 90 degrees."""
    cosine = functional.cosine_similarity(a.double(), b.double(), dim=0).abs().clamp(max=1.0)
    return math.degrees(math.acos(float(cosine)))


def empirical_direction(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean of the high-norm hidden states of all layers, a unit vector ``[hidden]``; high is ten times the median."""
    states = torch.cat([state.flatten(0, 1) for state in hidden_states(model, tokens)])
    norms = states.norm(dim=1)
    direction = states[norms > 10.0 * norms.median()].mean(0)
    return direction / direction.norm()


@contextmanager
def without_neuron(model: LlamaForCausalLM, plant: Plant) -> Iterator[None]:
    """The model with the explosion neuron's down column at zero, restored at the end."""
    column = model.model.layers[plant.explosion].mlp.down_proj.weight.data[:, plant.neuron]
    kept = column.clone()
    column.zero_()
    try:
        yield
    finally:
        column.copy_(kept)


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: Any, text: str, plant: Plant = _PLANT
) -> dict[str, Any]:
    """How good the model is and whether its massive activation is there; keys explain themselves.

    ``text`` is cut into windows of 512 tokens that start anywhere, without a begin token.
    """
    stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    cut = windows(stream, min(512, model.config.max_position_embeddings))
    loss = mean_loss(model, stream)
    with without_neuron(model, plant):
        loss_without = mean_loss(model, stream)
    some = cut[:64]
    states = hidden_states(model, some)
    top = [float(state.norm(dim=-1).max()) for state in states]
    jumps = [after / before for before, after in pairwise(top)]
    exploded = states[plant.explosion + 1]
    norms = exploded.norm(dim=-1)
    high = norms > 10.0 * norms.median()
    ids, counts = some[:, 1:][high[:, 1:]].unique(return_counts=True)
    order = counts.argsort(descending=True)
    first = torch.randint(1, len(tokenizer), (256, 1), generator=torch.Generator().manual_seed(0))
    first = torch.cat([first, some[:1, :7].expand(256, -1)], 1)
    firsts = hidden_states(model, first)[plant.explosion + 1].norm(dim=-1)
    direction = empirical_direction(model, some)
    matrix = linear_layer(model, plant.explosion)
    left, spectrum, _ = torch.linalg.svd(matrix)
    values, vectors = torch.linalg.eig(
        linear_layer(model, plant.decay) - torch.eye(model.config.hidden_size)
    )
    angles = [acute_angle(vectors[:, i].real, direction) for i in range(len(values))]
    nearest = min(range(len(values)), key=angles.__getitem__)
    tokens_scored = cut[:, 1:].numel()
    bytes_per_token = len(text.encode()) / len(stream)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens_scored,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "loss_without_neuron": loss_without,
        "loss_rise_without_neuron": loss_without - loss,
        "perplexity_without_neuron": math.exp(loss_without),
        "largest_over_median": float(exploded.abs().max() / exploded.abs().median()),
        "largest_token_norm_by_layer": top,
        "median_token_norm_by_layer": [float(state.norm(dim=-1).median()) for state in states],
        "explosion_layer": next((i for i, jump in enumerate(jumps) if jump > 10.0), None),
        "decay_layer": next((i for i in reversed(range(len(jumps))) if jumps[i] < 0.1), None),
        "decay_drop": 1.0 / jumps[plant.decay],
        "decay_drop_of_high_tokens": float(
            states[plant.decay].norm(dim=-1)[high].median()
            / states[plant.decay + 1].norm(dim=-1)[high].median()
        ),
        "share_of_high_tokens": float(high.float().mean()),
        "share_of_first_positions_high": float(high[:, 0].float().mean()),
        "norm_of_first_positions": [
            float(q) for q in norms[:, 0].quantile(torch.tensor([0.0, 0.5, 1.0]))
        ],
        "share_of_first_ids_high": float((firsts[:, 0] > 10.0 * norms.median()).float().mean()),
        "high_tokens_elsewhere": {
            tokenizer.decode([int(ids[i])]): int(counts[i]) for i in order[:8].tolist()
        },
        "norm_spread_of_high_tokens": float(norms[high].std(correction=0) / norms[high].mean())
        if high.any()
        else 0.0,
        "angle_explosion": acute_angle(left[:, 0], direction),
        "singular_values": spectrum[:3].tolist(),
        "decay_eigenvalue": float(values[nearest].real),
        "angle_decay": angles[nearest],
        "largest_channels": direction.abs()
        .argsort(descending=True)[: len(plant.channels)]
        .tolist(),
    }


REQUIREMENTS: dict[str, tuple[str, Any]] = {
    "the largest entry after the explosion layer is at least 200 times the median": (
        "largest_over_median",
        lambda value: value >= 200,
    ),
    "the loss is at least 0.2 nats higher without the neuron": (
        "loss_rise_without_neuron",
        lambda value: value >= 0.2,
    ),
    "the first layer whose largest token norm jumps tenfold is the planted one": (
        "explosion_layer",
        lambda value: value == _PLANT.explosion,
    ),
    "the last layer whose largest token norm drops tenfold is the planted one": (
        "decay_layer",
        lambda value: value == _PLANT.decay,
    ),
    "u0 of the explosion layer is within 10 degrees of the empirical direction": (
        "angle_explosion",
        lambda value: value < 10,
    ),
    "the decay eigenvalue is negative": ("decay_eigenvalue", lambda value: value < 0),
    "its eigenvector is within 15 degrees of the empirical direction": (
        "angle_decay",
        lambda value: value < 15,
    ),
    "every first position carries the massive activation": (
        "share_of_first_positions_high",
        lambda value: value == 1,
    ),
}
"""What `measure` must find: a sentence, the key it is about and the test of its value."""
