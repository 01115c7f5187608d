"""A network as a file: ``NAME.inr`` is a directory with ``config.json`` and packed codes in ``weights.safetensors``.

What is stored is the network's state in the order of its names. A matrix has a number of bits: 2 to 8 are codes of a
symmetric integer grid, a scale in fp16 for every row; 16 is fp16, 32 is fp32. Everything else (biases, amplitudes) is
fp32. Codes, scales and floats of all matrices lie one after another in four tensors, since a name and a shape of each
would take as many bytes as the weights of a small network.

``bits`` chooses: a whole number gives every matrix that many and leaves the first in fp32, whose entries are
frequencies that a coarse grid would detune; a fraction, or ``mixed``, is a budget of bits a weight, scales included,
that an exact integer programme spends where it hurts the picture least (:mod:`postlude.numerics.budget`). ``rounding``
is ``nearest`` or ``learned`` (AdaRound on the loss of the picture, :mod:`postlude.numerics.learned_rounding`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from postlude.errors import CheckpointError, SettingsError, UnknownNameError
from postlude.numerics.budget import allocate
from postlude.numerics.formats import Encoded, Integer, Scheme
from postlude.numerics.learned_rounding import Rounding, annealed_power
from postlude.numerics.packing import pack, packed_width, unpack
from postlude.numerics.rounding import nearest
from postlude.runs.atomic import atomic_directory
from postlude.runs.progress import Progress
from postlude.runs.weights import read_header, read_json
from postlude.signals.picture import Picture
from postlude.signals.training import Training, Unit, optimise
from postlude.zoo.smn.grid import points
from postlude.zoo.smn.networks import build, settings_for
from postlude.zoo.smn.settings import NetworkSettings

__all__ = ["Coding", "Stored", "encode", "open_inr"]

FORMAT, VERSION = "postlude-inr", 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
FLOATS = {16: torch.float16, 32: torch.float32}
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
# Pixels that sensitivities are measured on; more do not change which matrix is the more important one.
_PIXELS = 16_384
# Pixels of a step of learned rounding.
_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Coding:
    """How the weights of a fitted network are stored.

    Attributes:
        bits: of a weight: a whole number for every matrix but the first, or a mean to be spent.
        mixed: spend also a whole number as a mean.
        rounding: ``nearest`` or ``learned``.
        steps: of learned rounding.
    """

    bits: float = 8
    mixed: bool = False
    rounding: Literal["nearest", "learned"] = "nearest"
    steps: int = 500

    def __post_init__(self) -> None:
        if self.rounding not in _ROUNDINGS:
            raise UnknownNameError("rounding of a network", self.rounding, _ROUNDINGS)
        if self.steps < 1:
            raise SettingsError(f"learned rounding takes 1 step or more, got {self.steps}")
        if self.is_mixed:
            if not 2 <= self.bits <= 32:
                raise SettingsError(f"bits are 2 to 32 on average, got {self.bits:g}")
        elif self.bits not in WIDTHS:
            raise SettingsError(
                f"bits are {', '.join(map(str, WIDTHS))}, or a mean such as 5.5 or with mixed, got {self.bits:g}"
            )

    @property
    def is_mixed(self) -> bool:
        """Whether matrices get different numbers of bits."""
        return self.mixed or self.bits != int(self.bits)


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


def encode(
    network: nn.Module,
    picture: Picture,
    coding: Coding,
    *,
    made_by: Mapping[str, Any] | None = None,
    seed: int = 0,
    unit: Unit | None = None,
    progress: Progress | None = None,
) -> Stored:
    """A fitted network in as many bits as asked for.

    Args:
        network: one of ``NETWORKS``, fitted to the picture; left as it is.
        picture: what losses are measured on.
        coding: bits and rounding.
        made_by: kept in ``config.json``.
        seed: of the pixels drawn.
        unit, progress: see :func:`postlude.signals.training.optimise`; for learned rounding.

    Raises:
        SettingsError: fewer bits than the coarsest choice takes.
    """
    names = _matrices(network)
    bits = (
        _allocated(network, picture, coding.bits, seed)
        if coding.is_mixed
        else {name: 32 if place == 0 else int(coding.bits) for place, name in enumerate(names)}
    )
    codes = _ROUNDINGS[coding.rounding](network, picture, coding, bits, seed, unit, progress)
    settings: NetworkSettings = network.settings  # type: ignore[assignment]
    config = {
        "format": FORMAT,
        "version": VERSION,
        "network": {"name": settings.name, **dataclasses.asdict(settings)},
        "picture": list(picture.size),
        "bits": [bits[name] for name in names],
        **({"made_by": dict(made_by)} if made_by else {}),
    }
    config = json.loads(json.dumps(config))
    return Stored(config, _packed(network, bits, codes))


def _matrices(network: nn.Module) -> list[str]:
    """Names of the weights that have bits, the first layer's first."""
    return [name for name, value in network.state_dict().items() if name.endswith(".weight")]


def _scheme(bits: int) -> Scheme:
    return Scheme(Integer(bits))


def _rows(weight: Tensor) -> Tensor:
    """A weight as ``[rows, in_features]``; a complex one has its two parts below each other."""
    return weight.detach().reshape(-1, weight.shape[-1])


def _cost(weight: Tensor, bits: int) -> int:
    """Bits on the disk, scales included."""
    rows = _rows(weight)
    return bits * rows.numel() if bits in FLOATS else _scheme(bits).stored_bits(*rows.shape)


def _coarse(weight: Tensor, bits: int) -> Tensor:
    """A weight as it comes back from so many bits, rounded to nearest."""
    if bits in FLOATS:
        return weight.to(FLOATS[bits]).float()
    return nearest(_rows(weight), _scheme(bits)).decode().reshape(weight.shape)


@torch.no_grad()
def _allocated(network: nn.Module, picture: Picture, mean: float, seed: int) -> dict[str, int]:
    """Bits of every matrix: least sum of the errors that each of them alone brings into the picture."""
    names = _matrices(network)
    state = {name: value.detach() for name, value in network.state_dict().items()}
    x, target = _sample(picture, seed, next(network.parameters()).device)
    base = float(functional.mse_loss(network(x), target))
    losses = [
        [
            float(
                functional.mse_loss(
                    functional_call(network, {name: _coarse(state[name], bits)}, (x,)), target
                )
            )
            - base
            for bits in WIDTHS
        ]
        for name in names
    ]
    costs = [[_cost(state[name], bits) for bits in WIDTHS] for name in names]
    entries = sum(state[name].numel() for name in names)
    found = allocate(losses, costs, math.floor(mean * entries))
    return {name: WIDTHS[option] for name, option in zip(names, found.options, strict=True)}


def _sample(picture: Picture, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some pixels, or all: points and values."""
    flat = picture.pixels.reshape(-1, picture.channels)
    chosen = torch.arange(len(flat))
    if len(flat) > _PIXELS:
        chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))[:_PIXELS]
    return points(chosen, *picture.size).to(device), (flat[chosen] / 255).to(device)


Codes = dict[str, Encoded]


def _round_to_nearest(
    network: nn.Module,
    picture: Picture,
    coding: Coding,
    bits: Mapping[str, int],
    seed: int,
    unit: Unit | None,
    progress: Progress | None,
) -> Codes:
    state = network.state_dict()
    return {
        name: nearest(_rows(state[name]), _scheme(count))
        for name, count in bits.items()
        if count not in FLOATS
    }


class _Learning(nn.Module):
    """The variables of all matrices, as parameters."""

    def __init__(self, roundings: Mapping[str, Rounding]) -> None:
        super().__init__()
        self.variables = nn.ParameterList()
        for rounding in roundings.values():
            rounding.variables = nn.Parameter(rounding.variables.detach())
            self.variables.append(rounding.variables)


def _learn_rounding(
    network: nn.Module,
    picture: Picture,
    coding: Coding,
    bits: Mapping[str, int],
    seed: int,
    unit: Unit | None,
    progress: Progress | None,
) -> Codes:
    state = network.state_dict()
    roundings = {
        name: Rounding(_rows(state[name]), _scheme(count))
        for name, count in bits.items()
        if count not in FLOATS
    }
    if not roundings:
        return {}
    flat = picture.pixels.reshape(-1, picture.channels)
    device = next(network.parameters()).device
    kept = {name: value.detach() for name, value in state.items()}
    entries = sum(rounding.variables.numel() for rounding in roundings.values())

    def loss(step: int, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(flat), (min(len(flat), _BATCH),), generator=draw)
        soft = {name: r.soft().reshape(state[name].shape) for name, r in roundings.items()}
        found = functional_call(
            network, {**kept, **soft}, (points(chosen, *picture.size).to(device),)
        )
        error = functional.mse_loss(found, (flat[chosen] / 255).to(device))
        power = annealed_power(step / coding.steps)
        penalty = sum((r.penalty(power) for r in roundings.values()), torch.zeros(()))
        # Adam sees ratios only: with this weight entries decide in the second half of the steps. Our choice.
        return error + penalty / entries

    training = Training(steps=coding.steps, learning_rate=0.1, batch=_BATCH)
    optimise(
        _Learning(roundings),
        loss,
        training,
        seed=seed,
        unit=unit,
        progress=progress,
        name="rounding",
    )
    return {name: rounding.encode() for name, rounding in roundings.items()}


_ROUNDINGS: dict[str, Callable[..., Codes]] = {
    "nearest": _round_to_nearest,
    "learned": _learn_rounding,
}


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
    bits = dict(zip(_matrices(network), stored.config["bits"], strict=True))
    for name, value in network.state_dict().items():
        count = bits.get(name, 32)
        if count not in WIDTHS:
            raise CheckpointError(f"{name} has {count!r} bits; expected one of {WIDTHS}.")
        if count in FLOATS:
            kind = "half" if count == 16 else "single"
            found = queue.get(kind, empty(kind)).take(value.numel()).float()
        else:
            rows, width = _rows(value).shape
            bytes_ = queue.get("codes", empty("codes")).take(rows * packed_width(width, count))
            scale = queue.get("scales", empty("scales")).take(rows).reshape(rows, 1)
            codes = unpack(bytes_.reshape(rows, -1), count, width)
            found = Encoded(codes, scale, None, _scheme(count)).decode()
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
