"""Digits in which it is known where something was learned: planted copies, and planted attributes.

**Copies.** Some digits stand in the training set several times, each time with other noise in their pixels; a query is
one more such copy. Its sources are the copies.

**Attributes.** Three-channel digits on a coloured background, drawn in one of several styles of stroke. Subject, style
and background are drawn independently, so what shares one of them with a query shares the others only by chance. A
query can also be blank in all but one: a background without a digit, a scribble in a style on grey, a thin
digit on grey.

Both are our own, for judging attribution; scikit-learn's digits are what they are made of.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from postlude.errors import SettingsError, UnknownNameError

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "STYLES",
    "AttributedDigits",
    "attributed",
    "blank",
    "copies",
]

ATTRIBUTES = ("subject", "style", "background")

BACKGROUNDS = {
    "red": (0.4, -0.7, -0.7),
    "green": (-0.7, 0.2, -0.7),
    "blue": (-0.7, -0.6, 0.5),
    "yellow": (0.4, 0.3, -0.8),
    "violet": (0.2, -0.8, 0.4),
}
"""Colours in [-1, 1], of which a part is mixed into grey."""

STYLES = ("solid", "striped", "barred", "bold")
_GREY = (-0.2, -0.2, -0.2)
_COLOUR = 0.35  # share of the colour in a background
_GRAIN = 0.15  # deviation of the noise in every pixel


@dataclasses.dataclass(frozen=True)
class AttributedDigits:
    """Images whose three attributes are known.

    Attributes:
        images: ``[n, 3, 8, 8]`` in [-1, 1].
        subject, style, background: ``int64 [n]``; the digit, and positions in ``STYLES`` and ``BACKGROUNDS``.
    """

    images: Tensor
    subject: Tensor
    style: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def attribute(self, name: str) -> Tensor:
        """``int64 [n]`` of ``subject``, ``style`` or ``background``."""
        if name not in ATTRIBUTES:
            raise UnknownNameError("attribute", name, ATTRIBUTES)
        found: Tensor = getattr(self, name)
        return found


def copies(images: Tensor, count: int, *, noise: float = 0.25, seed: int = 0) -> Tensor:
    """``count`` noisy copies of every image: ``[n, count, ...]``, in [-1, 1].

    Args:
        images: ``[n, ...]`` in [-1, 1].
        count: copies of each.
        noise: deviation of what is added to a pixel.
        seed: of the noise.
    """
    if count < 1 or not noise >= 0:
        raise SettingsError(
            f"{count} copies with noise {noise}; expected 1 or more, with 0 or more"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(images), count, *images.shape[1:], generator=generator)
    return (images[:, None] + noise * drawn).clamp(-1, 1)


def attributed(images: Tensor, labels: Tensor, *, seed: int = 0) -> AttributedDigits:
    """Digits on coloured backgrounds, in styles of stroke, both drawn at random.

    Args:
        images: ``[n, 1, height, width]`` in [-1, 1], bright on dark.
        labels: ``int64 [n]``.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    style = torch.randint(len(STYLES), (len(images),), generator=generator)
    background = torch.randint(len(BACKGROUNDS), (len(images),), generator=generator)
    drawn = _drawn(images, style, _colours()[background])
    return AttributedDigits(_grain(drawn, generator), labels, style, background)


def blank(images: Tensor, labels: Tensor, attribute: str, *, seed: int = 0) -> AttributedDigits:
    """Images that show one attribute, and nothing of the others that the training set has.

    Subjects are thin strokes on grey, styles are scribbles (pixels of a digit in random order) on grey, backgrounds
    are empty. What is blank is -1 in the result.

    Args:
        images, labels: digits, as for :func:`attributed`.
        attribute: ``subject``, ``style`` or ``background``.
        seed: of the draws.
    """
    if attribute not in ATTRIBUTES:
        raise UnknownNameError("attribute", attribute, ATTRIBUTES)
    count = len(images)
    generator = torch.Generator().manual_seed(seed)
    style = torch.randint(len(STYLES), (count,), generator=generator)
    background = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    none = torch.full((count,), -1)
    grey = torch.tensor(_GREY).expand(count, 3)
    if attribute == "background":
        plain = _colours()[background][:, :, None, None].expand(count, 3, *images.shape[2:])
        return AttributedDigits(_grain(plain, generator), none, none, background)
    if attribute == "style":
        flat = images.flatten(1)
        order = torch.rand(flat.shape, generator=generator).argsort(1)
        scribbles = flat.gather(1, order).view_as(images)
        return AttributedDigits(
            _grain(_drawn(scribbles, style, grey), generator), none, style, none
        )
    ink = 0.5 * (images + 1)
    strokes = grey[:, :, None, None] * (1 - ink) + 0.4 * ink
    return AttributedDigits(_grain(strokes, generator), labels, none, none)


def _colours() -> Tensor:
    """``[backgrounds, 3]`` as they are drawn: pale, so that a background is not all that there is to see."""
    return _COLOUR * torch.tensor(list(BACKGROUNDS.values())) + (1 - _COLOUR) * torch.tensor(_GREY)


def _drawn(images: Tensor, style: Tensor, colours: Tensor) -> Tensor:
    """``[n, 3, height, width]`` of ink in a style on colours ``[n, 3]``."""
    ink = 0.5 * (images + 1)
    stripes, bars = torch.ones_like(ink), torch.ones_like(ink)
    stripes[:, :, 1::2] = 0.0
    bars[:, :, :, 1::2] = 0.0
    bold = torch.nn.functional.max_pool2d(ink, 3, stride=1, padding=1)
    # Rows in the order of STYLES: how much ink there is of the same brightness.
    amounts = torch.stack([ink, ink * stripes, ink * bars, bold])
    amount = amounts[style, torch.arange(len(images))]
    return colours[:, :, None, None] * (1 - amount) + amount


def _grain(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, so that no two images are alike and no attribute can be read off a pixel."""
    return (images + _GRAIN * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
