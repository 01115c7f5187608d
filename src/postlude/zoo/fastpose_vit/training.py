"""Training a pose network.

The recipe of the paper (arXiv:2512.09792) is for a pretrained ViT-B: Muon, rate 1e-4 to 1e-6 with cosine restarts, 310
epochs, batch 8. The defaults here are for a tiny network from random weights in minutes on one core: Muon on the
matrices of the blocks and AdamW on the rest, one cosine, pictures turned by any angle.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError, OutputExistsError, SettingsError
from postlude.zoo.fastpose_vit.augmentation import MEAN, STD, Augmentation, Crops, turned_crops
from postlude.zoo.fastpose_vit.camera import encode_translation
from postlude.zoo.fastpose_vit.data import PoseData, count, load
from postlude.zoo.fastpose_vit.losses import pose_loss
from postlude.zoo.fastpose_vit.metrics import PoseErrors, pose_errors
from postlude.zoo.fastpose_vit.network import PoseModel, image_size, pose_of
from postlude.zoo.fastpose_vit.rotation import apparent_rotation, first_columns

__all__ = ["Training", "calibration_crops", "fit", "measure", "predict", "save", "targets"]


@dataclasses.dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        epochs: passes over the pictures.
        batch: pictures of a step.
        rate: highest learning rate, of AdamW; falls to a hundredth along a cosine.
        muon_rate: of Muon, for the matrices of the blocks; 0 for AdamW alone.
        weight_decay: of both.
        augmentation: of pictures and boxes.
    """

    epochs: int = 20
    batch: int = 64
    rate: float = 1e-3
    muon_rate: float = 0.02
    weight_decay: float = 0.01
    augmentation: Augmentation = dataclasses.field(
        default_factory=lambda: Augmentation(upside_down=False)
    )

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.rate <= 0 or self.muon_rate < 0:
            raise SettingsError(
                f"{self.epochs} epochs in batches of {self.batch} at a rate of {self.rate} (Muon {self.muon_rate}); "
                "expected 1 or more, and rates above 0 (Muon's may be 0)"
            )


def targets(model: Any, crops: Crops) -> tuple[Tensor, Tensor]:
    """What the network is to answer: ``U [n, 3]`` and six numbers of a rotation ``[n, 6]``, in fp32."""
    target, camera = pose_of(model)
    rotation = crops.rotations
    if target == "apparent":
        rotation = apparent_rotation(rotation, crops.translations)
    encoded = encode_translation(crops.translations, crops.boxes, camera)
    return encoded.float(), first_columns(rotation).float()


def _optimizers(model: Any, settings: Training) -> list[torch.optim.Optimizer]:
    inner: list[torch.nn.Parameter] = []
    outer: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        of_block = parameter.ndim == 2 and ".layer" in name and settings.muon_rate > 0
        (inner if of_block else outer).append(parameter)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(outer, lr=settings.rate, weight_decay=settings.weight_decay)
    ]
    if inner:
        decay = settings.weight_decay
        found.append(torch.optim.Muon(inner, lr=settings.muon_rate, weight_decay=decay))
    return found


def fit(
    model: Any,
    data: PoseData,
    settings: Training,
    seed: int = 0,
    *,
    device: str | torch.device = "cpu",
    log: Callable[[str], None] | None = None,
) -> Any:
    """Train a network in place; the order of pictures and every augmentation come from the seed."""
    generator = torch.Generator().manual_seed(seed)
    model.to(device).train()
    optimizers = _optimizers(model, settings)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    steps_of_epoch = math.ceil(len(data) / settings.batch)
    steps = settings.epochs * steps_of_epoch
    size, begun, step = image_size(model), time.monotonic(), 0
    for epoch in range(settings.epochs):
        order = torch.randperm(len(data), generator=generator)
        sums = torch.zeros(2)
        for part in order.split(settings.batch):
            warm = min(1.0, (step + 1) / max(1.0, 0.03 * steps))
            cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * warm * cosine
            crops = turned_crops(data.take(part), size, settings.augmentation, generator)
            encoded, six = targets(model, crops)
            outputs = model(pixel_values=crops.pixels.to(device)).logits
            rotation, translation = pose_loss(outputs, encoded.to(device), six.to(device))
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            (rotation + translation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            sums += torch.stack([rotation.detach(), translation.detach()]).cpu()
            step += 1
        if log is not None:
            rotation_loss, translation_loss = (sums / steps_of_epoch).tolist()
            seconds = time.monotonic() - begun
            left = seconds / (epoch + 1) * (settings.epochs - epoch - 1)
            log(
                f"epoch {epoch + 1} of {settings.epochs}: loss of the rotation {rotation_loss:.4f}, of the translation "
                f"{translation_loss:.4f}, {seconds:.0f} s, {left:.0f} s left"
            )
    return model.eval()


@torch.no_grad()
def predict(model: Any, data: PoseData, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Translations ``[n, 3]`` and rotations ``[n, 3, 3]`` that a network sees in the boxes of the labels, fp64."""
    pose = PoseModel(model)
    size, parameter = image_size(model), next(model.parameters())
    outputs = []
    for part in torch.arange(len(data)).split(batch):
        pixels = turned_crops(data.take(part), size).pixels.to(parameter.device, parameter.dtype)
        outputs.append(model(pixel_values=pixels).logits.double().cpu())
    return pose.decode(torch.cat(outputs), data.boxes)


def calibration_crops(model: Any, path: Path, samples: int, seed: int) -> Tensor:
    """Crops ``float32 [samples, 3, size, size]`` of pictures that the seed draws from a set.

    Raises:
        DataError: the set has fewer pictures, or labels or images that cannot be used.
    """
    there = count(path)
    if there < samples:
        raise DataError(
            f"{path} has {there} pictures, and {samples} are asked for; give more, or ask for fewer (--samples)"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(there, generator=generator)[:samples].sort().values.tolist()
    return turned_crops(load(path, drawn=drawn), image_size(model)).pixels


def measure(model: Any, data: PoseData) -> PoseErrors:
    """Errors of a network on a set."""
    translation, rotation = predict(model, data)
    return pose_errors(translation, rotation, data.translations, data.rotations)


def save(model: Any, out: Path, recipe: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write a directory of transformers: weights, configuration, image processor, and ``training.json``.

    Raises:
        OutputExistsError: there is a checkpoint already.
    """
    if (out / "config.json").exists() and not overwrite:
        raise OutputExistsError(f"{out} holds a checkpoint; give --overwrite to replace it")
    size = image_size(model)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    out.mkdir(parents=True, exist_ok=True)
    model.to("cpu").save_pretrained(out)
    for name, content in (("preprocessor_config", processor), ("training", recipe)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
