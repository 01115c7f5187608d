"""The state of a run as tensors and plain values, so that it can be kept without pickles; random generators."""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postlude.errors import CheckpointError
from postlude.runs.checksums import SUMS, check_sums

__all__ = [
    "STEP",
    "TRAINER",
    "flatten",
    "last_state",
    "plain_schedule",
    "random_states",
    "restore",
    "seeded",
    "set_random_states",
]

TRAINER = "trainer_state.json"
STEP = re.compile(r"step-(\d+)")

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Give every random generator this seed, and its old state back at the end."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def last_state(directory: Path) -> Path | None:
    """The newest undamaged state in the directory of a run, None where there is none."""
    found = [
        (int(match[1]), path)
        for path in directory.glob("step-*")
        if (match := STEP.fullmatch(path.name)) and (path / TRAINER).is_file()
    ]
    for _, path in sorted(found, reverse=True):
        try:
            check_sums([file for file in path.iterdir() if file.name != SUMS])
        except CheckpointError as error:
            _log.warning("%s It is not gone on from.", error)
            continue
        return path
    return None


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, with its tensors taken out into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        items = [[key, flatten(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        return {"$items": items}
    if isinstance(value, list | tuple):
        return [flatten(item, f"{name}.{at}", tensors) for at, item in enumerate(value)]
    return value


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse; a tuple comes back as a list."""
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        return {key: restore(item, tensors) for key, item in value["$items"]}
    if isinstance(value, list):
        return [restore(item, tensors) for item in value]
    return value


def plain_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's state without the functions that made it."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | {
        "lr_lambdas": [None] * len(state.get("lr_lambdas", ()))
    }


def random_states() -> dict[str, Any]:
    """Of Python, numpy, PyTorch and its accelerator."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_states(state: dict[str, Any]) -> None:
    """Set what :func:`random_states` gave."""
    python, numbers = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numbers["keys"].numpy().astype(np.uint32)
    np.random.set_state((numbers["kind"], keys, *numbers["rest"]))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
