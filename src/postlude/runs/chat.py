"""Conversations as a model reads them, by the template that came with its tokenizer.

A template is a program of whoever wrote the checkpoint. transformers runs it in jinja's sandbox, which keeps it from
Python and from files; what the sandbox does not keep it from is going on for ever.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from postlude.errors import DataError

__all__ = ["SECONDS", "write_chat"]

SECONDS = 5.0
"""Of processor time for one conversation; a template takes about a thousandth of one."""


class _TooLong(Exception):
    pass


def write_chat(tokenizer: Any, messages: Sequence[Any], where: str, **options: Any) -> Any:
    """What ``tokenizer.apply_chat_template`` makes of some messages.

    Args:
        tokenizer: with a chat template; or a processor.
        messages: objects with ``role`` and ``content``.
        where: file and line of them, for messages.
        options: of ``apply_chat_template``.

    Raises:
        DataError: the template refuses them, fails, or takes longer than :data:`SECONDS`.
    """
    from transformers.utils import chat_template_utils

    refusals = (
        chat_template_utils.jinja2.exceptions.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        OverflowError,
        RecursionError,
        MemoryError,
        _TooLong,
    )
    try:
        with _at_most(SECONDS):
            return tokenizer.apply_chat_template(list(messages), **options)
    except refusals as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{where}: the chat template refuses {len(messages)} messages of the roles {roles}: "
            f"{error or type(error).__name__}."
        ) from error


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End what takes more processor time, where the system can: in the main thread of a Unix process."""
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise _TooLong(f"it takes longer than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
