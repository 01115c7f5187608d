from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from postlude.errors import DataError, SettingsError
from postlude.runs.documents import (
    calibration_windows,
    data_hash,
    encode,
    leading_tokens,
    read_documents,
    token_pieces,
)


def write_lines(file: Path, *entries: object) -> Path:
    file.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return file


def test_text_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("one\r\n\ntwo é\n".encode())
    assert read_documents(file) == ["one\r\n\ntwo é\n"]


def test_json_lines_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"id": 0, "text": "one\\ntwo\u2028"}\n\n{"text": "a\u2028b"}', encoding="utf-8"
    )
    assert read_documents(file) == ["one\ntwo\u2028", "a\u2028b"]


def test_a_directory_is_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    write_lines(tmp_path / "a.jsonl", {"text": "first"})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.txt").write_text("third")
    (tmp_path / "notes.md").write_text("none of it")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("none of it")
    assert read_documents(tmp_path) == ["first", "second", "third"]


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No text at"):
        read_documents(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl"):
        read_documents(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"ends in \.csv"):
        read_documents(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 3 is 0xff"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        read_documents(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "x"', "not valid JSON"),
        ('["x"]', "JSON list"),
        ('{"content": "x"}', r"keys \['content'\]"),
        ('{"text": 3}', '"text" a int'),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"line 3 .*{said}") as caught:
        read_documents(file)
    assert caught.value.exit_code == 2


def test_a_hash_follows_content_and_bounds() -> None:
    hashes = {data_hash(d) for d in (["ab"], ["a", "b"], ["b", "a"], ["ab", ""], [])}
    assert len(hashes) == 5
    assert data_hash(["a", "b"]) == data_hash(("a", "b"))


def test_special_tokens_are_the_tokenizers_own(tiny_tokenizer: Any) -> None:
    assert encode(tiny_tokenizer, "ab")[0] == 1
    assert encode(tiny_tokenizer, "ab")[1:] == encode(tiny_tokenizer, "ab", False)
    assert leading_tokens(tiny_tokenizer) == [1]
    with pytest.raises(DataError, match="no tokenizer"):
        encode(None, "ab")


def test_crops_alternate_with_and_without_bos(tiny_tokenizer: Any, some_text: str) -> None:
    windows = calibration_windows(tiny_tokenizer, [some_text], 9, 16, seed=3, context=64)
    assert windows.shape == (9, 16) and windows.dtype == torch.int64
    stream = encode(tiny_tokenizer, some_text, False)
    crops = {tuple(stream[i : i + n]) for n in (15, 16) for i in range(len(stream) - n + 1)}
    for index, window in enumerate(windows.tolist()):
        with_bos = index % 2 == 0
        assert (window[0] == 1) == with_bos
        assert tuple(window[1:] if with_bos else window) in crops
    again = calibration_windows(tiny_tokenizer, [some_text], 9, 16, seed=3)
    other = calibration_windows(tiny_tokenizer, [some_text], 9, 16, seed=4)
    assert torch.equal(windows, again) and not torch.equal(windows, other)
    # More samples of the same seed begin with the same ones.
    more = calibration_windows(tiny_tokenizer, [some_text], 12, 16, seed=3)
    assert torch.equal(more[:9], windows)


def test_a_tokenizer_without_bos_gives_plain_crops(plain_tokenizer: Any, some_text: str) -> None:
    assert leading_tokens(plain_tokenizer) == []
    windows = calibration_windows(plain_tokenizer, [some_text], 4, 16, seed=0)
    assert not (windows == 1).any()


def test_documents_are_joined_and_the_last_token_is_reached(tiny_tokenizer: Any) -> None:
    windows = calibration_windows(tiny_tokenizer, ["abc", "", "de"], 2, 5, seed=0)
    stream = encode(tiny_tokenizer, "abcde", False)
    assert windows.tolist() == [[1, *stream[:4]], stream]


def test_settings_and_text_that_do_not_fit(tiny_tokenizer: Any) -> None:
    text = ["x" * 20]
    with pytest.raises(DataError, match=r"has 20 tokens; one sample needs 21"):
        calibration_windows(tiny_tokenizer, text, 1, 21, seed=0)
    with pytest.raises(DataError, match="has 0 tokens"):
        calibration_windows(tiny_tokenizer, [], 1, 8, seed=0)
    with pytest.raises(SettingsError, match="samples is 0"):
        calibration_windows(tiny_tokenizer, text, 0, 8, seed=0)
    with pytest.raises(SettingsError, match="at least 2"):
        calibration_windows(tiny_tokenizer, text, 1, 1, seed=0)
    with pytest.raises(SettingsError, match="at most 8"):
        calibration_windows(tiny_tokenizer, text, 1, 9, seed=0, context=8)


def test_pieces_of_a_text_are_its_tokens(tiny_tokenizer: Any) -> None:
    text = "a b\n\nc"
    tokens = encode(tiny_tokenizer, text)
    pieces = token_pieces(tiny_tokenizer, tokens)
    assert pieces == [("<s>", 1), *((character, 1) for character in text)]
    assert token_pieces(tiny_tokenizer, []) == []


def test_tokens_of_one_character_are_one_piece(tiny_tokenizer: Any) -> None:
    text = "né 東🙂x"  # 2, 3 and 4 bytes, each a token
    pieces = token_pieces(tiny_tokenizer, encode(tiny_tokenizer, text, False))
    assert pieces == [("n", 1), ("é", 2), (" ", 1), ("東", 3), ("🙂", 4), ("x", 1)]
    # Cut in the middle of a character: what is left of it is one piece.
    cut = encode(tiny_tokenizer, text, False)[:5]
    assert sum(count for _, count in token_pieces(tiny_tokenizer, cut)) == 5


def test_pieces_keep_spaces_that_a_tokenizer_drops_at_the_start(stories_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    text = "Once upon a time, there was a little girl."
    tokens = encode(tokenizer, text)
    pieces = token_pieces(tokenizer, tokens)
    assert "".join(piece for piece, _ in pieces) in (tokenizer.decode(tokens), f"<s> {text}")
    assert " upon" in {piece for piece, _ in pieces} or " u" in {piece for piece, _ in pieces}
