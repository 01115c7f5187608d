"""A small classifier of 8 x 8 digits: the feature space in which samples of tiny-dit are compared with real digits.

    python -m postlude.zoo.digits_classifier train -o FILE.safetensors [--seed 0]
    python -m postlude.zoo.digits_classifier check [FILE.safetensors]

Three convolutions and a layer of 64 features, trained on four fifths of the digits in seconds. The file also holds the
mean and covariance of all real digits, in features and in pixels, so that measuring samples needs no scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from postlude.errors import DataError
from postlude.numerics.image_distance import frechet_distance, gaussian_of
from postlude.zoo.digits import digits

__all__ = ["FEATURES", "DigitsClassifier", "Judge", "judge", "main", "split", "train"]

FEATURES = 64
CLASSES = 10
FILE = Path(__file__).parent / "checkpoints" / "digits_classifier.safetensors"


class DigitsClassifier(nn.Module):
    """Images ``[n, 1, 8, 8]`` in [-1, 1] to scores ``[n, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(1, 16, 3, padding=1),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
            ]
        )
        self.last = nn.Linear(64 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """What the head reads, ``[n, 64]``: not rectified, so close to Gaussian."""
        for convolution in self.convolutions:
            images = functional.gelu(convolution(images))
        return self.last(images.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[n, 10]``."""
        return self.head(functional.gelu(self.features(images)))


@dataclass(frozen=True)
class Judge:
    """The trained classifier and what real digits look like to it.

    Attributes:
        classifier: in eval mode, on the CPU.
        features, pixels: mean and covariance of all real digits, ``([d], [d, d])`` in fp64.
        halves_features, halves_pixels: Frechet distance between halves of the real digits, mean of ten splits.
        count: how many real digits there are.
        accuracy: share of real digits it was not trained on that it gets right.
        unit: what features are divided by: the real digits' have variance 1 on average over the 64.
    """

    classifier: DigitsClassifier
    features: tuple[Tensor, Tensor]
    pixels: tuple[Tensor, Tensor]
    halves_features: float
    halves_pixels: float
    count: int
    accuracy: float
    unit: float

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[n, 64]`` and classes ``[n]`` of images ``[n, 1, 8, 8]``.

        Raises:
            DataError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
            raise DataError(f"the classifier reads digits [n, 1, 8, 8]; found {list(images.shape)}")
        features = self.classifier.features(images.float())
        return features / self.unit, self.classifier.head(functional.gelu(features)).argmax(1)


def split(count: int) -> tuple[Tensor, Tensor]:
    """Which images it is trained on (four fifths), and which are held out; the same for every seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: count * 4 // 5], order[count * 4 // 5 :]


def train(images: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 60) -> DigitsClassifier:
    """Train on the images ``[n, 1, 8, 8]`` with their labels ``[n]``: AdamW, cosine, a little noise, half of the
    batches shifted by up to one pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsClassifier()
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    batches = -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    framed = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(128):
            moved = torch.rand((), generator=generator) < 0.5
            down, right = (
                torch.randint(0, 3, (2,), generator=generator).tolist() if moved else (1, 1)
            )
            shown = framed[rows, :, down : down + 8, right : right + 8]
            shown = shown + 0.1 * torch.randn(shown.shape, generator=generator)
            loss = functional.cross_entropy(model(shown), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def _describe(
    model: DigitsClassifier, images: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the file holds beside the weights."""
    features, pixels = model.features(images), images.flatten(1)
    unit = float(gaussian_of(features)[1].diagonal().mean().sqrt())
    features = features / unit
    held_out = split(len(images))[1]
    right = model(images[held_out]).argmax(1) == labels[held_out]
    tensors, distances = {}, {}
    for name, rows in (("features", features), ("pixels", pixels)):
        tensors[f"real.{name}.mean"], tensors[f"real.{name}.covariance"] = gaussian_of(rows)
        halves = []
        for seed in range(10):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            first, second = order.tensor_split(2)
            halves.append(frechet_distance(gaussian_of(rows[first]), gaussian_of(rows[second])))
        distances[f"halves_{name}"] = sum(halves) / len(halves)
    return tensors, {
        **distances,
        "count": len(images),
        "accuracy": float(right.float().mean()),
        "unit": unit,
    }


def judge(file: Path | None = None) -> Judge:
    """The packaged classifier, or one from a file of ``train``."""
    return _judge(FILE if file is None else file)


@lru_cache(maxsize=2)
def _judge(file: Path) -> Judge:
    with safe_open(file, framework="pt") as store:
        tensors = {name: store.get_tensor(name) for name in store.keys()}  # noqa: SIM118
        measured = json.loads(store.metadata()["measured"])
    model = DigitsClassifier()
    model.load_state_dict(
        {key: value for key, value in tensors.items() if not key.startswith("real.")}
    )
    real: dict[str, Any] = {
        name: (tensors[f"real.{name}.mean"], tensors[f"real.{name}.covariance"])
        for name in ("features", "pixels")
    }
    return Judge(model.eval().requires_grad_(False), **real, **measured)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m postlude.zoo.digits_classifier", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train from nothing and write a file")
    command.add_argument("-o", "--out", type=Path, required=True)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("check", help="measure the file again on the real digits")
    command.add_argument("file", type=Path, nargs="?", default=FILE)
    options = parser.parse_args(arguments)
    images, labels = digits()
    if options.command == "train":
        rows = split(len(images))[0]
        model = train(images[rows], labels[rows], seed=options.seed)
    else:
        model = judge(options.file).classifier
    tensors, measured = _describe(model, images, labels)
    if options.command == "train":
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights | tensors, options.out, metadata={"measured": json.dumps(measured)})
        options.out.chmod(0o644)
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
