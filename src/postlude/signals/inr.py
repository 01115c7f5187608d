"""A network as a file: ``NAME.inr`` is a directory with ``config.json`` and packed codes in ``weights.safetensors``.

What is stored is the network's state in the order of its names. A matrix has a number of bits: 2 to 8 are codes of a
symmetric integer grid, a scale in fp16 for every row; 16 is fp16, 32 is fp32. Everything else (biases, amplitudes) is
fp32. Codes, scales and floats of all matrices lie one after another in four tensors, since a name and a shape of each
would take as many bytes as the weights of a small network.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from postlude.errors import CheckpointError
from postlude.numerics.formats import Integer
from postlude.numerics.packing import pack, packed_width, unpack
from postlude.numerics.schemes import Encoded, Scheme
from postlude.runs.atomic import atomic_directory
from postlude.runs.weights import read_header, read_json
from postlude.zoo.smn.networks import build, settings_for
from postlude.zoo.smn.settings import NetworkSettings

__all__ = [
    "CONFIG",
    "FLOATS",
    "WIDTHS",
    "Codes",
    "Stored",
    "matrices",
    "open_inr",
    "rows_of",
    "scheme_of",
    "store",
]

FORMAT, VERSION = "postlude-inr", 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
FLOATS = {16: torch.float16, 32: torch.float32}
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16, 32)

Codes = dict[str, Encoded]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A network as it is in the file.

    Attributes:
        config: the content of ``config.json``.
        tensors: of ``weights.safetensors``.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture that was fitted."""
        return self.config["picture"][0], self.config["picture"][1]

    @property
    def settings(self) -> NetworkSettings:
        values = dict(self.config["network"])
        return settings_for(values.pop("name"), values)

    @property
    def files(self) -> dict[str, bytes]:
        """Names and bytes of the files."""
        config = json.dumps(self.config, separators=(",", ":"), ensure_ascii=False)
        return {CONFIG: config.encode(), WEIGHTS: safetensors.torch.save(self.tensors)}

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(map(len, self.files.values()))

    def network(self) -> nn.Module:
        """The network, with the values that the codes stand for; CPU, fp32."""
        network = build(self.settings, 0)
        network.load_state_dict(dict(_decoded(network, self)))
        return network.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the directory, whole or not at all.

        Raises:
            OutputExistsError: it is there already and may not be replaced.
        """
        with atomic_directory(path, overwrite, marker=CONFIG) as folder:
            for name, content in self.files.items():
                (folder / name).write_bytes(content)


def open_inr(path: str | os.PathLike[str]) -> Stored:
    """Read an ``.inr`` directory.

    Raises:
        CheckpointError: it is none, is of a later version, or is damaged; says what was found.
    """
    folder = Path(path)
    advice = "`postlude fit PICTURE -o NAME.inr` makes one."
    if not (folder / CONFIG).is_file():
        found = (
            "a file"
            if folder.is_file()
            else f"without a {CONFIG}"
            if folder.is_dir()
            else "not there"
        )
        raise CheckpointError(f"{folder} is {found}; expected an .inr directory. {advice}")
    config = read_json(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is not an .inr: the format in its {CONFIG} is {config.get('format')!r}, expected {FORMAT!r}. "
            f"{advice}"
        )
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} is an .inr of version {config.get('version')!r}, and this Postlude reads {VERSION}: "
            "use a newer one."
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}: copy or fit it again.")
    read_header(folder / WEIGHTS)
    stored = Stored(config, safetensors.torch.load_file(folder / WEIGHTS))
    try:
        _check(stored)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is damaged ({error}): copy or fit it again.") from error
    return stored


def _check(stored: Stored) -> None:
    width, height = stored.size
    if min(width, height) < 1:
        raise CheckpointError(
            f"the picture of this .inr has {width} x {height} pixels; expected 1 or more."
        )
    for _ in _decoded(build(stored.settings, 0), stored):
        pass


def store(
    network: nn.Module,
    size: tuple[int, int],
    bits: Mapping[str, int],
    codes: Codes,
    made_by: Mapping[str, Any] | None = None,
) -> Stored:
    """Put a network into its file.

    Args:
        network: one of ``NETWORKS``.
        size: width and height of the picture it was fitted to.
        bits: of every matrix.
        codes: of every matrix that is not in floating point.
        made_by: kept in ``config.json``.
    """
    settings: NetworkSettings = network.settings  # type: ignore[assignment]
    config = {
        "format": FORMAT,
        "version": VERSION,
        "network": {"name": settings.name, **dataclasses.asdict(settings)},
        "picture": list(size),
        "bits": list(bits.values()),
        **({"made_by": dict(made_by)} if made_by else {}),
    }
    # As it will be read, lists for tuples.
    return Stored(json.loads(json.dumps(config)), _packed(network, bits, codes))


def matrices(network: nn.Module) -> list[str]:
    """Names of the weights that have bits, the first layer's first."""
    return [name for name, value in network.state_dict().items() if name.endswith(".weight")]


def scheme_of(bits: int) -> Scheme:
    """The grid of so many bits: symmetric, a scale for every row."""
    return Scheme(Integer(bits))


def rows_of(weight: Tensor) -> Tensor:
    """A weight as ``[rows, in_features]``; a complex one has its two parts below each other."""
    return weight.detach().reshape(-1, weight.shape[-1])


def _packed(network: nn.Module, bits: Mapping[str, int], codes: Codes) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"codes": [], "scales": [], "half": [], "single": []}
    for name, value in network.state_dict().items():
        flat = value.detach().cpu().float().flatten()
        if name in codes:
            encoded = codes[name]
            parts["codes"].append(pack(encoded.codes.cpu(), bits[name]).flatten())
            parts["scales"].append(encoded.scale.cpu().flatten())
        elif bits.get(name) == 16:
            parts["half"].append(flat.half())
        else:
            parts["single"].append(flat)
    return {name: torch.cat(values) for name, values in parts.items() if values}


def _decoded(network: nn.Module, stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a network's state, read in order.

    Raises:
        CheckpointError: there is less, or more, than the configuration says.
    """
    queue = {name: _Reader(name, value) for name, value in stored.tensors.items()}
    empty = functools.partial(_Reader, value=torch.empty(0))
    bits = dict(zip(matrices(network), stored.config["bits"], strict=True))
    for name, value in network.state_dict().items():
        count = bits.get(name, 32)
        if count not in WIDTHS:
            raise CheckpointError(f"{name} has {count!r} bits; expected one of {WIDTHS}.")
        if count in FLOATS:
            kind = "half" if count == 16 else "single"
            found = queue.get(kind, empty(kind)).take(value.numel()).float()
        else:
            rows, width = rows_of(value).shape
            bytes_ = queue.get("codes", empty("codes")).take(rows * packed_width(width, count))
            scale = queue.get("scales", empty("scales")).take(rows).reshape(rows, 1)
            codes = unpack(bytes_.reshape(rows, -1), count, width)
            found = Encoded(codes, scale, None, scheme_of(count)).decode()
        yield name, found.reshape(value.shape)
    for reader in queue.values():
        reader.finish()


class _Reader:
    """Takes a tensor from its front."""

    def __init__(self, name: str, value: Tensor) -> None:
        self._name, self._value, self._place = name, value, 0

    def take(self, count: int) -> Tensor:
        part = self._value[self._place : self._place + count]
        if len(part) < count:
            raise CheckpointError(
                f"{WEIGHTS} holds {len(self._value)} {self._name}, fewer than {CONFIG} asks for: the .inr is damaged."
            )
        self._place += count
        return part

    def finish(self) -> None:
        if self._place < len(self._value):
            raise CheckpointError(
                f"{WEIGHTS} holds {len(self._value)} {self._name}, more than the {self._place} that {CONFIG} asks for: "
                "the .inr is damaged."
            )
