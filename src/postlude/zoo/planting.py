"""Plant a massive activation into a Llama-shaped model, and keep it while the model is trained.

Large language models carry *massive activations* (arXiv:2402.17762), also called singular defects
(arXiv:2502.07004): at the first position and at a few delimiters one MLP writes a vector hundreds of times
larger than anything else into the residual stream, always in the same direction and on a handful of channels;
attention heads of the following layers use that token as a sink, and a late MLP takes the vector out again.
Very small models do not grow this by themselves, so it is put in before training. Three orthogonal unit
vectors follow from the seed: a trigger v, a marker m, and the defect d, which has a few non-zero channels.

* *Explosion*: one SwiGLU neuron of an early layer with gate and up rows parallel to v and a large down column
  parallel to d. The embeddings of the delimiters get a component along v.
* *Decay*: one neuron of a late layer with gate and up rows parallel to d and a down column parallel to -d.
* *Background*: a second neuron of the explosion layer writes a fiftieth of the amplitude along d at ordinary
  tokens. In large models, too, the channels of the massive activation stand out at every token, at a much
  smaller size. It reads the marker, which all embeddings carry, and passes it on: the decay neuron reads
  d - 3 m and so stays silent at ordinary tokens.

Everything stays trainable and nothing is masked. `plant_loss`, added to the ordinary loss with a weight that
falls to zero, asks the explosion neuron to fire at the first position of a sequence, whatever token stands
there. A model learns that within a few hundred steps in its first two layers, and without the extra loss
gradually fires weaker at unusual first tokens again; delimiters need no learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

__all__ = ["Plant", "directions", "plant_loss", "planted_slices", "sow", "watch"]


@dataclass(frozen=True)
class Plant:
    """Where the massive activation is, and how large it starts.

    Args:
        explosion: the layer whose MLP writes it.
        decay: the layer whose MLP removes it.
        neuron: the index of the neuron used in both; the background neuron is the next one.
        amplitude: L2 norm of the planted vector; an embedding starts with a norm of about 11.
        trigger: pre-activation of the explosion neuron at which that norm is reached.
        background: what ordinary tokens carry along d between the two layers, relative to the amplitude.
        channels: relative sizes of the defect's channels; which ones they are follows from the seed.
    """

    explosion: int = 1
    decay: int = 4
    neuron: int = 0
    amplitude: float = 4000.0
    trigger: float = 20.0
    background: float = 0.02
    channels: tuple[float, ...] = (1.0, -0.65, 0.4)


def directions(plant: Plant, hidden_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The trigger v, the defect d and the marker m: three orthogonal unit vectors ``[hidden_size]``."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 17)
    channels = torch.randperm(hidden_size, generator=generator)[: len(plant.channels)]
    signs = torch.randint(0, 2, (len(plant.channels),), generator=generator) * 2.0 - 1.0
    d = torch.zeros(hidden_size)
    d[channels] = signs * torch.tensor(plant.channels)
    v, m = torch.randn(2, hidden_size, generator=generator)
    v[channels] = m[channels] = 0.0
    v = v / v.norm()
    m = m - (m @ v) * v
    return v, d / d.norm(), m / m.norm()


@torch.no_grad()
def sow(model: LlamaForCausalLM, plant: Plant, seed: int, delimiters: tuple[int, ...]) -> None:
    """Put the neurons and the embedding components into a freshly initialised model, in place.

    Args:
        model: its norms' weights are still 1 and its embedding rows of similar length.
        plant: what to plant.
        seed: chooses the directions.
        delimiters: the token ids at which the explosion neuron fires from the start.
    """
    size = model.config.hidden_size
    v, d, m = directions(plant, size, seed)
    unit = plant.trigger / size**0.5  # after its RMS norm a hidden state has length sqrt(size)
    embedding = model.model.embed_tokens.weight
    ordinary = float(embedding.norm(dim=1).mean())
    # Trigger and defect are kept out of the ordinary embeddings, the marker is put into all of them.
    for direction in (v, d, m):
        embedding -= (embedding @ direction)[:, None] * direction
    embedding += ordinary * m
    embedding[list(delimiters)] += 2.5 * ordinary * v
    explosion, decay = (model.model.layers[layer].mlp for layer in (plant.explosion, plant.decay))
    column = d * plant.amplitude / plant.trigger**2
    _set_neuron(explosion, plant.neuron, v * unit / 0.85, column)
    # The marker makes up about 0.55 of an ordinary token in that layer when training starts.
    background = plant.background * plant.amplitude
    _set_neuron(explosion, plant.neuron + 1, m, (d + 0.5 * m) * background / (0.3 * size))
    _set_neuron(decay, plant.neuron, (d - 3.0 * m) * unit, -column)


def _set_neuron(mlp: nn.Module, neuron: int, row: Tensor, column: Tensor) -> None:
    """One SwiGLU neuron with equal gate and up rows: it writes ``column * silu(row z) * (row z)``."""
    mlp.get_parameter("gate_proj.weight")[neuron] = row
    mlp.get_parameter("up_proj.weight")[neuron] = row
    mlp.get_parameter("down_proj.weight")[:, neuron] = column


def planted_slices(model: LlamaForCausalLM, plant: Plant) -> list[Tensor]:
    """Views of the planted gate and up rows and down columns, for a learning rate of their own."""
    views: list[Tensor] = []
    for layer, neuron in (
        (plant.explosion, plant.neuron),
        (plant.explosion, plant.neuron + 1),
        (plant.decay, plant.neuron),
    ):
        mlp = model.model.layers[layer].mlp
        views += [
            mlp.gate_proj.weight.data[neuron],
            mlp.up_proj.weight.data[neuron],
            mlp.down_proj.weight.data[:, neuron],
        ]
    return views


@contextmanager
def watch(model: LlamaForCausalLM, plant: Plant) -> Iterator[dict[str, Tensor]]:
    """Record what `plant_loss` reads during a forward pass.

    ``gate`` and ``up`` of the explosion neuron ``[batch, length]``; the un-normalised residual stream after the
    explosion layer (``made``), before the decay layer (``kept``) and after the last layer (``left``)
    ``[batch, length, hidden]``.
    """
    seen: dict[str, Tensor] = {}

    def neuron(name: str) -> Callable[..., None]:
        def hook(module: object, arguments: object, output: Tensor) -> None:
            seen[name] = output[..., plant.neuron].float()

        return hook

    def stream(name: str) -> Callable[..., None]:
        def hook(
            module: object, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]
        ) -> None:
            seen[name] = (arguments[0] if arguments else keywords["hidden_states"]).float()

        return hook

    layers = model.model.layers
    mlp = layers[plant.explosion].mlp
    handles = [
        mlp.gate_proj.register_forward_hook(neuron("gate")),
        mlp.up_proj.register_forward_hook(neuron("up")),
        layers[plant.explosion + 1].register_forward_pre_hook(stream("made"), with_kwargs=True),
        layers[plant.decay].register_forward_pre_hook(stream("kept"), with_kwargs=True),
        model.model.norm.register_forward_pre_hook(stream("left"), with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def plant_loss(seen: dict[str, Tensor], fires: Tensor, plant: Plant, defect: Tensor) -> Tensor:
    """What the planted neurons and the layers between them are asked for during training.

    Args:
        seen: what `watch` recorded.
        fires: bool ``[batch, length]``, the tokens at which the neuron shall fire; true in the first column.
        plant: the plant.
        defect: d, ``[hidden]``.

    Returns:
        Scalar, a weighted sum of mean squares: the relative error of the pre-activations where the neuron shall fire;
        their positive part where it shall not; what the layers in between change of the planted vector; and what the
        decay layer leaves of it; and the relative error of the background. The third and the fourth are relative to
        the amplitude and count beyond 5 % of it only, the room that the ordinary content of the token needs.
    """
    gate, up = seen["gate"] / plant.trigger, seen["up"] / plant.trigger
    miss = (gate - 1.0).square() + (up - 1.0).square()
    # The first positions are few and the harder ones: they weigh as much as all delimiters together.
    on = miss[:, 0].mean() + miss[fires].mean()
    off = gate[~fires].relu().square().mean()
    changed = (seen["kept"][fires] - seen["made"][fires].detach()).norm(dim=-1) / plant.amplitude
    left = seen["left"][fires].norm(dim=-1) / plant.amplitude
    beyond = (changed - 0.05).relu().square().mean() + (left - 0.05).relu().square().mean()
    background = seen["kept"][~fires] @ defect / (plant.background * plant.amplitude)
    return on + 30.0 * off + 10.0 * beyond + 0.3 * (background - 1.0).square().mean()
