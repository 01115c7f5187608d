"""A demonstration, which is a line of a .jsonl file, as tokens and which of them are the response.

The forms of a line are told apart by their keys:

    {"prompt": "...", "completion": "..."}      or both as lists of messages
    {"audio": "wav/1.wav", "prompt": "...", "completion": "..."}      for audio language models
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"text": "..."}

The response is the completion with the end-of-sequence token, every assistant turn with the token that ends it, or
all of a text with its end of sequence. The rest, the prompt, is read by the model and not learned.

A prompt and its completion are tokenized together, and the response starts where the tokens of the prompt alone end.
Where the tokenizer merges letters across that border they are tokenized apart, as they are when the model is asked;
such lines are counted (``retokenized``).

Messages go through the chat template of the tokenizer. Where the template marks ``{% generation %}``, transformers
tells which tokens are the assistant's. Elsewhere the template is applied to the first turns only, again and again;
each text must begin the next, which is checked, and what an assistant turn adds is a response.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from postlude.errors import DataError
from postlude.runs.chat import write_chat
from postlude.runs.documents import encode
from postlude.runs.listening import Features, Listener
from postlude.tuning.recordings import AUDIO, Recordings
from postlude.tuning.rows import FORMS, Row

__all__ = ["Tokenized", "tokenize"]

_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """One sequence.

    Attributes:
        ids: tokens.
        response: which are the response.
        content: which say something: the response without special tokens.
        retokenized: prompt and completion were tokenized apart.
    """

    ids: list[int]
    response: list[bool]
    content: list[bool]
    retokenized: bool = False

    def cut(self, length: int) -> Tokenized:
        """Without what is beyond a length."""
        return dataclasses.replace(
            self,
            ids=self.ids[:length],
            response=self.response[:length],
            content=self.content[:length],
        )


def tokenize(tokenizer: Any, row: Row, recordings: Recordings | None = None) -> Tokenized:
    """The tokens of a line.

    Args:
        tokenizer: of the model.
        row: the line.
        recordings: of an audio language model, what reads the recording that a line names.

    Raises:
        DataError: names file and line: not one of the forms, messages that the template refuses, a recording that
            cannot be read, or one for a model that hears nothing.
    """
    if AUDIO in row.fields:
        return _about_recording(tokenizer, row, recordings)
    return _form(row)(tokenizer, row)


def _form(row: Row) -> Callable[[Any, Row], Tokenized]:
    keys = row.fields.keys()
    if "messages" in keys:
        return _messages
    if {"prompt", "completion"} <= keys:
        both = (row.fields["prompt"], row.fields["completion"])
        return _messages if any(isinstance(part, list) for part in both) else _completion
    if "text" in keys:
        return _text
    raise DataError(f"{row.where} has keys {sorted(keys)}; expected {FORMS}.")


def _string(row: Row, name: str) -> str:
    value = row.fields[name]
    if not isinstance(value, str):
        raise DataError(f'{row.where} has "{name}" as a {type(value).__name__}; expected a string.')
    return value


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _started(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on: without the end of sequence that some tokenizers add."""
    ids = encode(tokenizer, text)
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
        if len(ids) == 1 and ids[0] == tokenizer.bos_token_id:
            break
    return ids


def _continued(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that something comes before: some tokenizers begin a text with a blank of their own."""
    for before in ("\n", "."):
        start = encode(tokenizer, before, add_special_tokens=False)
        whole = encode(tokenizer, before + text, add_special_tokens=False)
        if whole[: len(start)] == start:
            return whole[len(start) :]
    return encode(tokenizer, text, add_special_tokens=False)


def _says(tokenizer: Any, ids: Iterable[int]) -> list[bool]:
    special = set(tokenizer.all_special_ids)
    return [token not in special for token in ids]


def _text(tokenizer: Any, row: Row) -> Tokenized:
    text = _string(row, "text")
    ids = _ended(tokenizer, encode(tokenizer, text)) if text else []
    return Tokenized(ids, [True] * len(ids), _says(tokenizer, ids))


def _completion(tokenizer: Any, row: Row) -> Tokenized:
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    before = _started(tokenizer, prompt)
    ids = _started(tokenizer, prompt + completion)
    apart = ids[: len(before)] != before
    if apart:
        ids = before + _continued(tokenizer, completion)
    says = [False] * len(before) + _says(tokenizer, ids[len(before) :])
    whole = _ended(tokenizer, ids) if len(ids) > len(before) else ids
    says += [False] * (len(whole) - len(ids))
    response = [False] * len(before) + [True] * (len(whole) - len(before))
    return Tokenized(whole, response, says, retokenized=apart)


def _messages(tokenizer: Any, row: Row) -> Tokenized:
    if "messages" in row.fields:
        first, messages = 0, row.fields["messages"]
    else:
        prompt = _turns(row.fields["prompt"], "user")
        completion = _turns(row.fields["completion"], "assistant")
        first, messages = len(prompt), [*prompt, *completion]
    _check_messages(row, messages)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.where} holds messages, and the model's tokenizer has no chat template to write them with. "
            'Give "prompt" and "completion" as strings instead, or put the chat_template.jinja that the model '
            "was made for beside its tokenizer."
        )
    apart = False
    if _GENERATION.search(str(tokenizer.chat_template)):
        ids, response = _by_mask(tokenizer, row, messages, first)
    else:
        ids, response, apart = _by_prefix(tokenizer, row, messages, first)
    says = [a and b for a, b in zip(response, _says(tokenizer, ids), strict=True)]
    if (
        any(says)
        and not tokenizer.decode(
            [token for token, mark in zip(ids, says, strict=True) if mark]
        ).strip()
    ):
        says = [False] * len(says)
    return Tokenized(ids, response, says, retokenized=apart)


def _turns(part: Any, role: str) -> list[Any]:
    return part if isinstance(part, list) else [{"role": role, "content": part}]


def _check_messages(row: Row, messages: Any) -> None:
    expected = 'a list of objects with "role" and "content", both strings'
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where} has no messages; expected {expected}.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(f"{row.where}, message {number}: expected {expected}.")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f'{row.where} has no message of the role "assistant", so there is nothing to learn.'
        )


def _template(tokenizer: Any, row: Row, messages: Sequence[Any], **options: Any) -> Any:
    return write_chat(tokenizer, messages, row.where, tools=row.fields.get("tools"), **options)


def _written(tokenizer: Any, row: Row, messages: Sequence[Any], goes_on: bool = False) -> str:
    """What the template makes of some messages, as text."""
    return str(_template(tokenizer, row, messages, tokenize=False, add_generation_prompt=goes_on))


def _by_mask(
    tokenizer: Any, row: Row, messages: Sequence[Any], first: int
) -> tuple[list[int], list[bool]]:
    found = _template(
        tokenizer, row, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, response = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    # Templates differ in whether the token that ends a turn lies inside of what they mark.
    for index in range(1, len(ids)):
        if response[index - 1] and ids[index] == tokenizer.eos_token_id:
            response[index] = True
    if first:
        given = _written(tokenizer, row, messages[:first])
        _check_prefix(row, given, _written(tokenizer, row, messages), first)
        size = len(encode(tokenizer, given, add_special_tokens=False))
        response[:size] = [False] * size
    return ids, response


def _by_prefix(
    tokenizer: Any, row: Row, messages: Sequence[Any], first: int
) -> tuple[list[int], list[bool], bool]:
    """Tokens, which of them are the assistant's, and whether turns had to be tokenized apart."""
    text = _written(tokenizer, row, messages)
    borders = [0]
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        before = _written(tokenizer, row, messages[:index], goes_on=True)
        after = _written(tokenizer, row, messages[: index + 1])
        _check_prefix(row, before, after, index + 1)
        _check_prefix(row, after, text, index + 1)
        borders += [len(before), len(after)]
    return _divided(tokenizer, text, borders)


def _about_recording(tokenizer: Any, row: Row, recordings: Recordings | None) -> Tokenized:
    if recordings is None:
        raise DataError(
            f'{row.where} has a recording ("{AUDIO}"), and the model hears none. Give an audio language model with its '
            "processor (docs/speech.md), or demonstrations without recordings."
        )
    if not {"prompt", "completion"} <= row.fields.keys():
        raise DataError(
            f'{row.where} has keys {sorted(row.fields)}; expected "{AUDIO}", "prompt" and "completion". Questions '
            "without an answer, such as reinforce.jsonl, are for --objective grpo; answers are in answers.jsonl."
        )
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    listener, features = recordings.listener, recordings.read(row)
    # A few questions, answers and lengths make up most data sets.
    key = (prompt, completion, features.embeddings)
    if key not in recordings.tokens:
        recordings.tokens[key] = _question(tokenizer, row, listener, features, prompt, completion)
    found: Tokenized = recordings.tokens[key]
    return found


def _question(
    tokenizer: Any, row: Row, listener: Listener, features: Features, prompt: str, completion: str
) -> Tokenized:
    try:
        given = listener.written(prompt)
        whole = listener.written(prompt, completion)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    _check_prefix(row, given, whole, 2)
    given, whole = listener.heard(given, features), listener.heard(whole, features)
    ids, response, apart = _divided(tokenizer, whole, [0, len(given), len(whole)])
    says = [a and b for a, b in zip(response, _says(tokenizer, ids), strict=True)]
    if not completion.strip():
        says = [False] * len(says)
    return Tokenized(ids, response, says, retokenized=apart)


def _divided(
    tokenizer: Any, text: str, borders: Sequence[int]
) -> tuple[list[int], list[bool], bool]:
    """Tokens of a text, which are the assistant's, and whether its pieces had to be tokenized apart.

    Args:
        borders: where pieces start and the last one ends; the assistant's is every second one.
    """
    pieces = [
        text[start:stop] for start, stop in zip(borders, [*borders[1:], len(text)], strict=True)
    ]
    ids = encode(tokenizer, text, add_special_tokens=False)
    cuts = [len(encode(tokenizer, text[:at], add_special_tokens=False)) for at in borders]
    apart = any(
        ids[:cut] != encode(tokenizer, text[:at], add_special_tokens=False)
        for cut, at in zip(cuts, borders, strict=True)
    )
    if apart:
        parts = [encode(tokenizer, pieces[0], add_special_tokens=False)]
        parts += [_continued(tokenizer, piece) for piece in pieces[1:]]
        ids = [token for part in parts for token in part]
        cuts = [sum(map(len, parts[:number])) for number in range(len(parts))]
    response = [False] * len(ids)
    # Pieces are by turns the prompt's and the assistant's.
    for start, stop in zip(cuts[1::2], [*cuts[2::2], len(ids)], strict=False):
        end = _end_of_turn(tokenizer, ids[:stop], start)
        response[start:end] = [True] * (end - start)
    return ids, response, apart


def _end_of_turn(tokenizer: Any, ids: list[int], start: int) -> int:
    """Behind the last special token of a turn, if only blanks follow it: the line end is not the assistant's."""
    special = set(tokenizer.all_special_ids)
    last = next((i for i in range(len(ids) - 1, start, -1) if ids[i] in special), None)
    if last is None or tokenizer.decode(ids[last + 1 :]).strip():
        return len(ids)
    return last + 1


def _check_prefix(row: Row, part: str, whole: str, turn: int) -> None:
    if whole.startswith(part):
        return
    pairs = enumerate(zip(part, whole, strict=False))
    same = next((at for at, (a, b) in pairs if a != b), min(len(part), len(whole)))
    raise DataError(
        f"{row.where}: the chat template writes the turns up to message {turn} otherwise when more follows (near "
        f"{part[max(0, same - 20) : same + 20]!r}), so it cannot be told which tokens are the response. Use a template "
        "that marks them with {% generation %}, or give each answer as a line of its own."
    )
