"""Leave for another engine."""

from __future__ import annotations

from typing import Any

from postlude import registry
from postlude._front_door.opening import Path_, open_checkpoint
from postlude.errors import SettingsError
from postlude.exporting.engine import Exporter
from postlude.exporting.engine import export as _export
from postlude.runs.checkpoint import Checkpoint

__all__ = ["export"]


def export(
    checkpoint: Path_ | Checkpoint,
    to: str | Exporter,
    out: Path_,
    *,
    overwrite: bool = False,
    check: bool = True,
) -> dict[str, Any]:
    """Write a checkpoint in another engine's format, and read it again before saying so.

    Args:
        checkpoint: loaded, or a path; float or quantized.
        to: a settings object such as ``GGUF()``, or a name for its defaults.
        out: a directory, or a file where the format is one.
        overwrite: replace an output that is already there.
        check: compare logits with those that a fresh process computes from the output.

    Returns:
        See :func:`postlude.exporting.engine.export`.

    Raises:
        SettingsError: the format cannot hold this checkpoint; says why, and what to do instead.
        OutputExistsError: ``out`` exists.
        VerificationError: the output is another model; nothing is left of it.
    """
    settings = registry.find("export", to).settings() if isinstance(to, str) else to
    if not isinstance(settings, Exporter):
        raise SettingsError(
            f"export takes the name or the settings of a format, got {type(to).__name__}"
        )
    return _export(open_checkpoint(checkpoint), settings, out, overwrite=overwrite, check=check)
