"""What every quantizer shares, whatever the model: language, diffusion or vision.

A system is a settings class with up to five parts, all optional but the schemes::

    fold         rewrites that need no data (untie the head, fold norms)
    statistics   tensors learned from calibration data on the folded float model
    rewrite      function-preserving rewrites made from those tensors
    schemes      how weights, inputs, keys and values are quantized
    rounding     nearest, or GPTQ (arXiv:2210.17323) block by block; another ``round_site`` for what else is stored,
                 or ``round_block`` for weights trained against the output of their block

:func:`quantize` runs them in that order. Statistics and every finished block are units of a run directory, so
a killed run resumes and ends with the same bits. Input and key/value quantizers are switched on last: Hessians
see full-precision activations through already quantized earlier layers, with online transforms active. A model
without a cache has no keys and values to quantize: those bits are left alone there.

A model in 16 bits is raised to fp32 for the rewrites and cast back once at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from postlude import registry
from postlude.errors import DataError, SettingsError
from postlude.quantization.blocks import SQUARED, Rounding, gathers
from postlude.quantization.installing import attach_key_values, install_block
from postlude.quantization.quantizer import FLOAT, Quantizer, generator
from postlude.quantization.rounded import Rounded, Seen
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.loading import resolve
from postlude.runs.pipeline import is_denoiser
from postlude.runs.processes import Processes
from postlude.runs.progress import Progress
from postlude.runs.weights import read_json
from postlude.surgery.anatomy import Block, Kind, kind_of, supported_model_types
from postlude.surgery.batches import Calibration
from postlude.surgery.key_values import KeyValueQuantizer
from postlude.surgery.layers import QuantizedLinear
from postlude.surgery.static_quantizers import switch_static_quantizers

__all__ = [
    "FLOAT",
    "Quantizer",
    "Rounded",
    "Seen",
    "Unit",
    "check_calibrated",
    "check_kind",
    "compute_unit",
    "generator",
    "quantize",
]

# What a method learns from, by the kind of model.
_DATA: dict[Kind, str] = {
    "language": "text",
    "audio": "text",
    "diffusion": "inputs of the denoiser",
    "vision": "images",
}
_GIVE = "give some (--calibration FILE)"

Unit = Callable[[str, Callable[[], Mapping[str, Tensor]]], dict[str, Tensor]]


def compute_unit(name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The unit function of a run that keeps nothing."""
    return dict(compute())


def quantize(
    checkpoint: Checkpoint,
    settings: Quantizer,
    calibration: Calibration | None,
    *,
    seed: int = 0,
    unit: Unit = compute_unit,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Quantize a checkpoint in place.

    Several processes share the blocks where inputs are not read; else, block by block, the calibration batches and
    the weights of every site, if what is gathered of inputs can be put together from parts. Statistics, and what
    cannot be shared, the first computes. All end with the same model.

    Args:
        checkpoint: float; its model is rewritten.
        settings: the method.
        calibration: token sequences ``[samples, length]`` of a language model, or batches of keyword arguments of
            the model's forward; None where the method needs none.
        seed: of every random choice.
        unit: stores finished work, see :meth:`postlude.runs.directory.RunDirectory.unit`.
        processes: those that do it together; ``unit`` then has to keep work where all of them read it. None for this
            one alone.
        progress: where to show it.

    Returns:
        The same checkpoint, ready to be saved; its ``path`` is None until it is.

    Raises:
        DataError: the method needs calibration data and got none.
        SettingsError: the method or its settings do not fit the model, or the model is already quantized.
    """
    model, anatomy = checkpoint.model, checkpoint.anatomy
    processes = processes or Processes()
    name = registry.info_of(settings).name
    made = (QuantizedLinear, KeyValueQuantizer)
    if any(isinstance(module, made) for module in model.modules()):
        raise SettingsError("this checkpoint is already quantized; start from the float one")
    check_kind(settings, checkpoint)
    if not checkpoint.reads_tokens:
        settings = dataclasses.replace(settings, kv=FLOAT)
    if settings.needs_calibration and (calibration is None or not len(calibration)):
        raise DataError(_without_data(name, checkpoint.kind))
    dtype = model.dtype
    if dtype in (torch.float16, torch.bfloat16):
        _cast(model, torch.float32)
    settings.fold(checkpoint)
    once = processes.once(unit)
    statistics = once("statistics", lambda: settings.statistics(checkpoint, calibration, seed))
    settings.rewrite(checkpoint, statistics, seed)
    attach_key_values(model, anatomy.blocks, settings)
    with progress or Progress(show=False) as shown:
        squared = _round_blocks(
            checkpoint, settings, statistics, calibration, seed, unit, processes, shown
        )
        if processes.moved:
            shown.log(f"{processes.size} ranks exchanged {processes.moved / 1e6:,.1f} MB")

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.quantize_input = True
        elif isinstance(module, KeyValueQuantizer):
            module.quantize = True
    switch_static_quantizers(model, on=True)
    _cast(model, dtype)
    made_by = {
        "method": name,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        # ||W - decoded W|| / ||W|| over all rounded weights, as they were after the rewrites.
        "weight_error": float((squared[0] / squared[1].clamp(min=1e-300)).sqrt()),
        "kept": sorted(
            {
                *anatomy.kept(),
                *(
                    path
                    for block, site in anatomy.sites()
                    if settings.skips(block, site, statistics)
                    for path in site.modules
                ),
            }
        ),
        **settings.accounts(checkpoint),
    }
    # Not at the top: it imports transformers, which takes seconds, and a wrong setting should be refused at once.
    from postlude.surgery.huggingface import mark

    mark(model, made_by)
    checkpoint.path = None
    return checkpoint


def _round_blocks(
    checkpoint: Checkpoint,
    settings: Quantizer,
    statistics: Mapping[str, Tensor],
    calibration: Calibration | None,
    seed: int,
    unit: Unit,
    processes: Processes,
    shown: Progress,
) -> Tensor:
    """Put a rounded layer in the place of every linear; ``[squared error, squared norm]`` of all weights."""
    model, anatomy = checkpoint.model, checkpoint.anatomy
    reads = calibration is not None and (settings.reads_inputs or settings.reconstructs)
    together = gathers(settings, anatomy)
    rounding = None
    if not reads or together:
        given = calibration if reads else None
        rounding = Rounding(model, anatomy, settings, statistics, given, processes, seed)
    elif processes.is_first:
        rounding = Rounding(model, anatomy, settings, statistics, calibration, Processes(), seed)
    title = f"{registry.info_of(settings).name}: blocks"

    def name(block: Block) -> str:
        return f"block-{block.index:04d}"

    if processes.size > 1 and not reads and rounding is not None:
        for block in shown.iterate(processes.share(anatomy.blocks), title):
            unit(name(block), functools.partial(rounding.round, block, None))
        processes.wait()
    once = processes.once(unit)
    squared = torch.zeros(2, dtype=torch.float64)
    for block in shown.iterate(anatomy.blocks, title, len(anatomy.blocks)):
        passage = None if rounding is None else rounding.passage(block)
        work = _nothing if rounding is None else functools.partial(rounding.round, block, passage)
        if not reads:
            done = unit(name(block), work)
        elif together:
            done = processes.together(unit, name(block), work)
        else:
            done = once(name(block), work)
        squared += done.get(SQUARED, 0)
        install_block(model, block, settings, statistics, done)
        if rounding is not None:
            rounding.advance(block, passage)
    return squared


def _nothing() -> dict[str, Tensor]:
    raise RuntimeError("a block that the first process rounded is not where all of them read it")


def check_kind(settings: Quantizer, checkpoint: Checkpoint) -> None:
    """Refuse a method that cannot do this kind of model.

    Raises:
        SettingsError: names methods that can.
    """
    # Of an audio language model it is the language model that is quantized.
    kind = "language" if checkpoint.reads_tokens else checkpoint.kind
    if kind in settings.kinds:
        return
    able = [
        i.name for i in registry.available("quantize") if kind in getattr(i.settings, "kinds", ())
    ]
    raise SettingsError(
        f"{registry.info_of(settings).name} quantizes {' and '.join(settings.kinds)} models, and this is a {kind} "
        f"model ({checkpoint.anatomy.family}). Methods for those: {', '.join(able)}."
    )


def check_calibrated(settings: Quantizer, path: str | os.PathLike[str]) -> None:
    """Refuse a method that learns from data and got none, before the model is loaded: that may take minutes.

    Args:
        settings: of the method.
        path: of the model, or ``zoo:NAME``. A denoiser samples inputs of its own.

    Raises:
        SettingsError: no data, and a model that needs some.
        CheckpointError: there is no such directory.
    """
    directory = resolve(path)
    if not settings.needs_calibration or is_denoiser(directory):
        return
    config = directory / "config.json"
    named = read_json(config).get("model_type") if config.is_file() else None
    kind = kind_of(named) if named in supported_model_types() else "language"
    raise SettingsError(_without_data(registry.info_of(settings).name, kind))


def _without_data(name: str, kind: Kind) -> str:
    return f"{name} learns from calibration {_DATA[kind]}: {_GIVE}"


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters only: the frequencies of a rotary embedding and key rotations are buffers, and stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
