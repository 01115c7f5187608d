"""A Hugging Face tokenizer in the fields of a GGUF file.

llama.cpp has two tokenizers that matter here. ``gpt2`` is byte-level BPE: merges, and a regular expression that cuts
the text first, known by a name. ``llama`` is sentencepiece's BPE: no merges, but a score for every token; two
neighbours are joined if their union is a token, the highest score first.

A regular expression that llama.cpp has no name for, or merges that scores cannot express, would give other tokens
without an error, so they are refused.
"""

from __future__ import annotations

import json
from typing import Any

from postlude.errors import DataError

__all__ = ["tokenizer_fields"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Regular expression, and whether a word that is a token is taken whole: name in llama.cpp.
_SPLITS = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
}


def tokenizer_fields(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """What to write, by methods of ``gguf.GGUFWriter``.

    Args:
        tokenizer: of transformers, with a backend of the tokenizers library.
        vocabulary: rows of the model's embedding; tokens that the tokenizer lacks are filled in as unused.

    Raises:
        DataError: a tokenizer that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"a {type(tokenizer).__name__} has no tokenizer.json, from which GGUF tokenizers are written; save it as a "
            "fast tokenizer first"
        )
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise DataError(
            f"the tokenizer is a {model['type']} model; the GGUF export writes byte-level and sentencepiece-like BPE"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise DataError(
                f"the tokenizer has {name} = {model[name]!r}, which llama.cpp's BPE does not have"
            )
    tokens, types = _tokens(description, vocabulary)
    fields: dict[str, Any] = {}
    if model.get("byte_fallback"):
        fields["add_tokenizer_model"] = "llama"
        fields["add_tokenizer_pre"] = "default"
        fields["add_token_list"] = tokens
        fields["add_token_scores"] = _scores(model, tokens, types)
        fields["add_token_types"] = _bytes_and_unknown(model, tokens, types)
        fields["add_add_space_prefix"] = _space_prefix(description)
    else:
        fields["add_tokenizer_model"] = "gpt2"
        fields["add_tokenizer_pre"] = _split_name(description)
        fields["add_token_list"] = tokens
        fields["add_token_types"] = types
        fields["add_token_merges"] = [" ".join(pair) for pair in _merges(model)]
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None and 0 <= index < vocabulary:
            fields[f"add_{name}_token_id"] = index
    first, last = _added(tokenizer)
    fields["add_add_bos_token"], fields["add_add_eos_token"] = first, last
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        fields["add_chat_template"] = tokenizer.chat_template
    return fields


def _tokens(description: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token in the order of ids, and its type."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    for token, index in description["model"]["vocab"].items():
        if index >= vocabulary:
            raise DataError(
                f"the tokenizer has a token {index}, and the model's embedding {vocabulary} rows; they do not belong "
                "together"
            )
        tokens[index], types[index] = token, _NORMAL
    for added in description["added_tokens"]:
        if added["id"] >= vocabulary:
            raise DataError(
                f"the tokenizer has a token {added['id']} ({added['content']!r}), and the model's embedding "
                f"{vocabulary} rows; they do not belong together"
            )
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER
    return tokens, types


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return [(left, right) for left, right in pairs]


def _split_name(description: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut before merging."""
    normalizer = description["normalizer"]
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise DataError(
            f"the tokenizer normalizes text by {normalizer.get('type')}, which llama.cpp's byte-level BPE does not"
        )
    whole = bool(description["model"].get("ignore_merges"))
    cut = description["pre_tokenizer"] or {}
    parts = cut.get("pretokenizers", [cut])
    last = parts[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(parts) == 1 and last.get("use_regex", True) and not whole:
            return "gpt-2"
        if len(parts) == 2 and not last.get("use_regex", True):
            name = _SPLITS.get((_regex(parts[0]) or "", whole))
            if name is not None:
                return name
    raise DataError(
        "the tokenizer cuts text in a way that the GGUF export has no name of llama.cpp for, and a wrong one would "
        f"give other tokens without an error. Found: {json.dumps(cut, ensure_ascii=False)}; known: ByteLevel as in "
        "GPT-2, and the expressions of Llama 3 and Qwen2."
    )


def _regex(part: dict[str, Any]) -> str | None:
    if part.get("type") != "Split" or part.get("behavior") != "Isolated" or part.get("invert"):
        return None
    found: str | None = part["pattern"].get("Regex")
    return found


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """Minus the rank of the merge that makes a token: what sentencepiece stores."""
    rank: dict[str, int] = {}
    merges = _merges(model)
    previous = None
    for index, (left, right) in enumerate(merges):
        union = left + right
        if union in rank and union != previous:
            raise DataError(
                f"the tokenizer makes {union!r} by merges of different rank, which one score for a token cannot say"
            )
        rank.setdefault(union, index)
        previous = union
    known, listed = set(model["vocab"]), set(merges)
    for token, type in zip(tokens, types, strict=True):
        if type != _NORMAL:
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in known and pair[1] in known and pair not in listed:
                raise DataError(
                    f"{pair[0]!r} and {pair[1]!r} are tokens and so is their union, but the tokenizer does not merge "
                    "them; llama.cpp's sentencepiece would"
                )
    lowest = len(merges)
    return [-float(rank.get(token, lowest)) for token in tokens]


def _bytes_and_unknown(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[int]:
    bytes_ = {f"<0x{value:02X}>" for value in range(256)}
    missing = bytes_ - set(tokens)
    if missing:
        raise DataError(
            f"the tokenizer falls back to bytes but lacks {len(missing)} of the 256 ({min(missing)}); llama.cpp needs "
            "them all"
        )
    unknown = model.get("unk_token")
    return [
        _UNKNOWN if token == unknown else _BYTE if token in bytes_ else type
        for token, type in zip(tokens, types, strict=True)
    ]


def _space_prefix(description: dict[str, Any]) -> bool:
    """Whether a space goes before a text; refuses other ways of treating spaces."""
    normalizer, cut = description["normalizer"], description["pre_tokenizer"]
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if cut is None and parts and parts[-1] == replaced:
        if len(parts) == 1:
            return False
        if len(parts) == 2 and parts[0] == {"type": "Prepend", "prepend": _SPACE}:
            return True
    metaspace = cut is not None and cut.get("type") == "Metaspace" and not cut.get("split", True)
    if not parts and metaspace and cut.get("replacement") == _SPACE:
        return bool(cut.get("prepend_scheme", "always") != "never")
    found = json.dumps({"normalizer": normalizer, "pre_tokenizer": cut}, ensure_ascii=False)
    raise DataError(
        "the tokenizer treats spaces in a way that the GGUF export does not know for sentencepiece-like BPE. Found: "
        f"{found}; known: {_SPACE} for every space, and one before the text."
    )


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last behind."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    if whole == bare:
        return False, False
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for before, behind in ((True, False), (False, True), (True, True)):
        if whole == (first if before else []) + bare + (last if behind else []):
            return before, behind
    raise DataError(
        f"the tokenizer makes {whole} of a text that is {bare}; the GGUF export knows its first token before and its "
        "last behind a text"
    )
