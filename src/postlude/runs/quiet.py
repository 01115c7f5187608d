"""Keep other libraries' chatter off the screen."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator

__all__ = ["quiet_diffusers", "quiet_peft", "quiet_transformers"]


def quiet_transformers() -> contextlib.AbstractContextManager[None]:
    """No bars and no tables of loaded keys from transformers; errors still raise."""
    return _quiet("transformers.utils.logging")


def quiet_diffusers() -> contextlib.AbstractContextManager[None]:
    """No bars and no remarks on unused settings from diffusers; errors still raise."""
    return _quiet("diffusers.utils.logging")


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without peft's advice on choices that are made here, and its use of names that transformers has replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextlib.contextmanager
def _quiet(module: str) -> Iterator[None]:
    # By name: only one who works with a library has imported it, and Postlude itself can do without diffusers.
    logging = importlib.import_module(module)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
