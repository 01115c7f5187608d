from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .browser import Browser, browser
from .made import demo_results


@pytest.fixture
def results() -> dict[str, Any]:
    """Everything that a page can show, small and made up."""
    return demo_results()


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser without its window."""
    with browser(tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running
