"""One file per method; what they share is in ``engine``, ``index`` and ``curvature``.

The settings class of every registered method can be imported from here: ``from postlude.attribution import LoRIF``.
"""

from __future__ import annotations

from postlude import registry

__getattr__, __dir__ = registry.settings_of("attribute", __name__)
