"""One file per system; what they share is in ``engine``.

The settings class of every registered method can be imported from here: ``from postlude.quantization import OffQ``.
"""

from __future__ import annotations

from postlude import registry

__getattr__, __dir__ = registry.settings_of("quantize", __name__)
