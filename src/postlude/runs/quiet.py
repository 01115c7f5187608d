"""Keep other libraries' chatter off the screen."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

__all__ = ["quiet_diffusers", "quiet_transformers"]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no tables of loaded keys from transformers; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """No bars and no remarks on unused settings from diffusers; errors still raise."""
    # By name: whoever gets here has imported diffusers, which Postlude itself can do without.
    logging = importlib.import_module("diffusers.utils.logging")
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
