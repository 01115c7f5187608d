"""Diffusion samplers, and what corrects them for an approximate denoiser.

The settings class of every registered correction can be imported from here: ``from postlude.sampling import QDrift``.
"""

from __future__ import annotations

from postlude import registry

__getattr__, __dir__ = registry.settings_of("sample", __name__)
