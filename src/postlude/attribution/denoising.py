"""What is differentiated of a denoiser: its loss, the norm of its output, and others; one number per image.

Every output is a mean over ``K`` timesteps ``0, T/K, 2T/K, ...``, over draws of noise at each, and over pixels. Noise
depends on the seed, the timestep and the draw alone: training images and queries, in whatever batch, meet the same.
An image stands in a batch once for each timestep and draw, its versions one after the other, so the collector sums
their gradients before it keeps anything::

    loss          mean (eps_theta(x_t, t) - eps)^2           what the model was trained on; of a flow its velocity
    output-norm   mean eps_theta(x_t, t)^2                   D-TRAK (arXiv:2311.00500): no target at all
    output-mean   mean eps_theta(x_t, t)                     DAS (arXiv:2410.18639)
    journey       the loss at x_t on the image's own sampling trajectory (JourneyTRAK, arXiv:2312.06205)

The trajectory of ``journey`` is that of the deterministic sampler, run backwards from the image (Euler steps over the
timesteps above): a query need not come with the noise that it was drawn from. That, and taking the noise of a point to
be what leads from the image to it, are our choices.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from postlude.attribution.examples import Collection
from postlude.attribution.images import ImageBatch
from postlude.attribution.outputs import Output, output
from postlude.errors import ArchitectureError, CheckpointError, SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.surgery.batches import device_of
from postlude.zoo.noising import Noising, noising_of

__all__ = ["Denoised", "Process", "denoised", "process_of", "timesteps"]


class Process(NamedTuple):
    """The noise that a scheduler adds, at the timesteps of a collection.

    Attributes:
        noising: how an image is noised at a level.
        timesteps: as the model is told them, ``[K]``.
        levels: ``sigma [K]`` fp32.
    """

    noising: Noising
    timesteps: Tensor
    levels: Tensor


class Denoised(NamedTuple):
    """A batch that has been through the model, draws of an image one after the other.

    Attributes:
        predicted, target: ``[rows, draws, channels, height, width]``; ``predicted`` is differentiable.
    """

    predicted: Tensor
    target: Tensor

    def errors(self) -> Tensor:
        """Mean squared error of every draw, ``[rows, draws]``."""
        return (self.predicted - self.target).square().flatten(2).mean(2)


def timesteps(count: int, trained: int) -> list[int]:
    """``0, T/K, 2T/K, ...``: ``count`` of ``trained`` timesteps.

    Raises:
        SettingsError: more than there are.
    """
    if not 1 <= count <= trained:
        raise SettingsError(
            f"timesteps is {count}; expected 1 to {trained}, those that the model was trained on"
        )
    return [math.floor(trained * step / count) for step in range(count)]


def process_of(checkpoint: Checkpoint, collection: Collection) -> Process:
    """The noise that a checkpoint was trained with.

    Raises:
        CheckpointError: it has no scheduler, or one that says neither epsilon nor flow.
    """
    scheduler = checkpoint.scheduler
    if scheduler is None:
        raise CheckpointError(
            f"{checkpoint.path or 'this model'} has no scheduler, so nobody knows how its images were noised: give the "
            "whole diffusers directory, with scheduler/scheduler_config.json"
        )
    trained = int(scheduler.config.num_train_timesteps)
    chosen = torch.tensor(timesteps(collection.timesteps, trained))
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        return Process(noising_of("flow"), chosen, chosen.float() / trained)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise CheckpointError(
            f"the scheduler of {checkpoint.path or 'this model'} says that the model predicts {prediction!r}; "
            "expected epsilon, or a flow"
        )
    share = kept.double()[chosen]
    return Process(noising_of("epsilon"), chosen, ((1 - share) / share).sqrt().float())


def noise(collection: Collection, timestep: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal ``shape``, a function of the seed, the timestep and the draw."""
    digest = hashlib.sha256(f"noise {collection.seed} {timestep} {draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    return torch.randn(shape, generator=generator)


def denoised(checkpoint: Checkpoint, collection: Collection) -> Callable[[ImageBatch], Denoised]:
    """A function that noises the images of a batch and runs the model on all of them at once."""
    process = process_of(checkpoint, collection)
    run = _runner(checkpoint)
    kinds = [(t, draw) for t in process.timesteps.tolist() for draw in range(collection.noises)]
    repeat = collection.noises

    def work(batch: ImageBatch) -> Denoised:
        pixels = batch.pixels
        drawn = torch.stack([noise(collection, t, d, tuple(pixels.shape[1:])) for t, d in kinds])
        levels = process.levels.repeat_interleave(repeat)
        wide = pixels.repeat_interleave(len(kinds), 0)
        inputs, target = process.noising.noised(
            wide, drawn.repeat(len(pixels), 1, 1, 1), levels.repeat(len(pixels))
        )
        told = process.timesteps.repeat_interleave(repeat).repeat(len(pixels))
        predicted = run(inputs, told, batch.labels.repeat_interleave(len(kinds)))
        shape = (len(pixels), len(kinds), *pixels.shape[1:])
        return Denoised(predicted.view(shape), target.to(predicted).view(shape))

    return work


def _runner(checkpoint: Checkpoint) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The model: inputs ``[n, ...]``, timesteps ``[n]``, classes ``[n]`` (-1 for none) to predictions ``[n, ...]``."""
    model = checkpoint.model
    taken = inspect.signature(model.forward).parameters
    if "encoder_hidden_states" in taken and "class_labels" not in taken:
        raise ArchitectureError(
            f"a {type(model).__name__} draws what an encoded text describes, and images with classes have none: "
            "attribution works on denoisers that are told a class, or nothing"
        )
    device, dtype = device_of(model), model.dtype
    classes = int(getattr(model.config, "num_embeds_ada_norm", 0) or 0)

    def run(inputs: Tensor, told: Tensor, labels: Tensor) -> Tensor:
        conditions = {}
        if classes:
            # The row after the last class is the one without.
            shown = torch.where(labels < 0, classes, labels)
            conditions["class_labels"] = shown.to(device)
        found = model(
            inputs.to(device, dtype), timestep=told.to(device), return_dict=False, **conditions
        )[0]
        # Further channels predict a variance.
        result: Tensor = found[:, : inputs.shape[1]]
        return result

    return run


def _output(value: Callable[[Denoised], Tensor]) -> Callable[[Checkpoint, Collection], Output]:
    """An output from a number per draw, ``[rows, draws]``: its mean; beside it the loss."""

    def maker(checkpoint: Checkpoint, collection: Collection) -> Output:
        work = denoised(checkpoint, collection)

        def run(batch: ImageBatch) -> tuple[Tensor, Tensor]:
            made = work(batch)
            return value(made).mean(1), made.errors().detach().mean(1)

        return run

    return maker


output("loss", "diffusion")(_output(Denoised.errors))
output("output-norm", "diffusion")(_output(lambda made: made.predicted.square().flatten(2).mean(2)))
output("output-mean", "diffusion")(_output(lambda made: made.predicted.flatten(2).mean(2)))


@output("log-odds", "diffusion")
def whole_loss(checkpoint: Checkpoint, collection: Collection) -> Output:
    """TRAK's output of a denoiser is its loss, and there is no factor ``1 - p``: ones (as in D-TRAK's code)."""
    loss = _output(Denoised.errors)(checkpoint, collection)

    def run(batch: ImageBatch) -> tuple[Tensor, Tensor]:
        each, _ = loss(batch)
        return each, torch.ones_like(each.detach())

    return run


@output("journey", "diffusion")
def journey(checkpoint: Checkpoint, collection: Collection) -> Output:
    """The loss along the image's own sampling trajectory."""
    process = process_of(checkpoint, collection)
    run = _runner(checkpoint)
    flow = process.noising.name == "flow"

    def work(batch: ImageBatch) -> tuple[Tensor, Tensor]:
        pixels = batch.pixels
        count = len(pixels)
        # In the coordinates of the ODE, where the prediction is the derivative: x0 + sigma eps, or the straight path.
        place, level = pixels, torch.zeros(())
        predicted = None
        points = []
        with torch.no_grad():
            for told, sigma in zip(process.timesteps, process.levels, strict=True):
                if predicted is None:
                    predicted = run(_scaled(place, level, flow), told.expand(count), batch.labels)
                place = place + (sigma - level) * predicted.to(place)
                level = sigma
                points.append(place)
                predicted = run(_scaled(place, level, flow), told.expand(count), batch.labels)
        path = torch.stack(points, 1)
        levels = process.levels.view(1, -1, *[1] * (path.ndim - 2))
        inputs = _scaled(path, levels, flow).flatten(0, 1)
        told = process.timesteps.repeat(count)
        found = run(inputs, told, batch.labels.repeat_interleave(len(process.timesteps)))
        found = found.view_as(path)
        # A flow without noise has no direction yet: nothing is asked of it there.
        led = (path - pixels[:, None]) / torch.where(levels > 0, levels, 1.0)
        target = torch.where(levels.to(found) > 0, led.to(found), found.detach())
        errors = Denoised(found, target).errors().mean(1)
        return errors, errors.detach()

    return work


def _scaled(x: Tensor, level: Tensor, flow: bool) -> Tensor:
    """What the network is given at a point of the ODE."""
    return x if flow else x / (1 + level * level).sqrt()
