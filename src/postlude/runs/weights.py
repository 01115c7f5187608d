"""The weight files of a checkpoint: which they are, whether they are whole, whether they are finite.

Everything here reads the files and builds no model, so that a broken checkpoint is refused with the
name of what is broken before any library has spent minutes on it. One tensor is in memory at a
time, and of a large one a slice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from postlude.errors import CheckpointError, NonFiniteError

__all__ = [
    "SUMS",
    "check_finite",
    "check_sums",
    "hash_file",
    "read_header",
    "read_json",
    "weight_files",
    "write_sums",
]

STEM = "model"
SUMS = "SHA256SUMS"
"""Beside the weights that Postlude writes: their checksums, as ``sha256sum -c`` reads them."""

_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_ENDINGS = (".gguf", ".h5", ".msgpack", ".onnx")
_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
# A safetensors header beyond this is refused by the format's own library as well.
_LARGEST_HEADER = 100_000_000
_ELEMENTS_AT_ONCE = 1 << 24


def weight_files(path: str | os.PathLike[str], stem: str = STEM) -> list[Path]:
    """The safetensors files of a checkpoint directory, each one whole, in the order of their names.

    Args:
        path: the directory.
        stem: what the library that wrote them calls weights: ``model`` for transformers.

    Raises:
        CheckpointError: there are none, some are missing, one is truncated or no safetensors file,
            or the weights exist only in a format that can run code when it is loaded.
    """
    directory = Path(path)
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = _shards(directory, index)
    else:
        raise CheckpointError(_no_weights(directory, stem))
    for file in files:
        read_header(file)
    return files


def read_header(file: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: name to dtype, shape and offsets.

    Every tensor is checked to have a known type, as many bytes as its shape asks for, and a place of its own in the
    file, so that nothing is allocated because a header says so.

    Raises:
        CheckpointError: the file is not safetensors, or is shorter or longer than its header says.
    """
    path = Path(file)
    found = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > _LARGEST_HEADER:
            raise CheckpointError(
                f"{path} is not a safetensors file: it has {found} bytes and no readable header. "
                "Copy or download it again."
            )
        raw = stream.read(length)
    if len(raw) < length:
        raise CheckpointError(_truncated(path, 8 + length, found, "for its header alone"))
    try:
        header: dict[str, dict[str, Any]] = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = sorted(_place(name, entry) for name, entry in tensors.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header does not parse ({error}). "
            "Copy or download it again."
        ) from error
    expected = 8 + length + max((end for _, end, _ in places), default=0)
    if found < expected:
        raise CheckpointError(_truncated(path, expected, found, "by its header"))
    if found > expected:
        raise CheckpointError(
            f"{path} is damaged: expected {expected} bytes by its header, found {found}. "
            "Copy or download it again."
        )
    reached = 0
    for start_of, end, name in places:
        if start_of != reached:
            what = "overlaps another tensor" if start_of < reached else "leaves a gap before it"
            raise CheckpointError(
                f"{path} is damaged: by its header, {name!r} {what}. Copy or download it again."
            )
        reached = end
    return tensors


def _place(name: str, entry: dict[str, Any]) -> tuple[int, int, str]:
    """First byte, byte after the last, and name of a tensor; a ValueError where these cannot be."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = [start, end, *shape]
    if any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in whole):
        raise ValueError(f"{name!r} has the shape {shape} at {start} to {end}")
    if dtype not in _BITS:
        raise ValueError(f"{name!r} is of the unknown type {dtype!r}")
    if 8 * (end - start) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name!r}, {dtype} {shape}, has {end - start} bytes")
    return start, end, name


def hash_file(file: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(directory: Path, pattern: str = "*.safetensors") -> None:
    """Write the checksums of the weights of a directory, or of other files in it, beside them."""
    files = sorted(directory.glob(pattern))
    lines = [f"{hash_file(file)}  {file.name}\n" for file in files]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(files: list[Path]) -> None:
    """Compare weights with the checksums beside them; files without one are taken as they are.

    Time is one read of the files.

    Raises:
        CheckpointError: a file is not what was written.
    """
    listed: dict[Path, str] = {}
    for folder in {file.parent for file in files}:
        try:
            text = (folder / SUMS).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            continue
        found = filter(None, map(_SUM.fullmatch, text.splitlines()))
        listed |= {folder / match[2]: match[1] for match in found}
    for file in files:
        expected = listed.get(file)
        actual = expected and hash_file(file)
        if expected != actual:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is {str(actual)[:12]}..., {SUMS} beside it says {str(expected)[:12]}"
                f"... Copy or download it again. If it was changed on purpose, remove {SUMS}."
            )


def check_finite(files: list[Path]) -> None:
    """Read every floating-point tensor once and refuse the first that holds NaN or infinity.

    Codes and other integers are not read. Time is one read of the files; memory is one slice of
    16 M elements.

    Raises:
        NonFiniteError: names the tensor, the file, and how many of its entries are not finite.
    """
    for file in files:
        floats = [n for n, entry in read_header(file).items() if entry["dtype"] in _FLOAT_DTYPES]
        with _opened(file) as store:
            for name in floats:
                if all(_is_finite(part) for part in _slices(store, name)):
                    continue
                bad = total = 0
                for part in _slices(store, name):
                    bad += int((~torch.isfinite(part)).sum())
                    total += part.numel()
                raise NonFiniteError(
                    f"Tensor {name!r} in {file} holds {bad} NaN or infinite values of {total}. "
                    "Expected finite weights: the training or the conversion that wrote this "
                    "checkpoint failed. Use an earlier checkpoint or convert it again."
                )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a safetensors file: {error}. Copy or download it again."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it does not parse, or is not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file} holds a JSON {type(content).__name__}; expected an object with the settings."
        )
    return content


def _shards(directory: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map: expected an object from tensor names to files."
        )
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{index} names the file {name!r}, which is not inside the checkpoint directory. "
                "Refused: shards are plain file names."
            )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the {len(names)} weight files its index names: "
            f"{_listing(missing)}. Copy or download them."
        )
    files = [directory / name for name in names]
    held = {(tensor, file.name) for file in files for tensor in read_header(file)}
    absent = sorted(t for t, name in weight_map.items() if (t, str(name)) not in held)
    if absent:
        raise CheckpointError(
            f"{index} names {len(absent)} tensors that their files do not hold: "
            f"{_listing(absent)}. The index and the shards are not of the same checkpoint."
        )
    return files


def _no_weights(directory: Path, stem: str) -> str:
    names = sorted(os.listdir(directory))
    pickled = [n for n in names if n.endswith(_PICKLE_ENDINGS) and n != "training_args.bin"]
    expected = f"expected {stem}.safetensors, or {stem}.safetensors.index.json with its shards"
    if pickled and stem != STEM:
        return (
            f"{directory} holds its weights only as pickle files ({_listing(pickled)}); {expected}. "
            "Loading a pickle can run any code, so Postlude refuses it. If you trust where it comes from, load it "
            "with diffusers and use_safetensors=False once, and save it again."
        )
    if pickled:
        return (
            f"{directory} holds its weights only as pickle files ({_listing(pickled)}); {expected}. "
            "Loading a pickle can run any code, so Postlude refuses it. If you trust where it "
            "comes from, convert it once:\n"
            '  python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(directory)!r}, use_safetensors=False, dtype='auto')"
            f'.save_pretrained({str(directory) + "-safetensors"!r})"\n'
            "and copy the tokenizer files beside the result."
        )
    other = [n for n in names if n.endswith(_OTHER_ENDINGS)]
    if "adapter_config.json" in names:
        return (
            f"{directory} holds an adapter, not a whole model; {expected}. Merge it into its base "
            "model first (merge_and_unload of the peft library) and save the result."
        )
    if other:
        return f"{directory} holds weights as {_listing(other)}; {expected}."
    stray = [n for n in names if n.endswith(".safetensors")]
    if stray:
        return f"{directory} holds {_listing(stray)}, but {expected}."
    return f"{directory} holds no weights; {expected}."


def _truncated(path: Path, expected: int, found: int, source: str) -> str:
    return (
        f"{path} is truncated: expected {expected} bytes {source}, found {found}. "
        "Copy or download it again."
    )


def _listing(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _slices(store: Any, name: str) -> Iterator[Tensor]:
    view = store.get_slice(name)
    shape = view.get_shape()
    if math.prod(shape) <= _ELEMENTS_AT_ONCE or not shape:
        yield store.get_tensor(name)
        return
    rows = max(1, _ELEMENTS_AT_ONCE // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield view[start : start + rows]


def _is_finite(part: Tensor) -> bool:
    if part.numel() == 0:
        return True
    if part.element_size() == 1:
        part = part.float()  # the 8-bit formats have no ordering of their own
    # One pass without a mask the size of the tensor: NaN and infinity both reach an extreme.
    low, high = torch.aminmax(part)
    return math.isfinite(low.item()) and math.isfinite(high.item())
