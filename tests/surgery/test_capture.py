from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from postlude.surgery.anatomy import Anatomy, anatomy_of
from postlude.surgery.batches import token_batches
from postlude.surgery.capture import BlockWalk, observe

from .models import MODELS, build

TOKENS = torch.randint(0, 97, (5, 8), generator=torch.Generator().manual_seed(2))


def inputs_of_sites(model: nn.Module, anatomy: Anatomy) -> dict[tuple[int, str], Tensor]:
    """By hooks on the whole model, all sequences at once."""
    found: dict[tuple[int, str], Tensor] = {}
    handles = []
    for block, site in anatomy.sites():
        key = (block.index, site.name)
        handles.append(
            model.get_submodule(site.modules[0]).register_forward_pre_hook(
                lambda _, args, key=key: found.__setitem__(key, args[0])
            )
        )
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_observers_see_what_the_linears_read(name: str) -> None:
    model = build(name)
    anatomy = anatomy_of(model)
    expected = inputs_of_sites(model, anatomy)
    seen: dict[tuple[int, str], list[Tensor]] = {key: [] for key in expected}
    stream: dict[int, list[Tensor]] = {}
    observe(
        model,
        anatomy,
        token_batches(TOKENS, tokens_per_batch=16),
        {key: parts.append for key, parts in seen.items()},
        residual=lambda index, hidden: stream.setdefault(index, []).append(hidden),
    )
    for key, parts in seen.items():
        assert [len(part) for part in parts] == [2, 2, 1]
        torch.testing.assert_close(torch.cat(parts), expected[key])
    with torch.no_grad():
        states = model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    assert sorted(stream) == [-1, 0, 1]
    torch.testing.assert_close(torch.cat(stream[-1]), states[0])
    torch.testing.assert_close(torch.cat(stream[0]), states[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_goes_where_the_whole_model_goes(name: str) -> None:
    model = build(name)
    anatomy = anatomy_of(model)
    expected = inputs_of_sites(model, anatomy)
    walk = BlockWalk(model, anatomy, TOKENS, tokens_per_batch=16)
    for block in anatomy.blocks:
        for site in block.sites:  # one at a time: the block is left early
            parts: list[Tensor] = []
            walk.observe(block, {site.name: parts.append})
            torch.testing.assert_close(torch.cat(parts), expected[block.index, site.name])
        walk.advance(block)
    with torch.no_grad():
        again = inputs_of_sites(model, anatomy)  # nothing is left behind in the model
    assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_the_next_block_of_a_walk_sees_what_was_done_to_this_one() -> None:
    model = build("llama")
    anatomy = anatomy_of(model)
    walk = BlockWalk(model, anatomy, TOKENS)
    first, second = anatomy.blocks
    first.linear("down").weight(model).mul_(3)
    walk.advance(first)
    parts: list[Tensor] = []
    walk.observe(second, {"qkv_in": parts.append})
    torch.testing.assert_close(torch.cat(parts), inputs_of_sites(model, anatomy)[1, "qkv_in"])
