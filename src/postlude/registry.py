"""One registration per method: what it is called, which verb runs it, which paper it implements.

A method file registers its settings class and nothing else is edited: the command line, the catalogue in
the documentation and the test battery read this registry. The packages of a verb are imported when the
registry is first asked about that verb, so ``import postlude`` stays light.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any, TypeVar

from postlude.errors import UnknownNameError

__all__ = ["MethodInfo", "available", "find", "info_of", "method", "settings_of"]

T = TypeVar("T", bound=type)

# A verb finds its methods in the files of these packages.
PACKAGES = {
    "inspect": "postlude.inspection",
    "quantize": "postlude.quantization",
    "tune": "postlude.tuning",
    "attribute": "postlude.attribution",
    "export": "postlude.exporting",
    "sample": "postlude.sampling",
    "fit": "postlude.zoo.smn",
}


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of one method.

    Attributes:
        verb: the front-door function that runs it.
        name: its published name, in lower case.
        family: the rule or engine it is a setting of.
        paper: source, for example ``"arXiv:2606.07116"``; empty for folklore.
        needs: what it must be given beside the model, for example ``("calibration",)``.
        settings: the frozen dataclass of its hyper-parameters.
    """

    verb: str
    name: str
    family: str
    paper: str
    needs: tuple[str, ...]
    settings: type

    @property
    def summary(self) -> str:
        """First line of the settings class's docstring."""
        return (inspect.getdoc(self.settings) or "").split("\n", 1)[0]

    @property
    def options(self) -> dict[str, Any]:
        """Hyper-parameters and their defaults, in order."""
        if not dataclasses.is_dataclass(self.settings):
            return {}
        empty = dataclasses.MISSING
        return {
            field.name: field.default if field.default is not empty else None
            for field in dataclasses.fields(self.settings)
        }

    @property
    def meanings(self) -> dict[str, str]:
        """What each hyper-parameter is, by name: the ``Attributes`` in the docstrings of the class and its bases."""
        found: dict[str, str] = {}
        for one in reversed(self.settings.__mro__):
            text = inspect.cleandoc(one.__dict__.get("__doc__") or "")
            for section in _SECTION.findall(text):
                for names, meaning in _ENTRY.findall(section):
                    found.update(dict.fromkeys(names.split(", "), " ".join(meaning.split())))
        return {name: found.get(name, "") for name in self.options}


# The entries of a section of a docstring, and one with the lines that go on with it.
_SECTION = re.compile(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w[\w, ]*): (.*(?:\n      +.*)*)", re.MULTILINE)

_METHODS: dict[tuple[str, str], MethodInfo] = {}


def method(
    verb: str, name: str, *, family: str, paper: str = "", needs: tuple[str, ...] = ()
) -> Callable[[T], T]:
    """Register the decorated settings class as a method of ``verb``.

    Raises:
        ValueError: the verb has no package, or the name is taken.
    """
    if verb not in PACKAGES:
        raise ValueError(f"verb {verb!r} has no package; known verbs: {', '.join(PACKAGES)}")

    def register(settings: T) -> T:
        key = (verb, name)
        taken = _METHODS.get(key)
        if taken and taken.settings.__qualname__ != settings.__qualname__:
            raise ValueError(f"{verb} method {name!r} is already {taken.settings.__qualname__}")
        _METHODS[key] = MethodInfo(verb, name, family, paper, needs, settings)
        return settings

    return register


def _import_methods(verb: str) -> None:
    package = importlib.import_module(PACKAGES[verb])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def available(verb: str | None = None) -> list[MethodInfo]:
    """Every registered method, of one verb or of all, ordered by verb, family and name."""
    for one in [verb] if verb else list(PACKAGES):
        if one not in PACKAGES:
            raise UnknownNameError("verb", one, PACKAGES)
        _import_methods(one)
    found = [info for info in _METHODS.values() if verb in (None, info.verb)]
    return sorted(found, key=lambda info: (info.verb, info.family, info.name))


def find(verb: str, name: str) -> MethodInfo:
    """The method called ``name``.

    Raises:
        UnknownNameError: no such method; the message carries the nearest names.
    """
    methods = {info.name: info for info in available(verb)}
    if name not in methods:
        raise UnknownNameError(
            f"{verb} method", name, methods, "`postlude methods` lists them all."
        )
    return methods[name]


def info_of(settings: object) -> MethodInfo:
    """The registration of a settings object, for example ``OffQ(...)``."""
    for info in _METHODS.values():
        if info.settings is type(settings):
            return info
    known = [info.settings.__name__ for info in _METHODS.values()]
    raise UnknownNameError("registered method", type(settings).__name__, known)


def settings_of(verb: str, module: str) -> tuple[Callable[[str], type], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a verb's package: the settings class of every registered method.

    They keep the package light: its files are imported when the first class is asked for.
    """

    def get(name: str) -> type:
        # The import system asks a package for `__path__` and for its modules while they are being imported.
        if name[:1].isupper():
            for info in available(verb):
                if info.settings.__name__ == name:
                    return info.settings
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted(info.settings.__name__ for info in available(verb))

    return get, names
