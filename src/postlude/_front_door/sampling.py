"""Draw samples from diffusion models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from postlude._front_door.opening import Path_, open_checkpoint
from postlude.errors import SettingsError
from postlude.numerics.image_distance import psnr
from postlude.runs.atomic import atomic_write, check_replaceable_file
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.sampling.drift import DriftStatistics
from postlude.sampling.grid import Panel, check_colours, write_grid
from postlude.sampling.q_drift import MODES, QDrift, correct
from postlude.sampling.reuse import check_reuse
from postlude.sampling.sample import Samples, check_diffusion, check_guidance, image_shape
from postlude.sampling.sample import sample as _sample
from postlude.sampling.samplers import process_of, sampler_named

__all__ = ["sample"]

_MAGNIFIED = 4
_STEPS = 20


def sample(
    checkpoint: Path_ | Checkpoint,
    *,
    count: int = 64,
    sampler: str | None = None,
    steps: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    guidance: float = 1.0,
    conditions: Mapping[str, Tensor] | None = None,
    reuse: int = 1,
    compare: Path_ | Checkpoint | None = None,
    drift: Path_ | None = None,
    drift_mode: str | None = None,
    drift_bias: float = 0.0,
    batch_size: int = 250,
    out: Path_ | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw images from a diffusion transformer, float or quantized.

    Args:
        checkpoint: loaded, or a diffusers directory.
        count: how many images.
        sampler: a name of :data:`postlude.sampling.samplers.SAMPLERS`; None for the one that ``drift`` was made with,
            else for the checkpoint's own scheduler.
        steps: of the sampler; None for those of ``drift``, else 20.
        labels: classes, repeated until there are ``count``; all classes in turn where not given.
        seed: of the noise; sample ``i`` starts from the same noise whatever else is drawn, and in every model.
        guidance: of classifier-free guidance, 0 or more; 1 is none.
        conditions: what a model without classes is conditioned on (``encoder_hidden_states`` and the like).
        reuse: the blocks of ``checkpoint``, not those of ``compare``, run at every so many timesteps; 1 for all.
        compare: another model, drawn from the same noise.
        drift: a statistic of ``postlude sample calibrate``: its correction is applied to ``checkpoint``, not to
            ``compare``.
        drift_mode: ``corrected`` (where None), or ``paper`` for the rule as published.
        drift_bias: how much of the error to be expected, given the output, is subtracted from it.
        batch_size: images at a time; changes nothing but speed and memory.
        out: a .png file for the grid, with the tensors beside it; or a .safetensors file for the tensors alone.
        overwrite: replace them.
        progress: where to show it.

    Returns:
        ``samples`` (:class:`postlude.sampling.sample.Samples`), ``count``, ``sampler``, ``steps``, ``seed``,
        ``guidance``, ``reuse``, ``seconds`` and ``milliseconds_per_image``; with ``compare`` ``compared`` (its
        samples), ``sampler_compared`` (its sampler), ``psnr_db``, the ratio of the mean squared error of all images to
        the squared range 2, and ``psnr_db_lowest`` of the worst image, null where the two are equal; with ``out``
        ``grid`` and ``tensors``, the files.

    Raises:
        CheckpointError: not a diffusion model.
        OutputExistsError: a file that may not be replaced.
        SettingsError, UnknownNameError, DataError, ArchitectureError: see :func:`postlude.sampling.sample.sample`.
    """
    files = _files(out, overwrite)
    check_guidance(guidance)
    check_reuse(reuse)
    if drift_bias and drift is None:
        raise SettingsError(
            f"the bias of the drift correction is {drift_bias:g}, and there are no drift statistics to correct by: "
            "give them (--drift FILE, drift=...), or leave the bias out"
        )
    if drift_mode is not None and drift is None:
        raise SettingsError(
            f"the mode of the drift correction is {drift_mode!r}, and there are no drift statistics to correct by: "
            "give them (--drift FILE, drift=...), or leave the mode out"
        )
    mine = open_checkpoint(checkpoint)
    other = None if compare is None else open_checkpoint(compare)
    for model in (mine, other):
        if model is not None:
            check_diffusion(model)
            if files is not None and files[0] is not None:
                check_colours(image_shape(model.model)[0])
    statistics = _statistics(drift, mine, guidance=guidance, reuse=reuse)
    if sampler is None and statistics is not None:
        sampler = _same_sampler(statistics, mine)
    if steps is None:
        steps = _STEPS if statistics is None else statistics.steps
    common: dict[str, Any] = {
        "count": count, "sampler": sampler, "steps": steps, "labels": labels, "seed": seed, "guidance": guidance,
        "conditions": conditions, "batch_size": batch_size,
    }  # fmt: skip
    with progress or Progress(False) as shown:
        wrap = _correction(statistics, MODES[0] if drift_mode is None else drift_mode, drift_bias)
        drawn = _sample(
            mine, **common, reuse=reuse, wrap=wrap, progress=shown, title=_name(mine, checkpoint)
        )
        second = None
        if other is not None:
            second = _sample(other, **common, progress=shown, title=_name(other, compare))
    result: dict[str, Any] = {
        "samples": drawn,
        "count": count,
        "sampler": drawn.sampler,
        "steps": steps,
        "seed": seed,
        "guidance": guidance,
        "reuse": reuse,
        "drift": drift,
        "seconds": drawn.seconds,
        "milliseconds_per_image": 1000.0 * drawn.seconds / count,
    }
    panels = [Panel(_name(mine, checkpoint), drawn.images)]
    if second is not None:
        each = psnr(drawn.images, second.images)
        whole = psnr(drawn.images.reshape(1, -1), second.images.reshape(1, -1))
        result |= {
            "compared": second,
            "sampler_compared": second.sampler,
            "psnr_db": float(whole),
            "psnr_db_lowest": float(each.min()),
        }
        difference = _MAGNIFIED * (drawn.images - second.images)
        panels.append(Panel(_name(other, compare), second.images))
        panels.append(Panel(f"difference x {_MAGNIFIED}, grey: none", difference))
    if files is not None:
        _write(files, panels, result)
        result |= {"grid": files[0], "tensors": files[1]}
    return result


def _statistics(
    drift: Path_ | None, checkpoint: Checkpoint, **conditions: float
) -> DriftStatistics | None:
    if drift is None:
        return None
    statistics = DriftStatistics.load(drift)
    statistics.check_models(approximate=checkpoint.fingerprint())
    statistics.check_conditions(**conditions)
    return statistics


def _same_sampler(statistics: DriftStatistics, checkpoint: Checkpoint) -> str | None:
    own = checkpoint.scheduler
    if type(own).__name__ == statistics.scheduler:
        return None
    return sampler_named(process_of(own), statistics.scheduler, statistics.config)


def _correction(
    statistics: DriftStatistics | None, mode: str, bias: float
) -> Callable[[Any], Any] | None:
    if statistics is None:
        return None
    settings = QDrift(mode=mode, bias_scale=bias)
    return lambda scheduler: correct(scheduler, statistics, settings)


def _name(checkpoint: Checkpoint | None, given: object) -> str:
    """What a picture calls a model: its directory, or what the caller wrote."""
    if isinstance(given, str | os.PathLike):
        return Path(given).name
    path = None if checkpoint is None else checkpoint.path
    return "model" if path is None else path.name


def _files(out: Path_ | None, overwrite: bool) -> tuple[Path | None, Path] | None:
    """The picture, if one is asked for, and the tensors."""
    if out is None:
        return None
    file = Path(out)
    if file.suffix.lower() not in (".png", ".safetensors"):
        raise SettingsError(
            f"the output is {file}; expected a file that ends in .png, a picture with the tensors beside it, or in "
            ".safetensors, the tensors alone"
        )
    tensors = file.with_suffix(".safetensors")
    grid = None if file == tensors else file
    for one in (grid, tensors):
        if one is not None:
            check_replaceable_file(one, overwrite)
    return grid, tensors


def _write(files: tuple[Path | None, Path], panels: list[Panel], result: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    drawn: Samples = result["samples"]
    samplers = drawn.sampler
    if result.get("sampler_compared", samplers) != samplers:
        samplers = f"{samplers} beside {result['sampler_compared']}"
    about = [samplers, f"{drawn.steps} steps", f"seed {drawn.seed}"]
    if drawn.guidance != 1.0:
        about.append(f"guidance {drawn.guidance:g}")
    if result["reuse"] != 1:
        about.append(f"blocks at every {result['reuse']}th timestep")
    if result["drift"] is not None:
        about.append("corrected for drift")
    if "psnr_db" in result:
        about.append(f"PSNR {result['psnr_db']:.1f} dB" if result["psnr_db"] < 200 else "equal")
    grid, tensors = files
    tensors.resolve().parent.mkdir(parents=True, exist_ok=True)
    found = {"images": drawn.images}
    if drawn.labels is not None:
        found["labels"] = drawn.labels
    if "compared" in result:
        found["compared"] = result["compared"].images
    settings = {key: getattr(drawn, key) for key in ("sampler", "steps", "seed", "guidance")}
    settings["reuse"] = result["reuse"]
    with atomic_write(tensors) as temporary:
        save_file(found, temporary, metadata={"sample": json.dumps(settings)})
        temporary.chmod(0o644)
    if grid is None:
        return
    with atomic_write(grid) as temporary:
        write_grid(temporary, panels, drawn.labels, ", ".join(about))
