"""One file per target that a checkpoint leaves for; what they share is in ``engine``.

The settings class of every registered target can be imported from here: ``from postlude.exporting import GGUF``.
"""

from __future__ import annotations

from postlude import registry

__getattr__, __dir__ = registry.settings_of("export", __name__)
