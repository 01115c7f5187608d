"""Properties that hold for whatever hypothesis thinks of: the same examples every time, and many more in slow runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

__all__ = ["EXAMPLES", "every"]

# Marks a test that takes ``examples``: how many are tried.
EXAMPLES = pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.slow)])


def every(
    examples: int, **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], None]:
    """Run the function below at once, on so many examples."""

    def run(holds: Callable[..., None]) -> None:
        chosen = settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            # Explaining a failure traces every line, which takes minutes where pydantic is at work.
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        chosen(given(**strategies)(holds))()

    return run
