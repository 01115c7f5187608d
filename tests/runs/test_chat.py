"""A chat template is somebody else's program: it is run in a sandbox, and not for ever."""

from __future__ import annotations

import copy
import signal
import threading
from typing import Any

import pytest

from postlude.errors import DataError
from postlude.runs import chat
from postlude.runs.chat import write_chat

TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, you"}]


def with_template(tokenizer: Any, template: str) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def test_a_template_writes_messages(plain_tokenizer: Any) -> None:
    tokenizer = with_template(
        plain_tokenizer, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    before = signal.getsignal(signal.SIGVTALRM)
    written = write_chat(tokenizer, TURNS, "line 1", tokenize=False)
    assert written == "<user>Hello<assistant>Hello, you"
    assert signal.getsignal(signal.SIGVTALRM) == before
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.append(write_chat(tokenizer, TURNS, "line 1", tokenize=False))
    )
    thread.start()
    thread.join()
    assert found == [written]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|undefined"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% for %}", "chat template refuses 2 messages of the roles user, assistant"),
        ("{% for a in range(10**12) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "0.2 s",
        ),
    ],
)
def test_what_a_template_may_not(
    plain_tokenizer: Any, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    with pytest.raises(DataError, match=said) as caught:
        write_chat(with_template(plain_tokenizer, template), TURNS, "chat.jsonl line 1")
    assert str(caught.value).startswith("chat.jsonl line 1: the chat template")
