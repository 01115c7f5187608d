"""Prompts from a .jsonl file, with the columns that rewards ask for.

One JSON object a line: ``{"prompt": "...", ...}`` with the prompt a string, or a list of messages that goes through the
chat template. All other keys are columns.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from postlude.errors import DataError
from postlude.runs.chat import write_chat
from postlude.tuning.rewards import GIVEN
from postlude.tuning.rows import Row, read_rows

__all__ = ["Prompt", "asked_with", "other_columns", "read_prompts", "text_of"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of the data.

    Attributes:
        prompt: a string, or a list of ``{"role", "content"}``.
        columns: everything else.
        tokens: of the prompt.
        where: file and line.
        row: the line as it was read; None where it is not needed again.
    """

    prompt: Any
    columns: Mapping[str, Any]
    tokens: int
    where: str
    row: Row | None = None


def read_prompts(path: str | os.PathLike[str], tokenizer: Any) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        DataError: a line of another form; names it.
    """
    rows = read_rows(path)
    prompts = [_prompt(row, tokenizer) for row in rows]
    odd = next(
        (
            one
            for one in prompts
            if isinstance(one.prompt, str) != isinstance(prompts[0].prompt, str)
        ),
        None,
    )
    if odd is not None:
        words = (
            ("a string", "messages") if isinstance(odd.prompt, list) else ("messages", "a string")
        )
        raise DataError(
            f"{prompts[0].where} has a prompt that is {words[0]} and {odd.where} one that is {words[1]}: expected one "
            "of the two throughout."
        )
    return prompts


def _prompt(row: Row, tokenizer: Any) -> Prompt:
    key = next((name for name in ("prompt", "messages") if name in row.fields), None)
    if key is None:
        raise DataError(
            f'{row.where} has keys {sorted(row.fields)}; expected "prompt" (a string, or a list of messages) and the '
            "columns that the reward asks for."
        )
    prompt = row.fields[key]
    columns = other_columns(row, key)
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{row.where} has an empty prompt.")
        return Prompt(prompt, columns, len(tokenizer(prompt)["input_ids"]), row.where)
    good = (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(turn, dict)
            and all(isinstance(turn.get(k), str) for k in ("role", "content"))
            for turn in prompt
        )
    )
    if not good:
        raise DataError(
            f'{row.where}: expected "{key}" as a string or a list of objects with "role" and "content", both strings.'
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.where} holds messages, and the model's tokenizer has no chat template to write them with. Give "
            "prompts as strings, or put the chat_template.jinja that the model was made for beside its tokenizer."
        )
    ids = write_chat(tokenizer, prompt, row.where, add_generation_prompt=True, return_dict=True)
    return Prompt(prompt, {**columns, "messages": prompt}, len(ids["input_ids"]), row.where)


def other_columns(row: Row, key: str) -> dict[str, Any]:
    """The columns of a line: everything but the prompt.

    Raises:
        DataError: one of a name under which rewards are given something else.
    """
    columns = {name: value for name, value in row.fields.items() if name != key}
    taken = sorted({*GIVEN} & columns.keys())
    if taken:
        raise DataError(
            f"{row.where} has a column {taken[0]!r}, which rewards are given under that name: rename it."
        )
    return columns


def asked_with(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """What rewards are given beside the answers to these: the columns that all have, and the texts of the prompts."""
    names = set.intersection(*(set(prompt.columns) for prompt in prompts))
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in sorted(names)}
    return {**columns, "prompts": [text_of(prompt.prompt) for prompt in prompts]}


def text_of(part: Any) -> str:
    """The text of a string, or of the last of some messages."""
    return part if isinstance(part, str) else str(part[-1].get("content") or "")
