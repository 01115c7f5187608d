"""Where numbers were made: versions, processor, threads, date."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import postlude

__all__ = ["environment"]

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_OPTIONAL = ("diffusers", "peft", "trl", "onnxruntime")


def environment() -> dict[str, str]:
    """What to know of this machine when numbers differ on another one, by name."""
    import torch

    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "postlude": postlude.__version__,
        "python": platform.python_version(),
    }
    found |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    for name in _OPTIONAL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found["processor"] = _processor()
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()}"
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
