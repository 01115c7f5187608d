"""One file per family of token weights or objective; what they share is in ``weighting``, ``objective``, ``run``.

The settings class of every registered method can be imported from here: ``from postlude.tuning import PriFTMass``.
"""

from __future__ import annotations

from postlude import registry

__getattr__, __dir__ = registry.settings_of("tune", __name__)
