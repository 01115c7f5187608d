"""The weight files of a checkpoint: which they are, whether they are whole, whether they are finite.

Everything here reads the files and builds no model, so that a broken checkpoint is refused with the
name of what is broken before any library has spent minutes on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from postlude.errors import CheckpointError, NonFiniteError
from postlude.runs.checksums import listed_sums, refuse_damaged

__all__ = ["check_depth", "check_weights", "read_header", "read_json", "weight_files"]

STEM = "model"
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_ENDINGS = (".gguf", ".h5", ".msgpack", ".onnx")
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Names of a number of layers in the configurations of transformers and diffusers.
_DEPTHS = {
    "num_hidden_layers",
    "num_layers",
    "num_single_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
}
# A safetensors header beyond this is refused by the format's own library as well.
_LARGEST_HEADER = 100_000_000
_BYTES_AT_ONCE = 1 << 24


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


def check_weights(files: list[Path]) -> None:
    """Read every file once: compare it with its checksum, and refuse tensors that hold NaN or infinity.

    Codes and other integers are read for the checksum alone, so not where there is none. Memory is one piece of a
    tensor.

    Raises:
        CheckpointError: a file is not what was written. Nothing else is said before every file was compared.
        NonFiniteError: names the first such tensor, its file, and how many of its entries are not finite.
    """
    expected = listed_sums(files)
    broken: NonFiniteError | None = None
    for file in files:
        digest = hashlib.sha256() if file in expected else None
        found = _not_finite_in(file, digest)
        if digest is not None:
            refuse_damaged(file, expected[file], digest.hexdigest())
        broken = broken or found
        if broken is not None and not expected:
            break
    for file in files:
        _check_format(file)
    if broken is not None:
        raise broken


def check_depth(file: Path, config: Mapping[str, Any], files: list[Path]) -> None:
    """Refuse a configuration that asks for more layers than there are tensors, before so many are made.

    Args:
        file: where the configuration stands, for messages.
        config: what is in it.
        files: the weights.

    Raises:
        CheckpointError: names the number of layers.
    """
    tensors = sum(len(read_header(one)) for one in files)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _DEPTHS & set(part):
            if isinstance(part[key], int) and part[key] > tensors:
                raise CheckpointError(
                    f"{file} asks for {part[key]:,} layers ({key}), and the weights beside it are {tensors} tensors: "
                    "one of them is of another model. Copy or download them again."
                )


def _not_finite_in(file: Path, digest: hashlib._Hash | None) -> NonFiniteError | None:
    """What to raise for the first tensor of a file that is not finite; all bytes go into the digest."""
    header = read_header(file)
    places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    found: NonFiniteError | None = None
    buffer = memoryview(bytearray(_BYTES_AT_ONCE))
    with open(file, "rb") as stream:
        before = stream.read(file.stat().st_size - max((end for _, end, _ in places), default=0))
        if digest is not None:
            digest.update(before)
        for start, end, name in places:
            dtype = None if found else _FLOATS.get(header[name]["dtype"])
            if digest is None and dtype is None:
                stream.seek(end - start, os.SEEK_CUR)
                continue
            bad = 0
            for first in range(start, end, _BYTES_AT_ONCE):
                part = buffer[: min(_BYTES_AT_ONCE, end - first)]
                if stream.readinto(part) != len(part):
                    raise CheckpointError(f"{file} became shorter while it was read.")
                if digest is not None:
                    digest.update(part)
                if dtype is not None:
                    bad += _not_finite(torch.frombuffer(part, dtype=dtype))
            if bad:
                found = NonFiniteError(
                    f"Tensor {name!r} in {file} holds {bad} NaN or infinite values of "
                    f"{math.prod(header[name]['shape'])}. Expected finite weights: the training or the conversion "
                    "that wrote this checkpoint failed. Use an earlier checkpoint or convert it again."
                )
    return found


def _check_format(file: Path) -> None:
    """Refuse a header that the library of the format does not take."""
    try:
        with safe_open(file, framework="pt"):
            pass
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


def _not_finite(part: Tensor) -> int:
    """How many entries are NaN or infinite."""
    if part.element_size() == 1:
        part = part.float()  # the 8-bit formats have no ordering of their own
    # One pass without a mask the size of the part: NaN and infinity both reach an extreme.
    low, high = torch.aminmax(part)
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return 0
    return int((~torch.isfinite(part)).sum())
