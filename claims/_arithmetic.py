"""A task made by code: sums and differences told as a story of two sentences, with worked steps and an answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Example", "Rows", "corrupt", "encode", "make"]

_NAMES = ("Tom", "Ben", "Lily", "Mia", "Sam", "Anna", "Max", "Sue")
_THINGS = ("toys", "cats", "balls", "books", "hats", "cars", "birds", "cakes")


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem: what is given, what is to be written, and the last number in it."""

    prompt: str
    completion: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Rows:
    """Problems as tokens, padded on the right.

    Attributes:
        ids: ``[N, S]`` int64.
        attended: ``[N, S]`` 1 where there is a token.
        trained: ``[N, S]`` 1 where that token belongs to the completion, the end of sequence included.
    """

    ids: Tensor
    attended: Tensor
    trained: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Rows:
        """Some of the rows."""
        return Rows(self.ids[index], self.attended[index], self.trained[index])


def make(count: int, seed: int) -> list[Example]:
    """``count`` problems with numbers of one digit; the same seed gives the same ones."""
    source = random.Random(seed)
    return [_one(source) for _ in range(count)]


def _one(source: random.Random) -> Example:
    who, what = source.choice(_NAMES), source.choice(_THINGS)
    first = source.randint(0, 9)
    second = source.randint(0, 9 - first)
    middle = first + second
    third = source.randint(0, middle)
    last = middle - third
    prompt = f"{who} had {first} {what} and got {second}, then lost {third}."
    completion = f" {first} and {second} is {middle}. {middle} less {third} is {last}."
    return Example(prompt, completion, str(last))


def encode(tokenizer: Any, examples: Sequence[Example]) -> Rows:
    """Prompt, completion and end of sequence of each problem, as one row.

    Raises:
        ValueError: the tokenizer joins the end of a prompt with the beginning of its completion.
    """
    rows: list[tuple[list[int], int]] = []
    for example in examples:
        prompt = tokenizer(example.prompt).input_ids
        whole = tokenizer(example.prompt + example.completion).input_ids
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"{example.prompt!r} is no prefix of its row in this tokenizer")
        rows.append(([*whole, tokenizer.eos_token_id], len(prompt)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    attended, trained = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (tokens, start) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attended[row, : len(tokens)] = 1
        trained[row, start : len(tokens)] = 1
    return Rows(ids, attended, trained)


def corrupt(rows: Rows, share: float, words: int, seed: int) -> Rows:
    """Every token of a completion but its last one is replaced with probability ``share``, by any word equally."""
    source = torch.Generator().manual_seed(seed)
    last = rows.attended.sum(1, keepdim=True) - 1
    places = torch.arange(rows.ids.shape[1])[None]
    hit = torch.rand(rows.ids.shape, generator=source) < share
    hit &= rows.trained.bool() & (places < last)
    noise = torch.randint(0, words, rows.ids.shape, generator=source)
    return Rows(torch.where(hit, noise, rows.ids), rows.attended, rows.trained)
