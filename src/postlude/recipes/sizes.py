"""How large what a recipe names is: models by the headers of their files, data by their bytes; nothing is loaded.

A token is taken for four bytes of text, our assumption; a recipe's own outputs, which are not there yet, have the size
that their stage says, and ``assumed:70B`` is what it says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from postlude.attribution.plan import parse_count
from postlude.errors import PostludeError
from postlude.recipes.stage import ASSUMED
from postlude.runs.loading import resolve
from postlude.runs.pipeline import denoiser_files, is_denoiser
from postlude.runs.weights import read_header, read_json, weight_files

__all__ = ["Data", "Known", "Model", "Steps", "Unknown", "data", "model", "text_tokens"]

_BYTES_OF_A_TOKEN = 4
# Of an example of data that are not there.
_TOKENS_OF_AN_EXAMPLE = 512.0


class Unknown(Exception):
    """Why there is no forecast."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What is known of a checkpoint.

    Attributes:
        parameters: numbers in its files.
        bytes: of its files.
        kind: what it reads; an audio model reads recordings beside text.
        context: tokens of the longest sequence, 0 where that is not known.
        patches: tokens that an image becomes, 0 for a language model.
        values: numbers of an image that a denoiser draws.
        outside: numbers outside of the blocks, which quantizing leaves: embeddings, the head.
    """

    parameters: float
    bytes: float
    kind: Literal["language", "audio", "vision", "diffusion"] = "language"
    context: int = 0
    patches: int = 0
    values: int = 0
    outside: float = 0.0

    def length(self, wanted: int) -> int:
        """So many tokens of a sequence, or the context where that is shorter."""
        return min(wanted, self.context or wanted)


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples, and the tokens of all of them."""

    examples: float
    tokens: float

    @property
    def mean(self) -> float:
        """Tokens of an example."""
        return self.tokens / self.examples

    def taken(self, examples: float) -> Data:
        """So many of them."""
        return Data(examples, examples * self.mean)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Of the sampler that drift statistics are for."""

    count: int


# What stages that come before give, by ``${stage}``.
Known = Mapping[str, Model | Data | Steps]
_Size = TypeVar("_Size", Model, Data)


def model(text: Any, known: Known) -> Model:
    """A checkpoint, by its path, ``zoo:NAME``, ``assumed:8B`` or the stage that makes it.

    Raises:
        Unknown: it cannot be read.
    """
    found = _known(text, known, Model)
    if found is not None:
        return found
    if str(text).startswith(ASSUMED):
        parameters = _assumed(text)
        return Model(parameters, 2 * parameters)
    try:
        directory = resolve(text)
        pipeline = is_denoiser(directory)
        files = denoiser_files(directory) if pipeline else weight_files(directory)
        config = read_json(files[0].parent / "config.json")
    except PostludeError as error:
        raise Unknown(f"the weights of {text} cannot be read") from error
    return Model(
        float(sum(_numbers(file) for file in files)),
        float(sum(file.stat().st_size for file in files)),
        outside=float(sum(_numbers(file, outside=True) for file in files)),
        **_shape(config, denoiser=pipeline),
    )


def data(text: Any, known: Known, longest: float = math.inf) -> Data:
    """Examples of a ``.jsonl`` file, a folder of such files, ``assumed:100M`` or the stage that writes them.

    Args:
        text: as it stands in the recipe.
        known: of earlier stages.
        longest: tokens at which an example is cut.

    Raises:
        Unknown: it is not there yet.
    """
    found = _known(text, known, Data)
    if found is not None:
        return dataclasses.replace(found, tokens=min(found.tokens, found.examples * longest))
    if str(text).startswith(ASSUMED):
        tokens = _assumed(text)
        return Data(max(1.0, round(tokens / min(longest, _TOKENS_OF_AN_EXAMPLE))), tokens)
    examples, tokens = 0, 0.0
    for file in _files(text, "*.jsonl"):
        with open(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    examples += 1
                    tokens += min(len(line) / _BYTES_OF_A_TOKEN, longest)
    return Data(max(1, examples), tokens)


def text_tokens(text: Any, known: Known) -> float:
    """Tokens of a text: a file, all files of a folder, ``assumed:300K`` or what a stage writes.

    Raises:
        Unknown: it is not there yet.
    """
    found = _known(text, known, Data)
    if found is not None:
        return found.tokens
    if str(text).startswith(ASSUMED):
        return _assumed(text)
    return sum(file.stat().st_size for file in _files(text, "*")) / _BYTES_OF_A_TOKEN


def _known(text: Any, known: Known, kind: type[_Size]) -> _Size | None:
    if "${" not in str(text):
        return None
    found = known.get(str(text))
    if not isinstance(found, kind):
        raise Unknown(f"nothing is known of {text}")
    return found


def _assumed(text: Any) -> float:
    return parse_count(str(text).removeprefix(ASSUMED), "an assumed size")


def _files(text: Any, pattern: str) -> list[Path]:
    path = Path(str(text))
    if path.is_dir():
        return [file for file in path.rglob(pattern) if file.is_file()]
    if not path.is_file():
        raise Unknown(f"{text} is not there yet")
    return [path]


def _numbers(file: Path, *, outside: bool = False) -> int:
    """Numbers in a file, or those outside of the blocks alone, whose names have no number in them."""
    return sum(
        math.prod(entry["shape"])
        for name, entry in read_header(file).items()
        if not outside or not any(word.isdigit() for word in name.split("."))
    )


def _shape(config: Mapping[str, Any], *, denoiser: bool) -> dict[str, Any]:
    """Kind, context and patches by a configuration; what it does not say stays unknown."""
    side, patch = _size(config.get("sample_size" if denoiser else "image_size")), 1
    if side is not None:
        patch = max(1, int(config.get("patch_size") or 1))
    patches = 0 if side is None else (side[0] // patch) * (side[1] // patch)
    if denoiser:
        values = 0 if side is None else int(config.get("in_channels", 1)) * side[0] * side[1]
        return {"kind": "diffusion", "patches": patches, "values": values}
    if patches:
        return {"kind": "vision", "patches": patches + 1}
    text = config.get("text_config") or config
    context = text.get("max_position_embeddings", text.get("n_positions", 0))
    return {
        "kind": "audio" if "audio_config" in config else "language",
        "context": context if isinstance(context, int) else 0,
    }


def _size(given: Any) -> tuple[int, int] | None:
    if isinstance(given, int):
        return given, given
    if isinstance(given, list) and len(given) == 2 and all(isinstance(one, int) for one in given):
        return given[0], given[1]
    return None
