from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.attribution.examples import Collection, Example, Records, batches, tokenize
from postlude.errors import DataError, SettingsError


def lines(path: Path, *content: Any) -> Path:
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in content)
    )
    return path


def test_a_file_and_a_list_give_the_same_records(tmp_path: Path) -> None:
    given = [
        {"text": "one"},
        {"id": "b", "text": "zwei ü\u2028x"},
        {"prompt": "a", "completion": "b"},
    ]
    file = lines(tmp_path / "data.jsonl", given[0], "", given[1], "   ", given[2])
    records, listed = Records(file), Records(given)
    assert len(records) == len(listed) == 3
    assert [records[n] for n in range(3)] == [listed[n] for n in range(3)] == given
    assert list(records.slice(1, 3)) == list(listed.slice(1, 3)) == given[1:]
    assert [records.id(n) for n in range(3)] == [0, "b", 2]
    assert [records.text(n) for n in range(3)] == ["one", "zwei ü\u2028x", "ab"]
    assert records.where(2) == f"{file} line 5"
    assert Records(["one"])[0] == {"text": "one"}
    assert records.hash == listed.hash
    with pytest.raises(IndexError):
        records[3]


def test_the_hash_is_of_the_records_and_their_order(tmp_path: Path) -> None:
    first = Records(lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})).hash
    assert Records(lines(tmp_path / "b.jsonl", {"text": "one"}, "", {"text": "two"})).hash == first
    for other in (
        [{"text": "two"}, {"text": "one"}],
        [{"text": "one"}],
        [{"text": "one"}, {"text": "two."}],
    ):
        assert Records(lines(tmp_path / "c.jsonl", *other)).hash != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (['{"text": "a"}', "{"], "data.jsonl line 2 is not valid JSON"),
        ([[1]], r"line 1 is a JSON list; expected \"text\""),
        ([{"text": "a"}, {"text": " \n"}], "line 2 is empty"),
        ([{"prompt": "a", "completion": ""}], 'line 1 is empty: its "completion"'),
        ([{"prompt": "a"}], r"line 1 has keys \['prompt'\]"),
        ([{"text": 3}], "line 1 has keys"),
        (
            [{"id": 7, "text": "a"}, {"text": "b"}, {"id": 7, "text": "c"}],
            "line 3 has the id 7, which line 1",
        ),
        ([], "holds no example"),
        (["", " "], "holds no example"),
    ],
)
def test_what_is_wrong_with_a_file_is_found_before_work_starts(
    tmp_path: Path, content: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Records(lines(tmp_path / "data.jsonl", *content))


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a \.jsonl file"):
        Records(tmp_path / "none.jsonl")
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(DataError, match=r"ends in \.txt"):
        Records(tmp_path / "data.txt")
    (tmp_path / "data").write_text("text")
    with pytest.raises(DataError, match=r"data has no \.jsonl ending"):
        Records(tmp_path / "data")
    with pytest.raises(DataError, match="is a directory"):
        Records(tmp_path)
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        Records(tmp_path / "data.jsonl")
    (tmp_path / "mark.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    assert [record["text"] for record in Records(tmp_path / "mark.jsonl").slice(0, 2)] == ["a", "b"]


def test_prompts_are_not_predicted_unless_asked(tiny_tokenizer: Any) -> None:
    records = Records([{"prompt": "ab", "completion": "cde"}, {"text": "abcde"}])
    found = tokenize(tiny_tokenizer, records, 0, 2, 64, Collection())
    assert found[0].tokens == found[1].tokens
    assert (found[0].first, found[0].targets) == (3, 3)  # <s> a b | c d e
    assert (found[1].first, found[1].targets) == (1, 5)
    trained = tokenize(tiny_tokenizer, records, 0, 2, 64, Collection(prompts="train"))
    assert [one.first for one in trained] == [1, 1]


def test_long_examples_are_cut_and_counted(tiny_tokenizer: Any, plain_tokenizer: Any) -> None:
    records = Records([{"text": "abcdefgh"}, {"text": "a"}])
    found = tokenize(tiny_tokenizer, records, 0, 2, 4, Collection())
    assert [(len(one.tokens), one.cut) for one in found] == [(4, 5), (2, 0)]
    with pytest.raises(DataError, match="example 1 is empty: 1 tokens, of which none is predicted"):
        tokenize(plain_tokenizer, records, 0, 2, 4, Collection())
    prompt = Records([{"prompt": "abcdef", "completion": "gh"}])
    with pytest.raises(DataError, match="prompt of 7 tokens and is cut at 4, so nothing"):
        tokenize(tiny_tokenizer, prompt, 0, 1, 4, Collection())
    with pytest.raises(DataError, match="no tokenizer"):
        tokenize(None, records, 0, 1, 4, Collection())


def test_batches_are_padded_on_the_right() -> None:
    examples = [
        Example(n, list(range(1, length + 1)), 2, 0) for n, length in enumerate((3, 7, 5, 6))
    ]
    found = batches(examples, 14)
    assert [batch.rows for batch in found] == [[1, 3], [2, 0]]
    assert found[1].ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    assert found[1].lengths.tolist() == [5, 3]
    assert found[1].mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert found[1].predicts.tolist() == [
        [False, False, True, True, True],
        [False, False, True, False, False],
    ]
    assert [len(batch) for batch in batches(examples, 1)] == [1, 1, 1, 1]
    assert torch.equal(batches(examples, 14)[0].ids, found[0].ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "max"}, "loss is 'max'"),
        ({"prompts": "no"}, "prompts is 'no'"),
        ({"max_length": 1}, "at least 2 tokens"),
        ({"shard_examples": 0}, "shard_examples is 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Collection(**settings)


def test_patterns() -> None:
    make: Callable[..., Collection] = Collection
    assert make(layers="*mlp*, *q_proj").patterns == ("*mlp*", "*q_proj")
