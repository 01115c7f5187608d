"""Choose examples by attribution, or texts by what a model lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postlude._front_door.attributing import Examples, opened_index
from postlude._front_door.opening import Path_, open_checkpoint
from postlude.attribution.damage import Worst, worst
from postlude.attribution.engine import Attributor
from postlude.attribution.examples import Collection
from postlude.attribution.index import Index
from postlude.attribution.select import Selection, select
from postlude.runs.checkpoint import Checkpoint
from postlude.runs.progress import Progress

__all__ = ["attribution_damage", "attribution_select"]


def attribution_select(
    index: Path_ | Index,
    source: Examples,
    out: Path_,
    *,
    top: int,
    drop: bool = False,
    method: str | Attributor | None = None,
    changes: Mapping[str, Any] | None = None,
    checkpoint: Path_ | Checkpoint | None = None,
    reference: Path_ | Checkpoint | None = None,
    keep: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """Write the training examples that queries point at most, or with ``drop`` all but those.

    Args:
        index: opened, or a path.
        source: queries, as for :func:`attribution_query`.
        out: a ``.jsonl`` file.
        top: how many are chosen.
        drop: write the others.
        reference: ask about the divergence of the queries from this model rather than about their loss: which examples
            would bring a compressed model back to the one it was made from.
        method, changes, checkpoint, keep: as for :func:`attribution_query`.
        overwrite: replace the file.
        progress: where to show it.

    Raises:
        SettingsError, DataError, StoreError, OutputExistsError: see :func:`postlude.attribution.select.select`.
    """
    opened, settings, model = opened_index(index, method, changes, checkpoint)
    return select(
        opened,
        source,
        out,
        top=top,
        drop=drop,
        method=settings,
        checkpoint=model,
        reference=None if reference is None else open_checkpoint(reference),
        keep=keep,
        overwrite=overwrite,
        progress=progress,
    )


def attribution_damage(
    checkpoint: Path_ | Checkpoint,
    source: Examples,
    out: Path_,
    *,
    reference: Path_ | Checkpoint,
    top: int,
    by: str = "kl",
    collection: Collection | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Worst:
    """Write the texts that a model lost most against the one it was made from.

    Args:
        checkpoint: a quantized, pruned or tuned language model, loaded or a path.
        source: a ``.jsonl`` file with ``text``, or ``prompt`` and ``completion``, a line; or such records; or texts.
        out: a ``.jsonl`` file.
        reference: the model it was made from.
        top: how many are chosen.
        by: ``kl`` (divergence of the predictions), ``gap`` (added loss) or ``loss`` (of the model alone), in nats a
            token.
        collection: length, and which tokens are predicted.
        overwrite: replace the file.
        progress: where to show it.

    Raises:
        SettingsError, DataError, OutputExistsError, UnknownNameError: see :func:`postlude.attribution.damage.worst`.
    """
    return worst(
        open_checkpoint(checkpoint),
        open_checkpoint(reference),
        source,
        out,
        top=top,
        by=by,
        collection=collection,
        overwrite=overwrite,
        progress=progress,
    )
