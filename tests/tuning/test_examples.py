from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from postlude.errors import DataError, SettingsError
from postlude.tuning.examples import Examples, read_examples
from postlude.tuning.rows import read_rows

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ m.content }}{% endgeneration %}</s>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b."},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "dd."},
]


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def templated(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer: Any, examples: Examples, index: int = 0) -> str:
    ids = examples.ids(index)
    return str(tokenizer.decode(ids[examples.targets(index)]))


def whole(tokenizer: Any, examples: Examples, index: int = 0) -> str:
    return str(tokenizer.decode(examples.ids(index)))


def test_prompt_and_completion(tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = write(tmp_path, {"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "x"})
    examples = read_examples(data, tiny_tokenizer, 64)
    assert whole(tiny_tokenizer, examples) == "<s>2+2=4</s>"
    assert learned(tiny_tokenizer, examples) == "4</s>"
    assert learned(tiny_tokenizer, examples, 1) == "x</s>"
    assert examples.counts() == {
        "sequences": 2,
        "tokens": 10,
        "response_tokens": 4,
        "truncated": 0,
        "lost_tokens": 0,
        "retokenized": 0,
    }
    assert examples.target_starts.tolist() == [0, 2, 4]


def test_the_first_token_is_never_learned(tmp_path: Path, plain_tokenizer: Any) -> None:
    examples = read_examples(write(tmp_path, {"text": "abc"}), plain_tokenizer, 64)
    assert whole(plain_tokenizer, examples) == "abc</s>"
    assert learned(plain_tokenizer, examples) == "bc</s>"


def test_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    examples = read_examples(write(tmp_path, {"text": "abc"}), tiny_tokenizer, 64)
    assert whole(tiny_tokenizer, examples) == "<s>abc</s>"
    assert learned(tiny_tokenizer, examples) == "abc</s>"


def test_messages_by_prefix(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = templated(tiny_tokenizer, PLAIN)
    examples = read_examples(write(tmp_path, {"messages": TURNS}), tokenizer, 99)
    assert whole(tokenizer, examples).count("<|assistant|>") == 2
    # The line end after a turn's last token is the template's, not the assistant's.
    assert learned(tokenizer, examples) == "b.</s>dd.</s>"


def test_messages_by_mask(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = templated(tiny_tokenizer, MARKED)
    examples = read_examples(write(tmp_path, {"messages": TURNS}), tokenizer, 99)
    assert learned(tokenizer, examples) == "b.</s>dd.</s>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_prompt_and_completion_as_messages(
    tmp_path: Path, tiny_tokenizer: Any, template: str
) -> None:
    tokenizer = templated(tiny_tokenizer, template)
    data = write(
        tmp_path,
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
        {"prompt": "a?", "completion": TURNS[1:2]},
    )
    examples = read_examples(data, tokenizer, 99)
    assert learned(tokenizer, examples) == "dd.</s>"
    assert learned(tokenizer, examples, 1) == "b.</s>"


def test_a_template_that_rewrites_earlier_turns(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = templated(tiny_tokenizer, FORGETFUL)
    with pytest.raises(
        DataError, match=r"data.jsonl line 1: the chat template writes .* message 2"
    ):
        read_examples(write(tmp_path, {"messages": TURNS}), tokenizer, 99)
    one = read_examples(
        write(tmp_path, {"prompt": TURNS[:3], "completion": TURNS[3:]}), tokenizer, 99
    )
    assert learned(tokenizer, one) == "dd.</s>"


def test_a_template_that_refuses(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = templated(tiny_tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        DataError, match=r"line 1: the chat template refuses 4.*roles must alternate"
    ):
        read_examples(write(tmp_path, {"messages": TURNS}), tokenizer, 99)


def test_truncation_is_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = write(tmp_path, {"prompt": "ab", "completion": "cdefgh"}, {"text": "xy"})
    examples = read_examples(data, tiny_tokenizer, 6)
    assert learned(tiny_tokenizer, examples) == "cde"
    assert (examples.truncated, examples.lost_tokens) == (1, 4)


def test_prompt_and_completion_that_merge(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    data = write(
        tmp_path, {"prompt": "ca", "completion": "bc"}, {"prompt": "c", "completion": "ab"}
    )
    examples = read_examples(data, tokenizer, 9)
    assert examples.ids(0).tolist() == [4, 1, 2, 4, 0]
    assert examples.targets(0).tolist() == [False, False, True, True, True]
    assert examples.ids(1).tolist() == [4, 3, 0]
    assert examples.retokenized == 1


def test_the_digest_tells_what_is_learned(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = ({"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"})
    first, second = (read_examples(write(tmp_path, row), tiny_tokenizer, 9) for row in rows)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.digest() != second.digest()
    assert first.digest() == read_examples(write(tmp_path, rows[0]), tiny_tokenizer, 9).digest()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "data.jsonl line 2: the response is empty"),
        ({"text": ""}, "line 2: the response is empty"),
        ({"prompt": "a", "completion": "</s>"}, "line 2: the response is empty"),
        ({"prompt": "a" * 20, "completion": "b"}, "line 2: the response has no token left within max_length 12"),
        ({"question": "a"}, r"line 2 has keys \['question'\]; expected"),
        ({"prompt": 3, "completion": "b"}, 'line 2 has "prompt" as a int; expected a string'),
        ([1], "line 2 is a JSON list; expected an object"),
        ({"messages": TURNS}, "line 2 holds messages, and the model's tokenizer has no chat template"),
        ({"messages": TURNS[:1]}, 'line 2 has no message of the role "assistant"'),
        ({"messages": [{"role": "user"}]}, "line 2, message 1: expected a list of objects"),
        ({"messages": []}, "line 2 has no messages"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path: Path, tiny_tokenizer: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write(tmp_path, {"text": "fine"}, row), tiny_tokenizer, 12)


def test_an_assistant_turn_that_is_empty_after_templating(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tokenizer = templated(tiny_tokenizer, PLAIN)
    empty = [TURNS[0], {"role": "assistant", "content": " "}]
    with pytest.raises(DataError, match="lines 1, 3: the response is empty"):
        read_examples(
            write(tmp_path, {"messages": empty}, {"messages": TURNS}, {"messages": empty}),
            tokenizer,
            99,
        )


def test_bad_files(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="There is no data at"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        read_rows(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"ends in .txt; expected .jsonl"):
        read_rows(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no line"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"\n')
    with pytest.raises(DataError, match=r"a.jsonl line 2 is not valid JSON"):
        read_rows(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8: byte 10 is 0xff"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="no tokenizer"):
        read_examples(write(tmp_path, {"text": "a"}), None, 9)
    with pytest.raises(SettingsError, match="max_length is 1"):
        read_examples(write(tmp_path, {"text": "a"}), tiny_tokenizer, 1)


def test_a_json_file_with_a_list(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"text": "x"},\n {"text": "y"}]')
    assert [(row.line, row.fields["text"]) for row in read_rows(file)] == [(1, "x"), (2, "y")]
    for content, message in (
        ("{}", "holds no list of objects"),
        ("[1]", "holds no list of objects"),
        ("[]", "holds an empty list"),
        ("[", "is not valid JSON"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_rows(file)


def test_a_completion_tokenized_apart_begins_without_a_blank(
    tmp_path: Path, stories_dir: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    rows = [
        {"prompt": f"She said{end}", "completion": "hello there"} for end in (" ", ": ", ":", "\n")
    ]
    examples = read_examples(write(tmp_path, *rows), tokenizer, 99)
    for index, row in enumerate(rows):
        text = tokenizer.decode(examples.ids(index), skip_special_tokens=True)
        assert text.strip() == row["prompt"] + row["completion"]
        assert learned(tokenizer, examples, index).strip() in (
            "hello there</s>",
            "hello there </s>",
        )


def test_turns_that_merge_with_their_prompt(tmp_path: Path, stories_dir: Path) -> None:
    """A blank at the end of the generation prompt, which the tokenizer would put before the next word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    examples = read_examples(write(tmp_path, {"messages": TURNS}), tokenizer, 99)
    assert examples.retokenized == 1
    text = tokenizer.decode(examples.ids(0)).replace(" ", "")
    assert text == "user:a?assistant:b.</s>user:c?assistant:dd.</s>"
    assert learned(tokenizer, examples).replace(" ", "") == "b.</s>dd.</s>"
