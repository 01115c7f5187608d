"""The network: a vision transformer with nine outputs on its class token (FastPose-ViT, arXiv:2512.09792).

Three numbers are the encoded translation ``U``, six the first two columns of a rotation. Any of transformers' image
classifiers with a ViT inside will do (``vit``, ``deit``, ``dinov2``, ...): the classifier's linear layer becomes the
head. So a checkpoint is an ordinary directory of transformers, and everything that works on image classifiers works
on it. What its outputs mean stands in ``config.pose``: the camera, and whether the rotation is the apparent one.

:class:`PoseModel` puts the closed formulas behind the network; all of it exports to ONNX.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postlude.errors import ArchitectureError, CheckpointError, SettingsError
from postlude.surgery.anatomy import supported_model_types
from postlude.zoo.fastpose_vit.camera import SPEED, Camera, decode_translation, viewing_direction
from postlude.zoo.fastpose_vit.rotation import gram_schmidt, minimal_rotation

__all__ = ["OUTPUTS", "Backbone", "PoseModel", "Target", "build", "image_size", "pose_of"]

OUTPUTS = 9

Target = Literal["apparent", "camera"]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The shape of a vision transformer that starts from random weights.

    Attributes:
        model_type: of transformers: ``vit``, ``deit``, ``dinov2``, ...
        image_size: pixels of a side of a crop.
        patch: pixels of a side of a patch.
        width: of the residual stream.
        depth: blocks.
        heads: of attention.
    """

    model_type: str = "vit"
    image_size: int = 48
    patch: int = 8
    width: int = 96
    depth: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        _check_type(self.model_type)
        sizes = (self.image_size, self.patch, self.width, self.depth, self.heads)
        if min(sizes) < 1 or self.image_size % self.patch or self.width % self.heads:
            raise SettingsError(
                f"a backbone for crops of {self.image_size} pixels in patches of {self.patch}, width {self.width}, "
                f"depth {self.depth} and {self.heads} heads is not possible; expected whole patches in a crop and "
                "whole heads in the width"
            )


def _check_type(model_type: str) -> None:
    known = supported_model_types("vision")
    if model_type not in known:
        raise SettingsError(
            f"a backbone of type {model_type!r} is no vision transformer that is described here, so it could be "
            f"trained but not loaded again; expected {', '.join(known)}"
        )


def build(
    backbone: Backbone | str | os.PathLike[str],
    seed: int = 0,
    *,
    target: Target = "apparent",
    camera: Camera = SPEED,
) -> Any:
    """A network to be trained.

    Args:
        backbone: a shape, for random weights, or the directory of a pretrained image model.
        seed: of the random weights.
        target: which rotation it is to predict.
        camera: of the images.

    Raises:
        SettingsError: no vision transformer that can be loaded again.
        CheckpointError: the directory cannot be loaded.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    pose = {"target": target, "camera": dataclasses.asdict(camera)}
    labels = {"num_labels": OUTPUTS, "pose": pose}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not isinstance(backbone, Backbone):
            return _pretrained(Path(backbone), labels)
        config = AutoConfig.for_model(
            backbone.model_type,
            image_size=backbone.image_size,
            patch_size=backbone.patch,
            hidden_size=backbone.width,
            num_hidden_layers=backbone.depth,
            num_attention_heads=backbone.heads,
            intermediate_size=4 * backbone.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **labels,
        )
        known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        # DeiT has two, with and without the token of its teacher; the first is without.
        return (known[0] if isinstance(known, tuple | list) else known)(config).float()


def _pretrained(directory: Path, labels: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageClassification

    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is not a directory with a pretrained model: it has no config.json. Fetch one first "
            "(hf download NAME --local-dir DIRECTORY)"
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {directory}: {error}") from error
    _check_type(config.model_type)
    try:
        return AutoModelForImageClassification.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            **labels,
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {directory}: {error}") from error


def pose_of(model: Any) -> tuple[Target, Camera]:
    """What the outputs of a pose model mean.

    Raises:
        ArchitectureError: the model predicts no poses.
    """
    config = model.config
    pose = getattr(config, "pose", None)
    if not isinstance(pose, dict) or getattr(config, "num_labels", None) != OUTPUTS:
        raise ArchitectureError(
            f"this {type(model).__name__} predicts no poses: its configuration has no 'pose' and "
            f"{getattr(config, 'num_labels', 'no')} outputs. Expected a checkpoint that "
            "`python -m postlude.zoo.fastpose_vit train` wrote, with 9 outputs"
        )
    try:
        return pose["target"], Camera(**pose["camera"])
    except (KeyError, TypeError) as error:
        raise ArchitectureError(f"the configuration's 'pose' is {pose!r}: {error}") from error


def image_size(model: Any) -> int:
    """Pixels of a side of the crops that a model reads."""
    size = model.config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


class PoseModel(nn.Module):
    """A network with the formulas that turn its outputs into a pose.

    The direction that undoes the apparent rotation is that of the predicted translation, never of the true one.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.target, self.camera = pose_of(network)

    def forward(self, pixel_values: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Translations ``[n, 3]`` in metres and rotations ``[n, 3, 3]`` of crops seen in boxes ``[n, 4]``."""
        outputs = self.network(pixel_values=pixel_values).logits
        return self.decode(outputs.to(boxes.dtype), boxes)

    def decode(self, outputs: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the nine outputs ``[n, 9]``."""
        encoded, rotation = outputs[:, :3], gram_schmidt(outputs[:, 3:])
        if self.target == "apparent":
            rotation = minimal_rotation(viewing_direction(encoded, boxes, self.camera)) @ rotation
        return decode_translation(encoded, boxes, self.camera), rotation
