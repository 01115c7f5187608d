from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postlude.errors import SettingsError
from postlude.surgery import probes
from postlude.surgery.anatomy import anatomy_of

from .models import MODELS, build

KINDS = sorted(MODELS)


def tokens(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def states(model: nn.Module, ids: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(ids, output_hidden_states=True, **kwargs).hidden_states


@pytest.mark.parametrize("kind", KINDS)
def test_run_to_stops_where_the_whole_model_passes(kind: str) -> None:
    model = build(kind)
    anatomy = anatomy_of(model)
    ids = tokens()
    expected = states(model, ids)
    reached = probes.run_to(model, anatomy, 0, tokens=ids)
    torch.testing.assert_close(reached.stream, expected[1])
    embedded = model.get_submodule(anatomy.embeddings[0])(ids)
    again = probes.run_to(model, anatomy, 0, embeddings=embedded)
    torch.testing.assert_close(again.stream, reached.stream)
    # The block's second half, written out, leads from what the norm was given to the block's output.
    block = anatomy.blocks[0]
    x = probes.normalise(model, probes.norm_path(block, "ug_in"), reached.before_norm)
    mlp = probes.feed_forward(model, block, dtype=torch.float64)(x)
    torch.testing.assert_close(reached.before_norm + mlp, reached.stream, atol=1e-6, rtol=1e-6)
    shifted = probes.run_to(model, anatomy, 0, tokens=ids, first_position=3)
    learned = len(anatomy.embeddings) > 1
    # Rotary angles are float32, and only differences of positions count in them.
    assert torch.allclose(shifted.stream, reached.stream, atol=1e-3) is not learned
    torch.testing.assert_close(states(model, ids)[1], expected[1])  # nothing is left behind


@pytest.mark.parametrize("kind", KINDS)
def test_silenced_attention_leaves_tokens_alone(kind: str) -> None:
    model = build(kind)
    anatomy = anatomy_of(model)
    ids = tokens()
    with probes.attention_silenced(model, anatomy):
        together = probes.run_to(model, anatomy, 1, tokens=ids).stream
        alone = [
            probes.run_to(model, anatomy, 1, tokens=ids[:, i : i + 1], first_position=i).stream
            for i in range(ids.shape[1])
        ]
        before = probes.run_to(model, anatomy, 0, tokens=ids).before_norm
    torch.testing.assert_close(together, torch.cat(alone, dim=1))
    torch.testing.assert_close(before, states(model, ids)[0])
    assert not torch.allclose(together, probes.run_to(model, anatomy, 1, tokens=ids).stream)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_hidden_direction_is_hidden_from_the_norm_only(kind: str) -> None:
    model = build(kind)
    anatomy = anatomy_of(model)
    block = anatomy.blocks[1]
    norm = model.get_submodule(probes.norm_path(block, "ug_in"))
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen: list[Tensor] = []
    with probes.direction_hidden(model, probes.norm_path(block, "ug_in"), direction):
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        stream = probes.run_to(model, anatomy, 1, tokens=tokens()).stream
        handle.remove()
    assert float((seen[0] @ direction).abs().max()) < 1e-10
    whole = probes.run_to(model, anatomy, 1, tokens=tokens())
    mlp = probes.feed_forward(model, block, dtype=torch.float64)
    expected = whole.before_norm + mlp(
        probes.normalise(model, probes.norm_path(block, "ug_in"), seen[0])
    )
    torch.testing.assert_close(stream, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_path_is_attention_to_oneself(kind: str) -> None:
    """A single token, biases removed, its norm's division undone: exactly the matrix A."""
    model = build(kind)
    anatomy = anatomy_of(model)
    for block in anatomy.blocks:
        for role in ("value", "output"):
            bias = block.linear(role).bias(model)
            if bias is not None:
                bias.zero_()
        before = model.get_submodule(probes.norm_path(block, "qkv_in"))
        if getattr(before, "bias", None) is not None:
            before.bias.data.zero_()
    ids = tokens(3, 1)
    h = states(model, ids)[0][:, 0]
    block = anatomy.blocks[0]
    approximation = probes.approximate_block(model, anatomy, block, 200, seed=0)
    centred = h - h.mean(-1, keepdim=True) if anatomy.norm_kind == "layer" else h
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    added = probes.run_to(model, anatomy, 0, tokens=ids).before_norm[:, 0] - h
    torch.testing.assert_close(added * scale, h @ approximation.attention.T, atol=1e-3, rtol=1e-3)
    identity = torch.eye(64, dtype=torch.float64)
    a, f = approximation.attention, approximation.feed_forward
    torch.testing.assert_close(approximation.whole, (identity + f) @ (identity + a))
    torch.testing.assert_close(approximation.change + identity, approximation.whole)


@pytest.mark.parametrize("kind", ["llama-biases", "gpt2"])
def test_the_feed_forward_path_is_the_least_squares_fit(kind: str) -> None:
    """Against a dense solve for the wide inner product, as the definition has it."""
    model = build(kind)
    anatomy = anatomy_of(model)
    block = anatomy.blocks[1]
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(7))
    up = block.linear("up").weight(model).float()
    activation = model.get_submodule(block.activation)
    inner = x @ up.T
    gate = block.linear("gate").weight(model).float() if block.gated else None
    inner = activation(inner) if gate is None else activation(x @ gate.T) * inner
    solution = torch.linalg.lstsq(x.double(), inner.double()).solution.T
    gamma = model.get_submodule(probes.norm_path(block, "ug_in")).weight.double()
    expected = block.linear("down").weight(model).double() @ solution @ torch.diag(gamma)
    if anatomy.norm_kind == "layer":
        expected = expected @ (torch.eye(64).double() - 1 / 64)
    found = probes.approximate_block(model, anatomy, block, 300, seed=7).feed_forward
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)


def test_too_few_samples_are_refused() -> None:
    model = build("llama")
    anatomy = anatomy_of(model)
    with pytest.raises(SettingsError, match="at least 64"):
        probes.approximate_block(model, anatomy, anatomy.blocks[0], 63, seed=0)
