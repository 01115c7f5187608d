"""Digits with known sources: what is planted is there, is independent, and comes from the seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postlude.errors import SettingsError, UnknownNameError
from postlude.zoo.planted_digits import ATTRIBUTES, BACKGROUNDS, STYLES, attributed, blank, copies


def strokes(count: int = 400) -> tuple[Tensor, Tensor]:
    """A bar of its own column for each of ten classes, bright on dark."""
    labels = torch.arange(count) % 10
    images = torch.full((count, 1, 8, 8), -1.0)
    images[torch.arange(count), 0, 1:7, 1 + labels % 6] = 1.0
    return images, labels


def test_copies_differ_in_their_noise_only() -> None:
    images, _ = strokes(3)
    made = copies(images, 4, noise=0.1, seed=1)
    assert made.shape == (3, 4, 1, 8, 8) and float(made.abs().max()) <= 1
    assert torch.equal(made, copies(images, 4, noise=0.1, seed=1))
    assert not torch.equal(made[:, 0], made[:, 1])
    assert float((made - images[:, None]).abs().mean()) < 0.1
    assert torch.equal(copies(images, 2, noise=0.0)[:, 1], images)
    with pytest.raises(SettingsError, match="0 copies with noise"):
        copies(images, 0)


def test_attributes_are_independent_and_visible() -> None:
    images, labels = strokes()
    found = attributed(images, labels, seed=3)
    assert found.images.shape == (400, 3, 8, 8) and float(found.images.abs().max()) <= 1
    assert torch.equal(found.images, attributed(images, labels, seed=3).images)
    assert set(found.style.tolist()) == set(range(len(STYLES)))
    table = torch.zeros(len(STYLES), len(BACKGROUNDS))
    for style, background in zip(found.style, found.background, strict=True):
        table[style, background] += 1
    assert float(table.min()) > 8
    # Corners show the background, but where a bold stroke reaches them: its mean colour, paler than the name says.
    thin = found.style != STYLES.index("bold")
    for number, colour in enumerate(torch.tensor(list(BACKGROUNDS.values()))):
        shown = found.images[thin & (found.background == number)][:, :, 0, -1].mean(0)
        assert float(torch.corrcoef(torch.stack([shown, colour]))[0, 1]) > 0.95
        assert float(shown.std()) < float(colour.std())
    ink = images[:, 0] > 0
    bright = [
        float(found.images[found.style == style].mean(1)[ink[found.style == style]].mean())
        for style in range(len(STYLES))
    ]
    assert bright[0] > 0.8 and bright[3] > 0.8 and bright[1] < 0.6
    with pytest.raises(UnknownNameError, match="attribute"):
        found.attribute("colour")


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_blank_queries_show_one_attribute(attribute: str) -> None:
    images, labels = strokes(50)
    found = blank(images, labels, attribute, seed=2)
    for name in ATTRIBUTES:
        values = found.attribute(name)
        assert bool((values >= 0).all()) if name == attribute else bool((values == -1).all())
    corners = found.images[:, :, 0, -1]
    if attribute == "background":
        flat = found.images.flatten(2)
        assert float((flat - flat.mean(2, keepdim=True)).std()) < 0.2
    elif attribute == "subject":
        assert float(corners.mean(0).std()) < 0.1
    with pytest.raises(UnknownNameError, match="attribute"):
        blank(images, labels, "colour")
