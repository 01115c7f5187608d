"""Anatomies of models that are no language models: complete, true to the forward pass, and rewritable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postlude.errors import ArchitectureError
from postlude.surgery.anatomy import Anatomy, anatomy_of, kind_of, supported_model_types
from postlude.surgery.batches import in_batches, joined
from postlude.surgery.capture import BlockWalk, observe, recorded_inputs
from postlude.surgery.rewrite import scale_norm_site

from .other_models import DENOISERS, OTHER_MODELS, build_other, pixart

each_model = pytest.mark.parametrize("name", OTHER_MODELS)


def output(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def inputs_of_linears(model: Any, anatomy: Anatomy, batch: dict[str, Any]) -> dict[str, Tensor]:
    """By hooks on the whole model: what every linear of every block reads."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: found.__setitem__(path, args[0])
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    output(model, batch)
    for handle in handles:
        handle.remove()
    return found


@each_model
def test_every_matrix_of_a_block_is_in_a_site_or_kept(name: str) -> None:
    model = build_other(name)
    anatomy = anatomy_of(model)
    named = [*anatomy.linears(), *anatomy.kept()]
    assert len(named) == len(set(named))
    prefixes = tuple(f"{block.name}." for block in anatomy.blocks)
    matrices = {
        path
        for path, module in model.named_modules()
        if path.startswith(prefixes) and isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert set(named) == matrices
    assert [block.index for block in anatomy.blocks] == list(range(len(anatomy.blocks)))
    for block in anatomy.blocks:
        for site in (*block.sites, *block.kept):
            for reader in site.readers:
                assert reader.weight(model).shape[1] == site.width
            for writer in site.writers:
                assert len(writer.weight(model)) == site.width


@each_model
def test_all_readers_of_a_site_read_one_tensor(name: str) -> None:
    model = build_other(name)
    anatomy = anatomy_of(model)
    found = inputs_of_linears(model, anatomy, anatomy.example())
    for block in anatomy.blocks:
        for site in (*block.sites, *block.kept):
            for path in site.modules[1:]:
                assert torch.equal(found[path], found[site.modules[0]]), (block.name, site.name)


@each_model
def test_a_walk_and_observers_see_what_hooks_see(name: str) -> None:
    model = build_other(name)
    anatomy = anatomy_of(model)
    batch = anatomy.example(rows=5)
    expected = inputs_of_linears(model, anatomy, batch)
    batches = in_batches(batch, 2)
    seen: dict[tuple[int, str], list[Tensor]] = {
        (block.index, site.name): [] for block, site in anatomy.sites()
    }
    stream: dict[int, list[Tensor]] = {}
    observe(
        model,
        anatomy,
        batches,
        {key: parts.append for key, parts in seen.items()},
        residual=lambda index, hidden: stream.setdefault(index, []).append(hidden),
    )
    assert sorted(stream) == [-1, *range(len(anatomy.blocks))]
    walk = BlockWalk(model, anatomy, batches)
    for block in anatomy.blocks:
        for site in block.sites:
            whole = expected[site.modules[0]]
            torch.testing.assert_close(torch.cat(seen[block.index, site.name]), whole)
            parts: list[Tensor] = []
            walk.observe(block, {site.name: parts.append})
            assert [len(part) for part in parts] == [2, 2, 1]
            torch.testing.assert_close(torch.cat(parts), whole)
        walk.advance(block)
    # Nothing is left behind.
    again = inputs_of_linears(model, anatomy, batch)
    assert all(torch.equal(again[path], tensor) for path, tensor in expected.items())


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_the_next_block_sees_what_was_done_to_this_one(name: str) -> None:
    model = build_other(name)
    anatomy = anatomy_of(model)
    batch = anatomy.example(rows=3)
    walk = BlockWalk(model, anatomy, [batch])
    for block in anatomy.blocks[:-1]:
        block.linear("output").weight(model).mul_(2)
        walk.advance(block)
    last = anatomy.blocks[-1]
    parts: list[Tensor] = []
    walk.observe(last, {"qkv_in": parts.append})
    expected = inputs_of_linears(model, anatomy, batch)[last.site("qkv_in").modules[0]]
    torch.testing.assert_close(parts[0], expected)


@pytest.mark.parametrize("name", [name for name in OTHER_MODELS if name not in ("pixart", "sana")])
def test_norms_take_scales_in(name: str) -> None:
    """adaLN by the rows of its linear, LayerNorm by its gain; in fp64 exact, and undone bit for bit."""
    model = build_other(name, torch.float64)
    anatomy = anatomy_of(model)
    batch = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in anatomy.example().items()
    }
    before = output(model, batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    sites = [site for _, site in anatomy.sites() if site.norm]
    assert sites
    undos = []
    for site in sites:
        scale = torch.rand(site.width, generator=generator, dtype=torch.float64) + 0.5
        undos.append(scale_norm_site(model, site, scale))
    torch.testing.assert_close(output(model, batch), before, atol=1e-9, rtol=1e-9)
    for undo in reversed(undos):
        undo()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_a_model_was_called_with_can_be_given_again() -> None:
    model = build_other("dit")
    seen: list[Any] = []
    noisy = torch.randn(3, 2, 8, 8)
    with recorded_inputs(model, seen.append), torch.no_grad():
        first = model(noisy, torch.tensor([1, 5, 900]), class_labels=torch.tensor([0, 1, 2]))[0]
        model(noisy, torch.tensor([1, 5, 900]), torch.tensor([0, 1, 2]), return_dict=False)
    model(noisy, torch.tensor([1, 5, 900]), torch.tensor([0, 1, 2]))
    assert len(seen) == 2
    assert sorted(seen[1]) == ["class_labels", "hidden_states", "timestep"]
    assert torch.equal(output(model, seen[0]), first)
    parts = in_batches(seen[0], 2)
    assert [len(part["timestep"]) for part in parts] == [2, 1]
    assert all(torch.equal(joined(parts)[key], seen[0][key]) for key in seen[0])


def test_positions_belong_to_all_rows() -> None:
    batch = anatomy_of(build_other("flux")).example(rows=5)
    parts = in_batches(batch, 2)
    assert [len(part["hidden_states"]) for part in parts] == [2, 2, 1]
    assert all(part["img_ids"].shape == (16, 3) for part in parts)
    assert joined(parts)["img_ids"].shape == (16, 3)


def test_pixart_with_the_size_of_the_image() -> None:
    torch.manual_seed(0)
    model = pixart(sample_size=128).eval()
    batch = anatomy_of(model).example()
    assert sorted(batch["added_cond_kwargs"]) == ["aspect_ratio", "resolution"]
    parts = in_batches(batch, 1)
    assert parts[0]["added_cond_kwargs"]["resolution"].shape == (1, 2)
    assert joined(parts)["added_cond_kwargs"]["resolution"].shape == (2, 2)
    assert output(model, batch).shape == (2, 8, 128, 128)


def test_variants_that_are_not_described() -> None:
    import diffusers

    from .other_models import HEADS, IMAGE

    model = diffusers.DiTTransformer2DModel(
        **IMAGE, **HEADS, norm_num_groups=1, num_embeds_ada_norm=3
    )
    model.transformer_blocks[1].ff.net[0] = nn.Sequential(nn.Linear(32, 128), nn.ReLU())
    with pytest.raises(ArchitectureError, match=r"ff has the activation Sequential.*GEGLU"):
        anatomy_of(model)
    with pytest.raises(ArchitectureError, match="attention_type 'gated'"):
        anatomy_of(
            diffusers.PixArtTransformer2DModel(
                **IMAGE, **HEADS, cross_attention_dim=32, norm_num_groups=1, attention_type="gated"
            )
        )
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(
        ArchitectureError, match="no anatomy describes models of type 'UNet2DModel'"
    ):
        anatomy_of(unet)


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_a_modulation_of_all_blocks_takes_no_scale_in(name: str) -> None:
    assert not any(site.norm for _, site in anatomy_of(build_other(name)).sites())


def test_kinds() -> None:
    assert kind_of("llama") == "language"
    assert kind_of("dinov2") == "vision"
    assert {kind_of(type(make()).__name__) for make in DENOISERS.values()} == {"diffusion"}
    assert "vit" in supported_model_types("vision")
    assert "vit" not in supported_model_types("diffusion")
