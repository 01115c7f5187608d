"""Text from files, tokens from text, calibration windows from tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postlude.errors import DataError, SettingsError

__all__ = [
    "calibration_windows",
    "data_hash",
    "encode",
    "leading_tokens",
    "read_documents",
    "read_text",
    "text_files",
    "token_pieces",
]

_ENDINGS = (".txt", ".jsonl")
# Bytes of the longest character of UTF-8; a token is at least one of them.
_TOKENS_OF_A_CHARACTER = 4


def text_files(path: str | os.PathLike[str]) -> list[Path]:
    """The text files that ``path`` stands for: itself, or every .txt and .jsonl below, sorted.

    Raises:
        DataError: there is no such path, no such file in the directory, or another kind of file.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(
            file
            for file in source.rglob("*")
            if file.suffix in _ENDINGS
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(source).parts)
        )
        if not files:
            raise DataError(f"{source} holds no .txt or .jsonl file: expected text in one of them.")
        return files
    if not source.is_file():
        raise DataError(f"No text at {source}: expected a .txt or .jsonl file, or a directory.")
    if source.suffix not in _ENDINGS:
        raise DataError(
            f"{source} ends in {source.suffix or 'nothing'}; expected .txt (one document), or "
            '.jsonl (one JSON object with "text" a line), or a directory of such files.'
        )
    return [source]


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """The documents of a text file, a JSON-lines file, or a directory of them in sorted order.

    A .txt file is one document, byte for byte. A .jsonl file is one document a line, the value of
    ``"text"``; empty lines are passed over.

    Raises:
        DataError: a path, a line or an encoding that cannot be read, or no text at all.
    """
    documents: list[str] = []
    for file in text_files(path):
        content = read_text(file)
        documents += [content] if file.suffix == ".txt" else _json_lines(file, content)
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} holds no text: expected at least one document.")
    return documents


def data_hash(documents: Sequence[str]) -> str:
    """A SHA-256 over the documents, in order and with their bounds, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8", "surrogatepass")
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text of any length; with special tokens exactly those the tokenizer adds.

    Raises:
        DataError: there is no tokenizer.
    """
    if tokenizer is None:
        raise DataError(
            "The checkpoint has no tokenizer, and text was given: add its tokenizer.json and "
            "tokenizer_config.json to the checkpoint directory."
        )
    # Without `verbose=False` it warns about every text longer than the context.
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return [int(token) for token in encoding["input_ids"]]


def leading_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: BOS for most, nothing for some."""
    plain = encode(tokenizer, "a", add_special_tokens=False)
    full = encode(tokenizer, "a")
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def token_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[tuple[str, int]]:
    """The text of a sequence in pieces, each with the number of tokens that it is made of.

    One piece a token, except where a character takes several; special tokens are written out. Tokens are
    decoded together with those before, because a tokenizer may drop the space at the start of a text.

    Returns:
        ``(text, tokens)``; the counts add up to ``len(tokens)``.
    """
    ids = [int(token) for token in tokens]
    found: list[tuple[str, int]] = []
    first = second = (
        0  # tokens from the first are decoded again, those from the second are not yet in a piece
    )
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[first:second]) if second > first else ""
        whole = tokenizer.decode(ids[first:end])
        if whole.endswith("\ufffd") and end < len(ids) and end - second < _TOKENS_OF_A_CHARACTER:
            continue
        # A tokenizer that writes the text before differently now is taken at its word for this token alone.
        piece = (
            whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[second:end])
        )
        found.append((piece, end - second))
        first, second = second, end
    return found


def calibration_windows(
    tokenizer: Any,
    documents: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    context: int | None = None,
) -> Tensor:
    """Random crops of the documents' tokens.

    The documents are joined into one stream of tokens, and crops of it are drawn with replacement.
    Every second crop, from the first, starts with what the tokenizer puts before a text (BOS), so
    that statistics cover both: the first token of a sequence is where massive activations sit.

    Args:
        tokenizer: of the model.
        documents: texts.
        samples: number of crops.
        length: tokens of each crop, BOS included.
        seed: of the draw.
        context: the longest sequence the model takes, to refuse a longer crop.

    Returns:
        ``int64 [samples, length]``.

    Raises:
        SettingsError: ``samples``, ``length`` or ``context`` do not fit.
        DataError: no text, or less of it than one crop.
    """
    if samples < 1:
        raise SettingsError(f"calibration samples is {samples}; expected at least 1")
    if length < 2:
        raise SettingsError(f"calibration length is {length}; expected at least 2 tokens")
    if context is not None and length > context:
        raise SettingsError(
            f"calibration length is {length} tokens, but the model takes at most {context}: "
            "choose a shorter length"
        )
    pieces = [encode(tokenizer, text, add_special_tokens=False) for text in documents if text]
    stream = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
    if len(stream) < length:
        raise DataError(
            f"The calibration text has {len(stream)} tokens; one sample needs {length}. "
            "Give more text or choose a shorter length."
        )
    leading = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)[: length - 1]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length + 1, (samples,), generator=generator).tolist()
    windows = torch.empty(samples, length, dtype=torch.int64)
    for index, start in enumerate(starts):
        head = leading if index % 2 == 0 else leading[:0]
        windows[index] = torch.cat([head, stream[start : start + length - len(head)]])
    return windows


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; DataError names the first byte that is not."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. "
            "Expected UTF-8 text; convert it first (iconv -f ... -t utf-8)."
        ) from error


def _json_lines(file: Path, content: str) -> list[str]:
    documents: list[str] = []
    # Not splitlines: JSON strings may hold U+2028 and other separators as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} line {number} is not valid JSON: {error}.") from error
        if not isinstance(entry, dict):
            raise DataError(
                f"{file} line {number} is a JSON {type(entry).__name__}; expected an object "
                'with "text".'
            )
        text = entry.get("text")
        if not isinstance(text, str):
            found = f"keys {sorted(entry)}" if text is None else f'"text" a {type(text).__name__}'
            raise DataError(
                f'{file} line {number} has {found}; expected "text" with the document as a string.'
            )
        documents.append(text)
    return documents
