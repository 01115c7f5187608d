"""Does what was written compute what it was made from? Asked of a process that knows nothing but the files.

A checkpoint can be saved without an error and load without an error and still be another model: a rotation that
the reader does not know of, a scale in another type, a zero point off by one. So a few tokens are run through the
model in memory, the files are read by a fresh interpreter, and the logits are compared. Both run in fp32 where the
model is in 16 bits, so that the difference is that of the files and not of the arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from postlude.errors import VerificationError
from postlude.surgery.anatomy import Anatomy, LanguageAnatomy
from postlude.surgery.batches import placed_on

__all__ = [
    "RELOAD",
    "Reload",
    "compare_outputs",
    "compare_reload",
    "fresh_logits",
    "in_float32",
    "probe_tokens",
]

# Largest accepted ||difference|| / ||logits - mean||. Files that hold the same model differ by the order of sums.
_TOLERANCE = 1e-3

# Defines `logits(tokens)`, int64 [batch, length] to float32 [batch, length, vocabulary], from sys.argv[2:].
RELOAD = """
import postlude, torch
from postlude.runs.loading import load
checkpoint = load(sys.argv[2], dtype=sys.argv[3], device=sys.argv[4])
def logits(tokens):
    tokens = torch.from_numpy(tokens).to(checkpoint.model.device)
    return checkpoint.model(input_ids=tokens, use_cache=False).logits.float().cpu().numpy()
"""

# The same of any model: keyword arguments of its forward to the first thing that it returns.
_RELOAD_OUTPUTS = """
import postlude, torch
from postlude.runs.loading import load
checkpoint = load(sys.argv[2], dtype=sys.argv[3], device=sys.argv[4])
def logits(**inputs):
    batch = {}
    for name, value in inputs.items():
        owner, _, key = name.rpartition(".")
        value = torch.from_numpy(value).to(checkpoint.model.device)
        value = value.to(checkpoint.model.dtype) if value.is_floating_point() else value
        (batch.setdefault(owner, {}) if owner else batch)[key] = value
    return checkpoint.model(**batch)[0].float().cpu().numpy()
"""

_CHILD = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "{threads}"
os.environ["HF_HUB_OFFLINE"] = "1"
from safetensors.numpy import load_file, save_file
{load}
def run():
    inputs = load_file(sys.argv[1] + "/inputs.safetensors")
    if "torch" in sys.modules:
        import torch
        torch.set_num_threads({threads})
        with torch.inference_mode():
            return logits(**inputs)
    return logits(**inputs)
import numpy
save_file({{"logits": numpy.ascontiguousarray(run(), dtype=numpy.float32)}}, sys.argv[1] + "/logits.safetensors")
"""


@dataclasses.dataclass(frozen=True)
class Reload:
    """How far the logits of the files are from those of the model in memory.

    Attributes:
        max_difference: of any logit.
        relative: ``||difference|| / ||logits - mean||``.
        tokens: how many positions (rows, of a model that reads no tokens) were compared.
    """

    max_difference: float
    relative: float
    tokens: int


def probe_tokens(vocabulary: int, context: int, seed: int = 0) -> Tensor:
    """Two sequences of random tokens, ``[2, up to 24]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (2, min(24, context)), generator=generator)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters of 16 bits in fp32 while the context lasts; going up and back again changes no bit."""
    narrow = [p for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    kept = [p.data for p in narrow]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, data in zip(narrow, kept, strict=True):
            parameter.data = data


def fresh_logits(load: str, arguments: Sequence[str], tokens: Tensor) -> Tensor:
    """Logits from a new interpreter.

    Args:
        load: Python source that defines ``logits(tokens)``, see :data:`RELOAD`.
        arguments: its ``sys.argv[2:]``.
        tokens: ``[batch, length]``.

    Returns:
        fp32 ``[batch, length, vocabulary]``.

    Raises:
        VerificationError: the process failed; the end of what it said is in the message.
    """
    return _fresh(load, arguments, {"tokens": tokens})


def _fresh(load: str, arguments: Sequence[str], inputs: Mapping[str, Tensor]) -> Tensor:
    with tempfile.TemporaryDirectory(prefix="postlude-check-") as work:
        stored = {name: tensor.cpu().contiguous() for name, tensor in inputs.items()}
        save_file(stored, Path(work) / "inputs.safetensors")
        script = _CHILD.format(load=load, threads=torch.get_num_threads())
        done = subprocess.run(
            [sys.executable, "-c", script, work, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-6:])
            raise VerificationError(
                f"what was written could not be read again by a fresh process, so it is not to be used:\n{said}"
            )
        return load_file(Path(work) / "logits.safetensors")["logits"]


def compare_reload(
    model: Any,
    anatomy: LanguageAnatomy,
    load: str,
    arguments: Sequence[str],
    *,
    tolerance: float = _TOLERANCE,
    what: str = "the checkpoint",
) -> Reload:
    """Compare the logits of a model with those of its files.

    Args:
        model: in memory; as it was afterwards.
        anatomy: of the model.
        load, arguments: see :func:`fresh_logits`.
        tolerance: largest relative difference that passes.
        what: the output, for the message.

    Raises:
        VerificationError: the files are another model.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = probe_tokens(vocabulary, anatomy.context)
    with in_float32(model), torch.inference_mode():
        here = model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu()
    there = fresh_logits(load, arguments, tokens)
    return _compared(here, there, tokens.numel(), tolerance, what)


def compare_outputs(
    model: Any, anatomy: Anatomy, arguments: Sequence[str], *, what: str = "the checkpoint"
) -> Reload:
    """Compare the output of a model that is no language model with that of its files, on random inputs.

    Args:
        model: in memory; as it was afterwards.
        anatomy: of the model.
        arguments: directory, dtype and device.
        what: the output, for the message.

    Raises:
        VerificationError: the files are another model.
    """
    batch = anatomy.example()
    flat: dict[str, Tensor] = {}
    for name, value in batch.items():
        parts = (
            {f"{name}.{key}": part for key, part in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        flat |= parts
    with in_float32(model), torch.inference_mode():
        placed = placed_on(batch, model)
        here = model(**placed)[0].float().cpu()
    there = _fresh(_RELOAD_OUTPUTS, arguments, flat)
    return _compared(here, there, len(here), _TOLERANCE, what)


def _compared(here: Tensor, there: Tensor, count: int, tolerance: float, what: str) -> Reload:
    if there.shape != here.shape:
        raise VerificationError(
            f"{what} gives an output of shape {tuple(there.shape)} when a fresh process reads it, expected "
            f"{tuple(here.shape)}: it is not to be used"
        )
    difference = there - here
    spread = (here - here.mean(-1, keepdim=True)).norm()
    relative = float(difference.norm() / spread.clamp(min=1e-30))
    if not relative <= tolerance:
        raise VerificationError(
            f"{what}, read by a fresh process, is another model: its outputs are {relative:.2g} away "
            f"(relative; at most {tolerance:.0e} is expected), the largest difference is "
            f"{float(difference.abs().max()):.3g}. It is not to be used; please report this with the command."
        )
    return Reload(float(difference.abs().max()), relative, count)
