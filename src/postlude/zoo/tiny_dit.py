"""tiny-dit: a class-conditional diffusion transformer of 0.3 million parameters on the 8 x 8 digits of scikit-learn.

    python -m postlude.zoo.tiny_dit train -o DIR [--prediction epsilon|flow] [--steps 3500] [--seed 0]
    python -m postlude.zoo.tiny_dit check [DIR] [--json]

Three blocks of width 64 with four heads, patches of 2 x 2 pixels: diffusers' ``DiTTransformer2DModel`` on pixels,
without an autoencoder. ``zoo:tiny-dit`` predicts the noise, ``zoo:tiny-dit-flow`` the velocity of a flow; how images
are noised is told in `postlude.zoo.noising`. Training takes about three minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.errors import (
    DataError,
    InputError,
    MissingDependencyError,
    OutputExistsError,
    SettingsError,
)
from postlude.numerics.image_distance import frechet_distance, gaussian_of
from postlude.zoo import checkpoint_path
from postlude.zoo.digits import digits
from postlude.zoo.digits_classifier import judge
from postlude.zoo.noising import NOISINGS, denoising_loss, noising_of

__all__ = ["build", "check", "draw", "main", "save", "train_model"]

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

    Raises:
        MissingDependencyError: diffusers is not installed.
        SettingsError: a width that the heads do not divide.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise MissingDependencyError(
            "tiny-dit is a model of diffusers, which is not installed: pip install 'postlude[diffusion]'"
        ) from error
    if width % heads:
        raise SettingsError(f"width is {width} for {heads} heads; expected a multiple")
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

    Raises:
        DataError: no images, or not one label for each.
        SettingsError: fewer than one step or image a step.
        UnknownNameError: another prediction.
    """
    process = noising_of(prediction)
    if steps < 1 or batch < 1:
        raise SettingsError(f"steps is {steps} and batch {batch}; expected 1 or more")
    chosen = torch.arange(len(images)) if indices is None else torch.as_tensor(indices)
    if images.ndim != 4 or len(labels) != len(images) or not len(chosen):
        raise DataError(
            f"{len(chosen)} of images {list(images.shape)} with {len(labels)} labels; expected one label for each of "
            "[n, channels, size, size], and one image or more to train on"
        )
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


@torch.no_grad()
def draw(model: Any, scheduler: Any, labels: Tensor, *, steps: int = 18, seed: int = 0) -> Tensor:
    """Samples ``[n, channels, size, size]`` of the classes ``[n]``: the plain loop, all noise from one generator."""
    size, channels = model.config.sample_size, model.config.in_channels
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    image = torch.randn(len(labels), channels, size, size, generator=generator)
    image = image * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", None)
        seen = image if scale is None else scale(image, timestep)
        output = model(seen, timestep=timestep.expand(len(image)), class_labels=labels).sample
        image = scheduler.step(output, timestep, image).prev_sample
    return image


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
    for file in (out / "transformer").glob("*.safetensors"):
        file.chmod(0o644)  # the library writes weights for their owner alone


def check(
    directory: Path, *, count: int = 1500, steps: int = 18, seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, Any]:
    """How good a checkpoint's samples are; one number per sampling seed, and ``real`` what as many real digits get.

    Raises:
        InputError: the directory holds no checkpoint of this kind.
    """
    from diffusers import DiTTransformer2DModel

    config = directory / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        raise InputError(
            f"{directory} holds no scheduler/scheduler_config.json; expected a checkpoint of `train`"
        )
    named = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
    prediction = next(
        (name for name, one in NOISINGS.items() if type(one.scheduler()).__name__ == named), None
    )
    if prediction is None:
        raise InputError(f"{config} is of a {named}; expected the scheduler that `train` wrote")
    model = DiTTransformer2DModel.from_pretrained(directory / "transformer").eval()
    scheduler = noising_of(prediction).scheduler()
    labels, one = torch.arange(count) % CLASSES, judge()
    found: dict[str, list[float]] = {"frechet_pixels": [], "frechet": [], "class_accuracy": []}
    for seed in seeds:
        images = draw(model, scheduler, labels, steps=steps, seed=seed)
        features, classes = one.look(images)
        found["frechet_pixels"].append(frechet_distance(gaussian_of(images.flatten(1)), one.pixels))
        found["frechet"].append(frechet_distance(gaussian_of(features), one.features))
        found["class_accuracy"].append(float((classes == labels).double().mean()))
    scale = (one.count / count + 1.0) / 4.0
    real = {
        "frechet_pixels": one.halves_pixels * scale,
        "frechet": one.halves_features * scale,
        "class_accuracy": one.accuracy,
    }
    parameters = sum(weight.numel() for weight in model.parameters())
    return {"prediction": prediction, "parameters": parameters, **found, "real": real}


_ROWS = {
    "frechet_pixels": "Frechet distance, pixels",
    "frechet": "Frechet distance, features",
    "class_accuracy": "samples of the class asked for",
}
_PREDICTS = {
    "epsilon": "predicts the noise; its scheduler is `EulerDiscreteScheduler` on the grid of arXiv:2206.00364.",
    "flow": "predicts the velocity of a straight flow; its scheduler is `FlowMatchEulerDiscreteScheduler`.",
}
_LEVELS = {
    "epsilon": "log(sigma) ~ N(-0.4, 1.2^2), clamped to [0.03, 30]",
    "flow": "logit(sigma) ~ N(0, 1)",
}


def _describe(out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Write ``training.json`` and the model card; returns what was measured."""
    (out / "training.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    measured = check(out)
    config = json.loads((out / "transformer" / "config.json").read_text(encoding="utf-8"))
    weights = (out / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    prediction = recipe["prediction"]
    rows = [
        f"| {title} | {' | '.join(f'{one:.3f}' for one in [*measured[key], measured['real'][key]])} |"
        for key, title in _ROWS.items()
    ]
    values = recipe | {
        "name": "tiny-dit" if prediction == "epsilon" else f"tiny-dit-{prediction}",
        "parameters": f"{measured['parameters']:,}",
        "bytes": f"{weights:,}",
        "predicts": _PREDICTS[prediction],
        "levels": _LEVELS[prediction],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "heads": config["num_attention_heads"],
        "layers": config["num_layers"],
        "sampler": "Euler",
        "rows": "\n".join(rows),
    }
    card = (Path(__file__).parent / "tiny_dit_card.md").read_text(encoding="utf-8")
    for key, value in values.items():
        card = card.replace("{" + key + "}", str(value))
    (out / "README.md").write_text(card, encoding="utf-8")
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m postlude.zoo.tiny_dit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train from nothing and write a checkpoint")
    command.add_argument("-o", "--out", type=Path, required=True)
    command.add_argument("--prediction", choices=list(NOISINGS), default="epsilon")
    command.add_argument("--steps", type=int, default=3500)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu")
    command.add_argument("--overwrite", action="store_true")
    command = commands.add_parser("check", help="measure the samples of a checkpoint")
    command.add_argument("directory", type=Path, nargs="?", default=checkpoint_path("tiny-dit"))
    command.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        measured = check(options.directory) if options.command == "check" else _train(options)
    except (InputError, MissingDependencyError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    if getattr(options, "json", False):
        print(json.dumps(measured))
        return 0
    for key, value in measured.items():
        print(f"{key}: {value}")
    return 0


def _train(options: argparse.Namespace) -> dict[str, Any]:
    import diffusers

    if (options.out / "model_index.json").exists() and not options.overwrite:
        raise OutputExistsError(f"{options.out} holds a checkpoint; give --overwrite to replace it")
    # Denormal numbers slow a CPU down a hundredfold and carry nothing here.
    torch.set_flush_denormal(True)
    images, labels = (one.to(options.device) for one in digits())
    began, cpu = time.monotonic(), time.process_time()

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0:
            passed = time.monotonic() - began
            left = passed / (step + 1) * (options.steps - step - 1)
            line = f"step {step} of {options.steps}: loss {loss:.4f}, {passed:.0f} s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    settings = {"steps": options.steps, "seed": options.seed, "prediction": options.prediction}
    model = train_model(images, labels, **settings, progress=progress)
    save(model.to("cpu"), options.out, options.prediction)
    recipe = settings | {
        "batch": 128,
        "rate": 2e-3,
        "cpu_seconds": round(time.process_time() - cpu),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    return _describe(options.out, recipe)


if __name__ == "__main__":
    sys.exit(main())
