from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from postlude import _transformers_hook


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package like transformers.quantizers: its ``__init__`` re-exports from ``auto``."""
    name = "hooked_package"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("from .auto import TABLE\nREADY = True\n")
    (folder / "auto.py").write_text("TABLE = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not _is_hook(f)])
    monkeypatch.setattr(_transformers_hook, "WATCHED", name)
    yield name
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def registrar(package: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A stand-in for the module that registers; notes whether the package was complete by then."""
    calls: list[bool] = []
    module = ModuleType("fake_registrar")
    module.register = lambda: calls.append(  # type: ignore[attr-defined]
        getattr(sys.modules[package], "READY", False)
    )
    monkeypatch.setitem(sys.modules, "fake_registrar", module)
    monkeypatch.setattr(_transformers_hook, "REGISTRAR", "fake_registrar")
    return calls


def _is_hook(finder: object) -> bool:
    return getattr(finder, "_is_postlude_hook", False)


def test_registers_once_the_package_is_complete(package: str, registrar: list[bool]) -> None:
    _transformers_hook.install()
    assert registrar == []
    importlib.import_module(f"{package}.auto")
    assert registrar == [True]
    importlib.import_module(package)
    assert registrar == [True]


def test_registers_at_once_when_it_came_too_late(package: str, registrar: list[bool]) -> None:
    importlib.import_module(package)
    _transformers_hook.install()
    assert registrar == [True]


def test_installing_twice_changes_nothing(package: str, registrar: list[bool]) -> None:
    _transformers_hook.install()
    _transformers_hook.install()
    assert sum(map(_is_hook, sys.meta_path)) == 1
    importlib.import_module(package)
    _transformers_hook.install()
    assert registrar == [True]


def test_a_reloaded_package_is_registered_again(package: str, registrar: list[bool]) -> None:
    _transformers_hook.install()
    importlib.reload(importlib.import_module(package))
    assert registrar == [True, True]


def test_the_module_keeps_its_own_loader(package: str, registrar: list[bool]) -> None:
    _transformers_hook.install()
    module = importlib.import_module(package)
    plain = importlib.import_module(f"{package}.auto")
    assert type(module.__loader__) is type(plain.__loader__)
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert "READY" in inspect.getsource(module)


def test_a_registrar_that_is_imported_first(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports the package, which calls the hook, which finds it half made."""
    (tmp_path / "first_registrar.py").write_text(
        f"from {package}.auto import TABLE\n"
        "def register():\n"
        "    TABLE['calls'] = TABLE.get('calls', 0) + 1\n"
    )
    monkeypatch.setattr(_transformers_hook, "REGISTRAR", "first_registrar")
    monkeypatch.delitem(sys.modules, "first_registrar", raising=False)
    _transformers_hook.install()
    registrar = importlib.import_module("first_registrar")
    assert registrar.TABLE == {"calls": 1}
    importlib.import_module(package)
    assert registrar.TABLE == {"calls": 1}
    assert registrar.__spec__ is not None
    assert type(registrar.__spec__.loader) is type(registrar.__loader__)
    del sys.modules["first_registrar"]


def test_a_missing_package_is_reported_as_ever(
    registrar: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transformers_hook, "WATCHED", "no_such_package")
    _transformers_hook.install()
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        importlib.import_module("no_such_package")
    assert registrar == []


def test_a_package_that_fails_to_import_is_not_registered(
    package: str, registrar: list[bool], tmp_path: Path
) -> None:
    (tmp_path / package / "auto.py").write_text("raise ValueError('broken')\n")
    _transformers_hook.install()
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(package)
    assert registrar == []


def test_a_failing_registration_warns_and_leaves_the_package_usable(
    package: str, registrar: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise TypeError("a table has moved")

    monkeypatch.setattr(sys.modules["fake_registrar"], "register", fail)
    _transformers_hook.install()
    with pytest.warns(RuntimeWarning, match="could not register .* TypeError: a table has moved"):
        module = importlib.import_module(package)
    assert module.READY


# That a checkpoint opens in a process of its own, which needs this, is tested with the quantizers.
@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "postlude, transformers.modeling_utils",
        "transformers.quantizers, postlude",
        "postlude.surgery.huggingface",
    ],
)
def test_transformers_itself(imports: str) -> None:
    script = f"""
        import warnings
        warnings.simplefilter("error", RuntimeWarning)
        import {imports}
        from transformers.quantizers import AutoHfQuantizer
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        assert len(AUTO_QUANTIZER_MAPPING) > 5
        assert "postlude" in AUTO_QUANTIZER_MAPPING
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
