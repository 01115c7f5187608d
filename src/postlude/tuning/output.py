"""What a tuning run leaves behind: the model in its stored form, checked, with its log and report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from postlude.runs.atomic import atomic_directory
from postlude.runs.documents import encode
from postlude.runs.loading import load
from postlude.tuning import adapters
from postlude.tuning.merging import Probe, logits, probes, same_logits
from postlude.tuning.merging import merge as merge_adapter
from postlude.tuning.recordings import recorded_probes
from postlude.tuning.reference import cast

if TYPE_CHECKING:
    from postlude.tuning.objective import Job
    from postlude.tuning.run import Tuned

__all__ = ["MARKER", "Report", "finished", "keep_model", "plain", "save"]

MARKER = "tune.json"
_LINES, _LETTERS = 4, 2000

Report = Callable[[Path, Mapping[str, Any], Sequence[Mapping[str, Any]]], None]


def finished(job: Job, merge: bool, stored: torch.dtype) -> tuple[Any, float | None]:
    """The trained model as it is to be stored, and how far merging moved its logits."""
    model, differs = job.model, None
    if merge:
        model, differs = merge_adapter(model, _sequences(job))
    if merge or not job.adapters:
        model = cast(model, stored)
    return model.eval(), differs


def _sequences(job: Job) -> list[Probe]:
    """What to compare models on: the data, read as plain text, and as recordings where the model hears some."""
    if job.checkpoint.tokenizer is None:
        return []
    heard = recorded_probes(job.checkpoint, job.data, _LINES)
    if heard:
        return list(heard)
    source = sorted(job.data.glob("*"))[0] if job.data.is_dir() else job.data
    with open(source, encoding="utf-8", errors="replace") as file:
        texts = [file.readline(_LETTERS) for _ in range(_LINES)]
    ids = [encode(job.checkpoint.tokenizer, text)[: job.checkpoint.context] for text in texts]
    return [torch.tensor(one) for one in ids if one]


def save(
    tuned: Tuned,
    job: Job,
    manifest: Mapping[str, Any],
    final: Path,
    overwrite: bool,
    report: Report | None,
) -> None:
    """Write the output, load it again and compare, and only then give it its name.

    Args:
        tuned: the run; the result of the comparison is added to its result.
        job: what the objective was given.
        manifest: everything that decided the result.
        final: the directory.
        overwrite: replace one that is there.
        report: writes a report of result and log into a directory.

    Raises:
        VerificationError: what was written is another model; the directory does not appear.
    """
    model = tuned.checkpoint.model
    alone = hasattr(model, "peft_config")
    with atomic_directory(final, overwrite, marker=MARKER) as directory:
        if alone:
            adapters.save_adapter(model, job.checkpoint.tokenizer, directory)
        else:
            tuned.checkpoint.write(directory)
        tuned.result["reload_difference"] = _read_again(job, model, directory, alone)
        text = "".join(json.dumps(plain(row)) + "\n" for row in tuned.log)
        (directory / "steps.jsonl").write_text(text, encoding="utf-8")
        about = plain({"result": tuned.result, "manifest": manifest})
        (directory / MARKER).write_text(
            json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if report is not None:
            report(directory, tuned.result, tuned.log)


def _read_again(job: Job, model: Any, directory: Path, alone: bool) -> float:
    """How far the logits of the files are from those in memory.

    Raises:
        VerificationError: they are another model.
    """
    if alone:
        dtype = str(model.get_base_model().dtype).removeprefix("torch.")
        loaded = adapters.load_adapter(directory, dtype, model.device, merged=False)
    else:
        loaded = load(directory, device=model.device)
    tried = probes(_sequences(job), model)
    expected = logits(model, tried)
    found = logits(loaded.model, tried)
    # The same weights in the same types, so the same sums; adapters may have been stored in another type.
    return same_logits(found, expected, 1e-5, "What was saved, loaded again, is another model")


def keep_model(job: Job, place: Path) -> Path:
    """Save the model as it was before a step that failed, where it can be looked at."""
    with atomic_directory(place, overwrite=True) as directory:
        if job.adapters:
            adapters.save_adapter(job.model, job.checkpoint.tokenizer, directory)
        else:
            job.checkpoint.write(directory)
    return place


def plain(value: Any) -> Any:
    """As JSON has it: no infinity, no paths."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
