"""Look inside checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from postlude import registry
from postlude._front_door.opening import Path_, open_checkpoint
from postlude._front_door.text import Text, built_in_text, calibration_tokens
from postlude.inspection.comparison import Comparison
from postlude.inspection.signature import compare as _compare
from postlude.inspection.update import Update
from postlude.runs.atomic import atomic_write
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress
from postlude.surgery.kernels import AUTO, assignments

__all__ = ["compare", "inspect", "kernels"]

# Sequence length where the caller does not say; a model with a shorter context gets its context.
_INSPECT_LENGTH, _INSPECT_SAMPLES = 256, 32


def inspect(
    checkpoint: Path_ | Checkpoint,
    methods: Sequence[str | object] | None = None,
    *,
    text: Text | None = None,
    samples: int = _INSPECT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look inside a checkpoint.

    Args:
        checkpoint: loaded, or a path.
        methods: names or settings objects; every inspection when None.
        text: what to run through the model; the help texts of Python otherwise.
        samples, length: sequences and tokens of each (256, or the context if shorter).
        seed: of every random choice.
        progress: where to show it.

    Returns:
        One report per method, by name.
    """
    chosen: list[Any] = [
        registry.find("inspect", one).settings() if isinstance(one, str) else one
        for one in (
            [info.name for info in registry.available("inspect")] if methods is None else methods
        )
    ]
    opened = open_checkpoint(checkpoint)
    tokens = _inspection_tokens(opened, text, samples, length, seed)
    return {
        registry.info_of(settings).name: settings.inspect(opened, tokens, seed, progress)
        for settings in chosen
    }


def _inspection_tokens(
    checkpoint: Checkpoint, text: Text | None, samples: int, length: int | None, seed: int
) -> Tensor:
    chosen = min(_INSPECT_LENGTH, checkpoint.context) if length is None else length
    return calibration_tokens(
        checkpoint, built_in_text() if text is None else text, samples, chosen, seed
    )


def compare(
    checkpoints: Sequence[Path_ | Checkpoint],
    *,
    text: Text | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    html: Path_ | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Tell how checkpoints are related, and what was changed from the first to each of the others.

    Args:
        checkpoints: two or more, loaded or paths; the first is the base of the updates.
        text: what to run through the models for their signatures (arXiv:2502.07004); the help texts of Python
            otherwise.
        layers: blocks whose singular values are computed, the costly part of an update; all when None.
        seed: of the choice of text.
        html: file to write a page with plots to.
        command: that makes the page again, to be printed on it.
        progress: where to show it.

    Raises:
        SettingsError: fewer than two checkpoints, models of different hidden size, or blocks that there are not.
    """
    opened = [open_checkpoint(one) for one in checkpoints]
    tokens = [_inspection_tokens(one, text, _INSPECT_SAMPLES, None, seed) for one in opened]
    signatures = _compare(opened, tokens, seed)
    names = list(signatures.reports)
    update = Update(layers=None if layers is None else tuple(layers))
    result = Comparison(
        signatures,
        tuple(
            update.compare(opened[0], other, (names[0], name), progress)
            for name, other in zip(names[1:], opened[1:], strict=True)
        ),
    )
    if html is not None:
        from postlude.report.comparison import render

        Path(html).resolve().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as temporary:
            temporary.write_text(render(result.to_dict(), command), encoding="utf-8")
    return result


def kernels(checkpoint: Path_ | Checkpoint, kernel: str = AUTO) -> dict[str, Any]:
    """Tell which kernel computes each quantized layer when it runs packed, and why others do not.

    Args:
        checkpoint: loaded, or a path.
        kernel: ``"auto"``, or the one kernel to ask for.

    Returns:
        ``dtype`` of the activations, ``device``, how many layers are ``simulated`` because no kernel takes
        them, and ``layers``: one :class:`postlude.surgery.kernels.Assignment` each.

    Raises:
        UnknownNameError: no kernel of that name.
    """
    model = open_checkpoint(checkpoint).model
    layers = assignments(model, kernel)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "simulated": sum(one.simulated for one in layers),
        "layers": layers,
    }
