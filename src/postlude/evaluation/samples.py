"""How good samples are: their Frechet distance to real images, whether they show the class they were asked for, and how
far they are from another model's on the same noise.

Models that draw 8 x 8 digits are judged by the packaged classifier (`postlude.zoo.digits_classifier`). Of others there
is the distance in pixels to real images that the caller brings, and the ratio to the reference model.

The Frechet distance of n samples to m real images is too large by about c (1/n + 1/m), also where both are of one
distribution. The floor says by how much: c is measured on halves of the real images, and 1/n taken from the samples
(our choice; on the digits, from 225 to 1497 samples, the rule holds within a tenth in pixels and a quarter in
features). Distances of different numbers of samples are not comparable, and between seeds tiny-dit's in pixels moves
by 0.02 at 1500 samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError
from postlude.numerics.image_distance import frechet_distance, gaussian_of, psnr
from postlude.zoo.digits_classifier import judge

__all__ = ["DIGIT", "judge_samples"]

DIGIT = (1, 8, 8)
"""The shape of an image that the packaged classifier reads."""


def judge_samples(
    images: Tensor,
    labels: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    real: Tensor | None = None,
) -> dict[str, Any]:
    """Judge samples.

    Args:
        images: ``[n, channels, height, width]`` in about [-1, 1].
        labels: the classes that were asked for ``[n]``.
        reference: another model's samples from the same noise.
        real: real images ``[m, channels, height, width]``; of digits they are built in.

    Returns:
        Every number of ``images`` beside that of the reference (``_reference``) and of real images. All distances are
        squared, in units of what they are taken of; 0 is best.

        ``frechet``, ``frechet_reference``
            To the real digits, in 64 features of the classifier that have variance 1 on real digits.
        ``frechet_floor``
            What as many fresh real digits would get. A model can be below it: it is compared with the images that it
            was trained on.
        ``frechet_pixels``, ``frechet_pixels_reference``, ``frechet_pixels_floor``
            The same in pixels of range 2.
        ``class_accuracy``, ``class_accuracy_reference``, ``class_accuracy_real``, ``class_accuracy_chance``
            Share of the samples that the classifier finds to be of the class they were asked to be; of real digits
            that it was not trained on.
        ``class_accuracy_by_class``
            The same of each class.
        ``psnr_db``, ``psnr_db_lowest``
            10 log10(4 / mean squared difference to the reference), of all images and of the worst one.

        What there is no judge or no reference for is None.

    Raises:
        DataError: fewer than two images, not finite ones, or shapes that do not match.
    """
    if images.ndim != 4 or len(images) < 2:
        raise DataError(
            f"samples have the shape {list(images.shape)}; expected two or more images [n, c, h, w]"
        )
    if reference is not None and reference.shape != images.shape:
        raise DataError(
            f"samples have the shape {list(images.shape)}, those of the reference {list(reference.shape)}; expected "
            "the same noise in both"
        )
    found: dict[str, Any] = _to_real(images, reference, real)
    found |= _classes(images, reference, labels)
    found |= {"psnr_db": None, "psnr_db_lowest": None}
    if reference is not None:
        found["psnr_db"] = float(psnr(images.reshape(1, -1), reference.reshape(1, -1)))
        found["psnr_db_lowest"] = float(psnr(images, reference).min())
    return found


def _to_real(images: Tensor, reference: Tensor | None, real: Tensor | None) -> dict[str, Any]:
    spaces: dict[str, Any] = {"frechet": None, "frechet_pixels": None}
    if real is not None:
        if real.ndim != 4 or real.shape[1:] != images.shape[1:] or len(real) < 4:
            raise DataError(
                f"real images have the shape {list(real.shape)}, samples {list(images.shape)}; expected four or more "
                "of the samples' shape"
            )
        halves = frechet_distance(
            *(gaussian_of(half) for half in (_pixels(real)[::2], _pixels(real)[1::2]))
        )
        spaces["frechet_pixels"] = (_pixels, gaussian_of(_pixels(real)), halves, len(real))
    elif images.shape[1:] == DIGIT:
        one = judge()
        spaces["frechet"] = (lambda x: one.look(x)[0], one.features, one.halves_features, one.count)
        spaces["frechet_pixels"] = (_pixels, one.pixels, one.halves_pixels, one.count)
    found: dict[str, Any] = {}
    for name, space in spaces.items():
        keys = (name, f"{name}_reference", f"{name}_floor")
        found |= dict.fromkeys(keys)
        if space is None:
            continue
        read, goal, halves, number = space
        for key, drawn in zip(keys, (images, reference), strict=False):
            found[key] = None if drawn is None else frechet_distance(gaussian_of(read(drawn)), goal)
        # Halves of m are off by c (2/m + 2/m), n samples against all m by c (1/n + 1/m).
        found[keys[2]] = halves * (number / len(images) + 1.0) / 4.0
    return found


def _classes(images: Tensor, reference: Tensor | None, labels: Tensor | None) -> dict[str, Any]:
    names = ("", "_reference", "_real", "_chance", "_by_class")
    found: dict[str, Any] = {f"class_accuracy{name}": None for name in names}
    if labels is None or images.shape[1:] != DIGIT:
        return found
    digits = judge()
    right = digits.look(images)[1] == labels
    found["class_accuracy"] = float(right.double().mean())
    if reference is not None:
        found["class_accuracy_reference"] = float(
            (digits.look(reference)[1] == labels).double().mean()
        )
    found["class_accuracy_real"] = digits.accuracy
    found["class_accuracy_chance"] = 1.0 / digits.classifier.head.out_features
    found["class_accuracy_by_class"] = {
        int(label): float(right[labels == label].double().mean()) for label in torch.unique(labels)
    }
    return found


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)
