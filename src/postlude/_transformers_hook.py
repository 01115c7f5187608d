"""Registers Postlude's checkpoint format with transformers as soon as transformers can take it.

``AutoModelForCausalLM.from_pretrained`` looks a quantized checkpoint's format up in the tables of
``transformers.quantizers``. Importing transformers only to fill in one line of those tables would cost every
``import postlude`` seconds, so a finder on ``sys.meta_path`` waits for that package instead. It never loads
anything itself: it lets the ordinary finders answer and runs one function after the package was executed.

The package is watched rather than its module ``auto``, which holds the tables: when ``auto`` has just been
executed its package is still half made, and ``from transformers.quantizers import HfQuantizer`` would fail.

The module that registers imports that package itself. Whoever imports it first therefore meets the hook while it
is half made; then the finder waits for its end as well.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["REGISTRAR", "WATCHED", "install"]

WATCHED = "transformers.quantizers"
REGISTRAR = "postlude.surgery.huggingface"


def install() -> None:
    """Have ``register()`` of the module ``REGISTRAR`` called after ``WATCHED`` was imported.

    Called at once when that import has already happened. Installing twice changes nothing; the function is
    called again only if transformers itself is loaded again, with empty tables.
    """
    if any(getattr(finder, "_is_postlude_hook", False) for finder in sys.meta_path):
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    if WATCHED in sys.modules:
        finder.register()


class _Finder(MetaPathFinder):
    """Finds nothing but ``WATCHED`` and ``REGISTRAR``, and those through the other finders."""

    _is_postlude_hook = True

    def __init__(self) -> None:
        self.waits_for_registrar = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (WATCHED, REGISTRAR):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def executed(self, name: str) -> None:
        """A watched module has just been executed."""
        if name == WATCHED:
            self.register()
        elif self.waits_for_registrar:
            self.register(registrar_executed=True)

    def register(self, registrar_executed: bool = False) -> None:
        """Call ``register()`` of ``REGISTRAR``, now or when that module has been executed."""
        # A failure here must not take transformers away from a program that imported Postlude for
        # something else, and must not stay unseen either.
        try:
            registrar = importlib.import_module(REGISTRAR)
            half_made = getattr(registrar.__spec__, "_initializing", False)
            self.waits_for_registrar = half_made and not registrar_executed
            if not self.waits_for_registrar:
                registrar.register()
        except Exception as error:  # noqa: BLE001
            warnings.warn(
                f"Postlude could not register its checkpoint format with transformers, so quantized "
                f"checkpoints will not load through from_pretrained: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


class _Loader(Loader):
    """Steps aside for the loader it wraps, then tells the finder."""

    def __init__(self, wrapped: Loader, finder: _Finder) -> None:
        self.wrapped = wrapped
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # inspect, linecache and importlib.resources ask the module's own loader.
        module.__loader__ = self.wrapped
        if module.__spec__ is not None:
            module.__spec__.loader = self.wrapped
        self.wrapped.exec_module(module)
        self.finder.executed(module.__name__)
