"""Judge a diffusion model by its samples."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from postlude._front_door.opening import Path_, open_checkpoint
from postlude._front_door.sampling import sample
from postlude.errors import SettingsError
from postlude.evaluation.samples import judge_samples
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = ["evaluate_samples"]


def evaluate_samples(
    checkpoint: Path_ | Checkpoint,
    *,
    reference: Path_ | Checkpoint | None = None,
    count: int = 1500,
    sampler: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    reuse: int = 1,
    drift: Path_ | None = None,
    drift_mode: str | None = None,
    drift_bias: float = 0.0,
    real: Tensor | None = None,
    batch_size: int = 250,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw samples, all classes in turn, and judge them; with a reference also its samples from the same noise.

    Args:
        checkpoint: loaded, or a diffusers directory; float or quantized.
        reference: the float model, say.
        count: how many samples; Frechet distances of different numbers are not comparable.
        sampler, steps, seed, guidance, reuse, drift, drift_mode, drift_bias, batch_size: see :func:`postlude.sample`;
            reuse and correction are applied to ``checkpoint`` only.
        real: real images ``[m, channels, height, width]`` in [-1, 1]; of digits they are built in.
        progress: where to show it.

    Returns:
        What :func:`postlude.evaluation.samples.judge_samples` finds; ``count``, ``sampler``, ``sampler_reference``,
        ``steps``, ``seed``, ``guidance``, ``reuse``, ``drift``; ``notes``, what the numbers cannot say; ``seconds``.

    Raises:
        CheckpointError: not a diffusion model.
        SettingsError, UnknownNameError, DataError, ArchitectureError: see :func:`postlude.sample`.
    """
    if count < 2:
        raise SettingsError(
            f"count is {count}; expected 2 or more: distances are between distributions"
        )
    started = time.perf_counter()
    drawn = sample(
        open_checkpoint(checkpoint),
        compare=reference,
        count=count,
        sampler=sampler,
        steps=steps,
        seed=seed,
        guidance=guidance,
        reuse=reuse,
        drift=drift,
        drift_mode=drift_mode,
        drift_bias=drift_bias,
        batch_size=batch_size,
        progress=progress,
    )
    samples, compared = drawn["samples"], drawn.get("compared")
    found = judge_samples(
        samples.images,
        samples.labels,
        reference=None if compared is None else compared.images,
        real=real,
    )
    kept = ("count", "sampler", "steps", "seed", "guidance", "reuse", "drift")
    settings = {key: drawn[key] for key in kept}
    settings["sampler_reference"] = drawn.get("sampler_compared")
    return {
        **found,
        **settings,
        "notes": _notes(found, count),
        "seconds": time.perf_counter() - started,
    }


def _notes(found: dict[str, Any], count: int) -> list[str]:
    notes = []
    if found["frechet_pixels"] is None:
        notes.append(
            "no Frechet distance: these are not 8 x 8 digits; give real images to compare with (--real)"
        )
    elif count < 1000:
        notes.append(
            f"{count} samples: a Frechet distance of fewer than about 1000 is mostly their number's"
        )
    if found["psnr_db"] == float("inf"):
        notes.append("psnr_db is infinite: both models draw the same images, bit for bit")
    return notes
