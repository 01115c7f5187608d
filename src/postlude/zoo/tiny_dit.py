"""tiny-dit: a class-conditional diffusion transformer of 0.3 million parameters on the 8 x 8 digits of scikit-learn.

python -m postlude.zoo.tiny_dit train -o DIR [--prediction epsilon|flow] [--steps 3500] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.zoo.digits import digits
from postlude.zoo.noising import NOISINGS, denoising_loss, noising_of

__all__ = ["build", "main", "save", "train_model"]

CLASSES = 10


def build(
    seed: int = 0,
    *,
    width: int = 64,
    layers: int = 3,
    heads: int = 4,
    image_size: int = 8,
    channels: int = 1,
    patch: int = 2,
    classes: int = CLASSES,
) -> Any:
    """A random diffusers ``DiTTransformer2DModel`` in fp32.

    The layers that modulate (adaLN) and the last one start at zero (arXiv:2212.09748): every block is the identity
    and the prediction is zero. Class ``classes`` means "no class".
    """
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            norm_num_groups=1,
            sample_size=image_size,
            patch_size=patch,
            num_embeds_ada_norm=classes,
        )
    zero = [block.norm1.linear for block in model.transformer_blocks]
    with torch.no_grad():
        for linear in [*zero, model.proj_out_1, model.proj_out_2]:
            linear.weight.zero_()
            linear.bias.zero_()
    return model.eval()


def train_model(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 3500,
    seed: int = 0,
    indices: Tensor | Sequence[int] | None = None,
    width: int = 64,
    layers: int = 3,
    prediction: str = "epsilon",
    batch: int = 128,
    rate: float = 2e-3,
    unlabelled: float = 0.1,
    progress: Callable[[int, float], None] | None = None,
) -> Any:
    """Train a denoiser from nothing.

    AdamW, 100 warm-up steps (a tenth of the steps if that is fewer), then a cosine to zero; no averaging of weights.

    Args:
        images: ``[n, channels, size, size]`` in [-1, 1]; the model lives on their device.
        labels: classes ``[n]``, 0 and up.
        steps: gradient steps.
        seed: of the weights and of every draw; the draws depend on the number of images, not on the device.
        indices: train on these images only.
        width: of the residual stream; four heads.
        layers: blocks.
        prediction: ``epsilon`` or ``flow``.
        batch: images per step, drawn with replacement.
        rate: the largest learning rate.
        unlabelled: share of the examples that are shown without their class, for classifier-free guidance.
        progress: called with the step and its loss.
    """
    process = noising_of(prediction)
    chosen = torch.arange(len(images)) if indices is None else torch.as_tensor(indices)
    classes = max(CLASSES, int(labels.max()) + 1)
    model = build(
        seed,
        width=width,
        layers=layers,
        image_size=images.shape[-1],
        channels=images.shape[1],
        classes=classes,
    ).to(images.device)
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    warm_up = min(100, max(1, steps // 10))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    # The model stays in eval mode: diffusers would drop labels in every block by a draw of its own.
    for step in range(steps):
        rows = chosen[torch.randint(0, len(chosen), (batch,), generator=generator)]
        noise = torch.randn(batch, *images.shape[1:], generator=generator)
        sigma = process.draw(batch, generator)
        hidden = torch.rand(batch, generator=generator) < unlabelled
        shown = torch.where(hidden.to(labels.device), classes, labels[rows.to(labels.device)])
        loss = denoising_loss(
            model,
            images[rows.to(images.device)],
            shown.to(images.device),
            noise.to(images),
            sigma.to(images),
            prediction=prediction,
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, float(loss.detach()))
    return model


def save(model: Any, out: Path, prediction: str) -> None:
    """Write ``out`` in the layout of diffusers: transformer, scheduler, model_index.json."""
    import diffusers

    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "transformer")
    scheduler = noising_of(prediction).scheduler()
    scheduler.save_pretrained(out / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", type(model).__name__],
        "vae": [None, None],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m postlude.zoo.tiny_dit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train from nothing and write a checkpoint")
    command.add_argument("-o", "--out", type=Path, required=True)
    command.add_argument("--prediction", choices=list(NOISINGS), default="epsilon")
    command.add_argument("--steps", type=int, default=3500)
    command.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    images, labels = digits()
    began = time.process_time()

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(
                f"step {step}  loss {loss:.4f}  {time.process_time() - began:.0f} CPU s", flush=True
            )

    model = train_model(images, labels, steps=options.steps, seed=options.seed,
                        prediction=options.prediction, progress=progress)  # fmt: skip
    save(model, options.out, options.prediction)
    return 0


if __name__ == "__main__":
    sys.exit(main())
