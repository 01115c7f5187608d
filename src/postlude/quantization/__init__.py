"""One file per system; what they share is in ``engine``.

The settings class of every registered method can be imported from here: ``from postlude.quantization import OffQ``.
"""

from __future__ import annotations

from postlude import registry


def __getattr__(name: str) -> type:
    if name.startswith("_"):
        raise AttributeError(name)
    for info in registry.available("quantize"):
        if info.settings.__name__ == name:
            return info.settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(info.settings.__name__ for info in registry.available("quantize"))
