"""Quantizers for vision transformers: do re-parameterised ranges and special grids keep what plain ones lose?

RepQ-ViT (arXiv:2212.08254), RepQuant (arXiv:2402.05628), I&S-ViT (arXiv:2311.10126), DopQ-ViT (arXiv:2408.03291) and
AdaLog (arXiv:2407.12951) report ImageNet accuracy at 3 to 6 bits, each above the one before. Here a tiny vision
transformer reads MNIST digits (scikit-learn's 8 x 8 ones where those are absent), once as trained and once with three
channels of every norm made 20 times louder and their readers quieter, which changes nothing in floating point; and a
FastPose-ViT reads poses. Every method rounds the same network with the same fixed grids for all but what it is about,
and calibrates on 32 pictures, which the seed draws. "plain" has one range for each tensor and uniform grids;
layerwise-ip (arXiv:2006.10518) and mptq-greedy (arXiv:2401.14895) have so many bits for weights on average. iands-vit
trains every block against its float output, twice 100 steps of 8 pictures (20 from 6 bits on) at a rate that suits so
small a network; "iands-vit-gptq" has the same grids and closed weights.

Trainings and finished measurements are kept in ``runs/claims``.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import itertools
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from _claim import Claim, data_directory, spread
from postlude.numerics.activation_grids import Uniform
from postlude.quantization.adalog import AdaLogViT
from postlude.quantization.dopq_vit import DopQViT
from postlude.quantization.engine import quantize
from postlude.quantization.iands_vit import IandSViT
from postlude.quantization.layerwise_ip import LayerwiseIP
from postlude.quantization.mptq_greedy import MPTQGreedy
from postlude.quantization.repq_vit import RepQViT
from postlude.quantization.repquant import RepQuant
from postlude.quantization.vision import VisionQuantizer
from postlude.registry import method
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.directory import RunDirectory
from postlude.surgery.anatomy import anatomy_of
from postlude.zoo.fastpose_vit.augmentation import turned_crops
from postlude.zoo.fastpose_vit.making import make
from postlude.zoo.fastpose_vit.network import Backbone, build
from postlude.zoo.fastpose_vit.spacecraft import own_spacecraft
from postlude.zoo.fastpose_vit.training import Training, fit, measure

BITS = (8, 6, 4, 3)
LOUD, FACTOR = 3, 20.0
CALIBRATION = 32
Make = Callable[[int], VisionQuantizer]
# Pictures of a step, where blocks are trained; the paper's batch of 64 out of 1024, scaled down.
BATCH = 8


@method("quantize", "plain-vit", family="control", needs=("calibration",))
@dataclasses.dataclass(frozen=True)
class Plain(VisionQuantizer):
    """One range for each tensor, uniform grids."""

    def channel_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        parameters = Uniform(self.activations).fit(rows)
        return tuple(p.double().expand(rows.shape[1]) for p in parameters.values())  # type: ignore[return-value]


def trained(bits: int) -> VisionQuantizer:
    """I&S-ViT, with a fifth of the steps from 6 bits on, as in the paper."""
    steps = 100 if bits < 6 else 20
    return IandSViT(weights=bits, activations=bits, iterations=steps, learning_rate=4e-4)


def alike(kind: Callable[..., VisionQuantizer], **settings: Any) -> Make:
    """The same settings at all bits."""
    return lambda bits: kind(weights=bits, activations=bits, **settings)


METHODS: dict[str, Make] = {
    "plain": alike(Plain),
    "repq-vit": alike(RepQViT),
    "repquant": alike(RepQuant),
    "adalog": alike(AdaLogViT),
    "iands-vit": trained,
    "iands-vit-gptq": alike(IandSViT, iterations=0, rounding="gptq"),
    "dopq-vit": alike(DopQViT),
    "layerwise-ip": alike(LayerwiseIP),
    "mptq-greedy": alike(MPTQGreedy),
}


@dataclasses.dataclass
class Bench:
    """A network, pictures to calibrate on, and what is measured.

    Attributes:
        name: of the table.
        checkpoint: float.
        pool: pictures that calibration is drawn from, ``[n, channels, size, size]``.
        judge: of a network, by the name of a quantity.
    """

    name: str
    checkpoint: Checkpoint
    pool: Tensor
    judge: Callable[[Any], dict[str, float]]

    def measure(self, quantizer: VisionQuantizer, seed: int) -> Mapping[str, float]:
        """After rounding, with the calibration pictures of that seed."""
        generator = torch.Generator().manual_seed(seed)
        drawn = self.pool[torch.randperm(len(self.pool), generator=generator)[:CALIBRATION]]
        work = dataclasses.replace(self.checkpoint, model=copy.deepcopy(self.checkpoint.model))
        parts = drawn.split(BATCH) if quantizer.reconstructs else (drawn,)
        made = quantize(work, quantizer, [{"pixel_values": part} for part in parts], seed=seed)
        return self.judge(made.model)


def digits() -> tuple[Tensor, Tensor, str]:
    """Pictures ``[n, 1, size, size]`` in [-1, 1], classes, and their name."""
    folder = data_directory()
    if folder is not None and (folder / "vision" / "mnist_t10k-images-idx3-ubyte.gz").is_file():
        with gzip.open(folder / "vision" / "mnist_t10k-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(folder / "vision" / "mnist_t10k-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        pictures = torch.from_numpy(images.copy())[:, None].float() / 127.5 - 1
        return pictures, torch.from_numpy(labels.astype(np.int64)), "MNIST"
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    large = functional.interpolate(pictures, 28, mode="bilinear")
    return large, torch.from_numpy(found.target), "scikit-learn's digits"


class Digits:
    """A classifier of digits, trained once."""

    def __init__(self, claim: Claim, kept: RunDirectory) -> None:
        self._claim, self._kept = claim, kept
        pictures, labels, self.name = digits()
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
        pictures, labels = pictures[order], labels[order]
        count = 200 if claim.quick else 500
        self.test = pictures[:count], labels[:count]
        self.train = pictures[count:], labels[count:]

    def _empty(self) -> Any:
        config = ViTConfig(
            image_size=28, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=4,
            num_attention_heads=4, intermediate_size=256, num_labels=10,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        return ViTForImageClassification(config)

    def _fit(self) -> dict[str, Tensor]:
        model = self._empty().train()
        pictures, labels = self.train
        epochs, batch = (1 if self._claim.quick else 8), 64
        steps = epochs * len(pictures) // batch
        inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layer" in n]
        known = {id(p) for p in inner}
        outer = [p for p in model.parameters() if id(p) not in known]
        optimizers = [torch.optim.Muon(inner, lr=0.02), torch.optim.AdamW(outer, lr=2e-3)]
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                one, one.param_groups[0]["lr"], total_steps=steps, cycle_momentum=False
            )
            for one in optimizers
        ]
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            part = torch.randint(0, len(pictures), (batch,), generator=generator)
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            logits = model(pixel_values=pictures[part].roll(shift, (2, 3))).logits
            loss = functional.cross_entropy(logits, labels[part])
            model.zero_grad(set_to_none=True)
            loss.backward()
            for one in (*optimizers, *schedules):
                one.step()
            if step % 200 == 0:
                self._claim.progress.log(f"digits: step {step} of {steps}, loss {loss.item():.3f}")
        return dict(model.state_dict())

    @cached_property
    def model(self) -> Any:
        model = self._empty()
        model.load_state_dict(self._claim.measured(self._kept, "digits", self._fit))
        return model.eval()

    def bench(self, loud: bool) -> Bench:
        """As trained, or with loud channels."""
        model = copy.deepcopy(self.model)
        anatomy = anatomy_of(model)
        if loud:
            plant(model)
        name = f"Accuracy in %, {self.name}, " + ("loud channels" if loud else "as trained")
        pool = self.train[0]
        return Bench(name, Checkpoint(model, None, anatomy), pool, self._judge)

    @torch.no_grad()
    def _judge(self, model: Any) -> dict[str, float]:
        pictures, labels = self.test
        found = torch.cat([model(pixel_values=p).logits.argmax(-1) for p in pictures.split(250)])
        return {"": 100 * float((found == labels).double().mean())}


def plant(model: Any) -> None:
    """Three channels of every norm 20 times louder, and their readers quieter."""
    for _, site in anatomy_of(model).sites():
        if site.norm:
            norm = model.get_submodule(site.norm)
            norm.weight.data[:LOUD] *= FACTOR
            norm.bias.data[:LOUD] *= FACTOR
            for path in site.modules:
                model.get_submodule(path).weight.data[:, :LOUD] /= FACTOR


def pose(claim: Claim, kept: RunDirectory) -> Bench:
    """A FastPose-ViT, trained once."""
    counts = (200, 60) if claim.quick else (3000, 250)
    whole = make(own_spacecraft(), sum(counts), 0, attitudes=60.0)
    train, test = whole.take(slice(0, counts[0])), whole.take(slice(counts[0], None))
    model = build(Backbone(), 0)

    def trained() -> dict[str, Tensor]:
        settings = dataclasses.replace(Training(), epochs=1 if claim.quick else 12)
        fit(model, train, settings, 0, log=claim.progress.log)
        return dict(model.state_dict())

    model.load_state_dict(claim.measured(kept, "pose", trained))
    model.eval()

    def judge(network: Any) -> dict[str, float]:
        errors = measure(network, test)
        return {
            "E_R in degrees": math.degrees(float(errors.rotation.mean())),
            "100 e_t": 100 * float(errors.relative_translation.mean()),
        }

    pool = turned_crops(train.take(slice(0, 500)), 48).pixels
    return Bench("FastPose-ViT", Checkpoint(model, None, anatomy_of(model)), pool, judge)


def main() -> None:
    """Train, round, judge, print."""
    claim = Claim("vit_ptq", __doc__ or "", parts=("digits", "loud", "pose"))
    kept = claim.directory({"calibration": CALIBRATION, "loud": (LOUD, FACTOR), "part": claim.part})
    bench = (
        pose(claim, kept)
        if claim.part == "pose"
        else Digits(claim, kept).bench(claim.part == "loud")
    )
    exact = bench.judge(bench.checkpoint.model)
    claim.progress.log(f"float: {exact}")
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed, bits, name in itertools.product(claim.seeds, BITS, METHODS):
        quantizer = METHODS[name](bits)
        measured = claim.measured(
            kept,
            f"{name}-w{bits}a{bits}-{seed}",
            lambda quantizer=quantizer, seed=seed: bench.measure(quantizer, seed),  # type: ignore[misc]
        )
        found.setdefault((name, bits), []).append({k: float(v) for k, v in measured.items()})
        claim.progress.log(f"seed {seed}, w{bits}a{bits}, {name}: {found[name, bits][-1]}")
    header = ("", *(f"W{bits}A{bits}" for bits in BITS))
    for quantity, value in exact.items():
        rows = [("float", f"{value:.2f}", *[""] * (len(BITS) - 1))]
        for name in METHODS:
            cells = [spread([one[quantity] for one in found[name, bits]]) for bits in BITS]
            rows.append((name, *cells))
        claim.table(bench.name + (f", {quantity}" if quantity else ""), header, rows)
    claim.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main()
