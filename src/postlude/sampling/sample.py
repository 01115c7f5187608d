"""Draw images from a diffusion model: the same seed gives the same images.

The noise of sample ``i`` is drawn on the CPU from the seed and ``i`` alone, so neither the batch size, nor how many
samples are drawn, nor the device changes it, and two models can be compared on the same noise. Noise that a sampler
adds on the way comes from the same stream. The path is kept in fp32; the network computes in its own type.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from postlude.errors import ArchitectureError, CheckpointError, DataError, SettingsError
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.sampling.reuse import BlockReuse, check_reuse
from postlude.sampling.samplers import build_scheduler, check_steps, sampler_of

__all__ = [
    "GuidedDenoiser",
    "Samples",
    "balanced_labels",
    "check_diffusion",
    "check_guidance",
    "first_noise",
    "generators",
    "image_shape",
    "labels_of",
    "rows_of",
    "sample",
]


@dataclass(frozen=True)
class Samples:
    """Images and how they came to be.

    Attributes:
        images: ``[n, channels, height, width]``, fp32 on the CPU, as the sampler left them: not clamped.
        labels: the classes ``[n]``; None for a model without classes.
        sampler: its name, or the class of a scheduler that has no name here.
        steps: of the sampler.
        seed: of all noise.
        guidance: of classifier-free guidance; 1 is none.
        seconds: of the clock.
    """

    images: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    sampler: str
    steps: int
    seed: int
    guidance: float
    seconds: float


class GuidedDenoiser:
    """A diffusion transformer as a function of a noisy batch: ``denoiser(noisy, timestep, rows)``.

    Class-conditional models are told the label of each row; what other conditions a model takes is given as tensors
    with one row per sample. Channels that predict a variance are dropped.

    Args:
        checkpoint: with a diffusers transformer.
        labels: class of every sample ``[n]``.
        conditions: further arguments of the model, each with one row per sample; ``negative_NAME`` is what NAME is
            without guidance.
        guidance: 1 for none; else the prediction is ``none + guidance * (conditional - none)`` (arXiv:2207.12598).
        reuse: the blocks run at every so many timesteps, see :mod:`postlude.sampling.reuse`; 1 for all.

    Raises:
        ArchitectureError: the model needs conditions that are not given.
        SettingsError: guidance below 0, or for a model that has no "no class".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        labels: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        guidance: float = 1.0,
        reuse: int = 1,
    ) -> None:
        check_guidance(guidance)
        check_reuse(reuse)
        self.model = checkpoint.model
        self.guidance = guidance
        self._reuse = None if reuse == 1 else BlockReuse(checkpoint.anatomy, reuse)
        given = dict(conditions or {})
        self._without = {
            key.removeprefix(_NEGATIVE): given.pop(key)
            for key in list(given)
            if key.startswith(_NEGATIVE)
        }
        self._with = given if labels is None else {**given, "class_labels": labels}
        if labels is not None and guidance != 1.0:
            self._without["class_labels"] = torch.full_like(labels, _no_class(self.model))
        self._check()

    @torch.no_grad()
    def __call__(self, noisy: Tensor, timestep: Tensor, rows: slice) -> Tensor:
        """The prediction for samples ``rows``, fp32, of the shape of ``noisy``."""
        predicted = self._predict(noisy, timestep, rows, self._with)
        if self.guidance == 1.0:
            return predicted
        blind = self._predict(noisy, timestep, rows, {**self._with, **self._without})
        return blind + self.guidance * (predicted - blind)

    def _predict(
        self, noisy: Tensor, timestep: Tensor, rows: slice, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        device, dtype = noisy.device, self.model.dtype
        reuse = self._reuse
        with contextlib.nullcontext() if reuse is None else reuse.step(self.model, timestep):
            output = self.model(
                noisy.to(dtype),
                timestep=timestep.to(device).expand(len(noisy)),
                return_dict=False,
                **{
                    key: value[rows].to(device, dtype if value.is_floating_point() else None)
                    for key, value in conditions.items()
                },
            )[0]
        return output[:, : noisy.shape[1]].float()

    def _check(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        unknown = [key for key in {**self._with, **self._without} if key not in parameters]
        if unknown:
            raise SettingsError(
                f"{type(self.model).__name__} takes no {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(parameters)}"
            )
        needs_text = "encoder_hidden_states" in parameters and "class_labels" not in parameters
        if needs_text and "encoder_hidden_states" not in self._with:
            raise ArchitectureError(
                f"A {type(self.model).__name__} draws what an encoded text describes, and there is none here. Give the "
                "output of its text encoder as conditions (encoder_hidden_states, one row per sample), or put the "
                "model in place of `transformer` of its diffusers pipeline."
            )
        if self.guidance != 1.0 and not self._without:
            raise SettingsError(
                f"guidance is {self.guidance:g}, and nothing says what {type(self.model).__name__} is given without "
                "a condition; expected guidance 1, or conditions named negative_..."
            )


_NEGATIVE = "negative_"


def balanced_labels(model: Any, count: int) -> Tensor | None:
    """Classes 0, 1, ... in turn ``[count]``; None for a model without classes."""
    classes = _classes(model)
    return None if classes is None else torch.arange(count) % classes


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One source of noise per sample, on the CPU; that of sample ``i`` depends on ``seed`` and ``i`` only."""
    made = []
    for index in range(count):
        digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
        made.append(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))
    return made


def first_noise(shape: Sequence[int], sources: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise ``[n, *shape]`` on the CPU, one sample from each source."""
    return torch.stack([torch.randn(tuple(shape), generator=source) for source in sources])


def image_shape(model: Any) -> tuple[int, ...]:
    """``(channels, height, width)`` of what a diffusion transformer denoises.

    Raises:
        ArchitectureError: its configuration does not say.
    """
    size, channels = (model.config.get(key) for key in ("sample_size", "in_channels"))
    if size is None or channels is None:
        raise ArchitectureError(
            f"The configuration of {type(model).__name__} does not say what shape its images have (sample_size, "
            "in_channels). Put the model in place of `transformer` of its diffusers pipeline instead."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return (int(channels), int(height), int(width))


def sample(
    checkpoint: Checkpoint,
    *,
    count: int = 64,
    sampler: str | None = None,
    steps: int = 20,
    labels: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    conditions: Mapping[str, Tensor] | None = None,
    reuse: int = 1,
    batch_size: int = 250,
    wrap: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
    title: str = "sample",
) -> Samples:
    """Draw images.

    Args:
        checkpoint: a diffusion transformer with its scheduler, float or quantized.
        count: how many images.
        sampler: a name of :data:`postlude.sampling.samplers.SAMPLERS`; None for the checkpoint's own scheduler.
        steps: of the sampler.
        labels: classes, repeated until there are ``count``; all classes in turn where not given.
        seed: of the noise.
        guidance: classifier-free guidance; 1 is none.
        conditions: what a model without classes is conditioned on, see :class:`GuidedDenoiser`; one row serves all.
        reuse: the model's blocks run at every so many timesteps; 1 for all.
        batch_size: images at a time; the images are the same for any, up to rounding.
        wrap: makes of the scheduler the one to use, for example one that corrects it.
        progress: where to show it.
        title: of the progress bar.

    Raises:
        CheckpointError: not a diffusion model, or one without a scheduler.
        ArchitectureError: a model that this loop cannot drive.
        SettingsError, UnknownNameError: a sampler or a number that cannot be.
        DataError: images that are not finite.
    """
    _check_numbers(count=count, batch_size=batch_size)
    check_diffusion(checkpoint)
    shape = image_shape(checkpoint.model)
    classes = labels_of(checkpoint.model, labels, count)
    conditions = rows_of(conditions, count)
    denoiser = GuidedDenoiser(
        checkpoint, labels=classes, conditions=conditions, guidance=guidance, reuse=reuse
    )
    scheduler = build_scheduler(checkpoint.scheduler, sampler)
    check_steps(scheduler, steps)
    name = sampler_of(scheduler) or type(scheduler).__name__
    if wrap is not None:
        scheduler = wrap(scheduler)
    sources = generators(seed, count)
    started = time.perf_counter()
    done = []
    with progress or Progress(False) as shown:
        task = shown.task(title, count)
        for first in range(0, count, batch_size):
            rows = slice(first, min(first + batch_size, count))
            done.append(_path(denoiser, scheduler, steps, shape, sources[rows], rows).cpu())
            task.advance(len(done[-1]))
        task.close()
    images = torch.cat(done)
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise DataError(
            f"{bad} of {count} images hold NaN or infinity: the model overflows in {checkpoint.model.dtype} or the "
            "sampler diverges. Compute in float32, or take more steps."
        )
    return Samples(images, classes, name, steps, seed, guidance, time.perf_counter() - started)


def _path(
    denoiser: GuidedDenoiser,
    scheduler: Any,
    steps: int,
    shape: tuple[int, ...],
    sources: list[torch.Generator],
    rows: slice,
) -> Tensor:
    device = denoiser.model.device
    # A scheduler remembers the last steps; setting the timesteps makes it forget them.
    scheduler.set_timesteps(steps, device=device)
    image = first_noise(shape, sources).to(device) * float(
        getattr(scheduler, "init_noise_sigma", 1.0)
    )
    fresh = (
        {"generator": sources}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for timestep in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", None)
        seen = image if scale is None else scale(image, timestep)
        predicted = denoiser(seen, timestep, rows)
        image = scheduler.step(predicted, timestep, image, return_dict=False, **fresh)[0]
    return image


def labels_of(model: Any, labels: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
    """Classes ``[count]``: ``labels`` repeated, all in turn where not given; None for a model without classes.

    Raises:
        SettingsError: labels that the model does not know.
    """
    if labels is None:
        return balanced_labels(model, count)
    classes = _classes(model)
    if classes is None:
        raise SettingsError(
            f"labels are given, and {type(model).__name__} knows no classes; leave them out"
        )
    wanted = torch.as_tensor(labels, dtype=torch.long).flatten()
    if not len(wanted) or int(wanted.min()) < 0 or int(wanted.max()) >= classes:
        raise SettingsError(
            f"labels are {wanted.tolist()}; expected classes from 0 to {classes - 1}"
        )
    return wanted.repeat(-(-count // len(wanted)))[:count]


def _classes(model: Any) -> int | None:
    if "class_labels" not in inspect.signature(model.forward).parameters:
        return None
    found = model.config.get("num_embeds_ada_norm")
    return None if found is None else int(found)


def _no_class(model: Any) -> int:
    """The label that stands for no class: the row after the last class, if the table has one."""
    classes = _classes(model)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if classes is None or not any(table.num_embeddings > classes for table in tables):
        raise SettingsError(
            f"guidance needs a model that was also trained without classes; this {type(model).__name__} was not. "
            "Expected guidance 1"
        )
    return classes


def rows_of(conditions: Mapping[str, Tensor] | None, count: int) -> dict[str, Tensor]:
    """Conditions with a row for each of ``count`` samples; a single row is repeated.

    Raises:
        SettingsError: another number of rows.
    """
    found = {}
    for name, value in (conditions or {}).items():
        rows = len(value) if value.ndim else 0
        if rows not in (1, count):
            raise SettingsError(
                f"the condition {name} has {rows} rows for {count} samples; expected one for each, or one for all"
            )
        found[name] = value.expand(count, *value.shape[1:])
    return found


def check_diffusion(checkpoint: Checkpoint) -> None:
    """Refuse what cannot be sampled from.

    Raises:
        CheckpointError: not a diffusion model, or one without a scheduler.
    """
    if getattr(checkpoint, "scheduler", None) is None:
        kind = getattr(checkpoint, "kind", None)
        what = f"a {kind} model" if kind not in (None, "diffusion") else "without a scheduler"
        raise CheckpointError(
            f"{checkpoint.path or type(checkpoint.model).__name__} is {what}; sampling needs a diffusion model: a "
            "diffusers directory with transformer/ and scheduler/, or zoo:tiny-dit"
        )


def check_guidance(guidance: float) -> None:
    """Refuse what classifier-free guidance cannot be.

    Raises:
        SettingsError: not a number, infinite, or below 0.
    """
    if not (math.isfinite(guidance) and guidance >= 0):
        raise SettingsError(
            f"guidance is {guidance:g}; expected a number of at least 0: 0 draws without the class, 1 is no guidance, "
            "more exaggerates the class"
        )


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise SettingsError(f"{name} is {value}; expected 1 or more")
