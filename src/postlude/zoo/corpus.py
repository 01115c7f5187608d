"""Text that every Python installation carries: the language reference and the standard library's own documentation.

Two sources, both part of CPython and under the PSF licence version 2:

* ``pydoc_data.topics``: the chapters of the language reference that ``help("if")`` prints; one document each.
* the standard library: one document a module, made of its docstring, the signature and docstring of every class and
  function in it, and its longer comments. Test suites are left out (many installations do not carry them).

Nothing is imported or executed: modules are parsed with `ast`. Files are visited in sorted order, so one Python
version always gives the same text; another version gives a slightly different one, which is why the evaluation and
calibration texts of the reference models are stored beside their checkpoints.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from postlude.errors import DataError

__all__ = ["documents", "join_documents", "selection", "split_documents"]

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib-dynload", "site-packages", "test", "tests"}
)
_SHORTEST_COMMENT = 80
_SHORTEST_DOCUMENT = 200


def _tidy(text: str) -> str:
    """Strip trailing blanks and squeeze runs of empty lines, so that a paragraph break is always two newlines."""
    text = "\n".join(line.rstrip() for line in text.expandtabs(4).splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield (first line number, text) of every block of consecutive comment lines that reads like prose."""
    block: list[str] = []
    first = previous = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
                continue
            if token.start[0] != previous + 1 and block:
                yield first, inspect.cleandoc("\n".join(block))
                block = []
            if not block:
                first = token.start[0]
            block.append(token.string.lstrip("#"))
            previous = token.start[0]
    except (tokenize.TokenError, IndentationError) as error:
        raise DataError(f"standard library source that does not tokenise: {error}") from error
    if block:
        yield first, inspect.cleandoc("\n".join(block))


def _module_text(source: str) -> str:
    """The documentation of one module in reading order; empty if it has none."""
    pieces: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module):
            text = ast.get_docstring(node)
            if text:
                pieces.append((0, text))
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if not text:
                continue
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
            else:
                head = f"def {node.name}({ast.unparse(node.args)}):"
            pieces.append((node.lineno, f"{head}\n{text}"))
    for line, text in _comments(source):
        words = sum(character.isalpha() or character == " " for character in text)
        if len(text) >= _SHORTEST_COMMENT and words > 0.75 * len(text):
            pieces.append((line, text))
    pieces.sort(key=lambda piece: piece[0])
    return "\n\n".join(text for _, text in pieces)


def documents() -> list[tuple[str, str]]:
    """Every document as (name, text), in a fixed order.

    Raises:
        DataError: the installation carries no standard library source (a frozen or stripped Python).
    """
    from pydoc_data.topics import topics

    found = [(f"topic/{name}", _tidy(topics[name])) for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix != ".py" or file == "topics.py":
                continue
            try:
                with tokenize.open(path) as stream:
                    text = _module_text(stream.read())
            except (SyntaxError, UnicodeDecodeError):
                continue  # a template or a deliberately broken example, not a module
            found.append((path.relative_to(library).as_posix(), _tidy(text)))
    kept = [(name, text) for name, text in found if len(text) >= _SHORTEST_DOCUMENT]
    if sum(len(text) for _, text in kept) < 1_000_000:
        raise DataError(
            f"{library} holds too little documentation to train on. Use a Python installation with its library source."
        )
    return kept


def split_documents(
    named: list[tuple[str, str]], *, every: int = 24
) -> tuple[list[str], list[str]]:
    """Split into (training, held-out) texts by a hash of the name: one document in ``every`` is held out.

    The hash does not depend on the order or on the other documents, so a document stays on its side in every Python
    version.
    """
    training: list[str] = []
    held_out: list[str] = []
    for name, text in named:
        digest = hashlib.sha256(name.encode()).digest()
        side = held_out if int.from_bytes(digest[:4], "big") % every == 0 else training
        side.append(text)
    return training, held_out


def join_documents(texts: Sequence[str]) -> str:
    """One text file of several documents, separated by an empty line."""
    return "\n\n".join(texts) + "\n"


def selection(texts: Sequence[str], characters: int) -> list[str]:
    """Every seventh document, whole, as long as they stay below ``characters`` together."""
    chosen: list[str] = []
    for text in texts[::7]:
        if sum(map(len, chosen)) + len(text) < characters:
            chosen.append(text)
    return chosen
