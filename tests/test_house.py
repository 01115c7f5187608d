"""The promises of the package as a whole: public names, what an import loads, the registry, the docs."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import postlude
from postlude import errors, registry
from postlude.errors import UnknownNameError

ROOT = Path(__file__).resolve().parent.parent


def test_public_names() -> None:
    expected = {
        "PostludeError",
        "__version__",
        "attribute",
        "errors",
        "evaluate",
        "evaluate_lds",
        "evaluate_pose",
        "evaluate_retrieval",
        "evaluate_samples",
        "evaluate_speech",
        "explain",
        "export",
        "fit",
        "generate",
        "inspect",
        "load",
        "quantize",
        "render",
        "run",
        "sample",
        "sample_calibrate",
        "tune",
        "tune_prior",
    }
    assert set(postlude.__all__) == expected
    assert dir(postlude) == sorted(expected)


def test_verbs_come_from_the_front_door() -> None:
    from postlude import _front_door

    for name in (
        "attribute",
        "evaluate",
        "evaluate_lds",
        "evaluate_retrieval",
        "export",
        "generate",
        "inspect",
        "load",
        "quantize",
        "tune",
    ):
        assert getattr(postlude, name) is getattr(_front_door, name)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        postlude.quantise  # noqa: B018


def loaded_by(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` after a statement in a fresh interpreter."""
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_import_is_light() -> None:
    heavy = {"transformers", "diffusers", "peft", "trl", "matplotlib", "onnx"}
    # Not promised, but so: neither is PyTorch, nor anything else that is not Python's own.
    heavy |= {"torch", "numpy", "tokenizers", "safetensors", "pydantic", "rich", "typer"}
    assert not loaded_by("import postlude") & heavy


def test_import_loads_only_these_modules_of_ours() -> None:
    script = "import sys, postlude; print(*(m for m in sys.modules if m.startswith('postlude')))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == {
        "postlude",
        "postlude._transformers_hook",
        "postlude.errors",
    }


def test_command_line_is_light() -> None:
    assert not loaded_by("import postlude.cli") & {"torch", "transformers", "numpy", "pydantic"}


def test_methods_are_listed_without_transformers() -> None:
    """A wrong setting is refused, and `postlude methods` answers, before what takes seconds to import."""
    assert "transformers" not in loaded_by(
        "from postlude import registry; registry.find('quantize', 'gptq')"
    )


def test_version_is_in_the_changelog_or_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in text or f"## {postlude.__version__}" in text


def test_constraints_pin_every_core_dependency() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["dev"] + extras["tune"]
    names = {re.split(r"[<>=!~\[ ]", word)[0].lower() for word in asked}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    assert names - {"postlude"} <= pinned


def test_error_tree() -> None:
    found = [getattr(errors, name) for name in errors.__all__]
    for error in (one for one in found if isinstance(one, type)):
        assert issubclass(error, errors.PostludeError)
        if issubclass(error, errors.InputError):
            assert error.exit_code == 2
    assert errors.MissingDependencyError.exit_code == 2


def test_method_catalogue_is_current() -> None:
    from postlude.cli.catalogue import catalogue

    committed = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert committed == catalogue(), "docs/methods.md is out of date: run `make docs`"


def test_every_method_is_documented() -> None:
    for info in registry.available():
        assert info.summary, f"{info.verb} {info.name} has no docstring"
        unsaid = [name for name, meaning in info.meanings.items() if not meaning]
        assert not unsaid, f"{info.verb} {info.name}: what are {unsaid}? Say it under Attributes"
        # A data class without a docstring is given its own signature as one.
        assert not info.summary.startswith(f"{info.settings.__name__}("), info.name
        assert info.family
        assert re.fullmatch(r"(arXiv:\d{4}\.\d{4,5}(, )?)*", info.paper), info.paper


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, str], object]]:
    """A registry of its own, of the verb quantize, with nothing to import."""
    known: dict[tuple[str, str], registry.MethodInfo] = {}
    monkeypatch.setattr(registry, "_METHODS", known)
    monkeypatch.setattr(registry, "_import_methods", lambda verb: None)

    for name in ("smooth", "gptq"):

        @registry.method("quantize", name, family="f", paper="arXiv:2210.17323", needs=("x",))
        @dataclasses.dataclass(frozen=True)
        class Settings:
            """What it does.

            More.
            """

            bits: int = 4
            words: list[str] = dataclasses.field(default_factory=list)

        Settings.__qualname__ = name
    yield known


@pytest.mark.usefixtures("methods")
class TestRegistry:
    def test_find(self) -> None:
        info = registry.find("quantize", "gptq")
        assert (info.verb, info.name, info.family) == ("quantize", "gptq", "f")
        assert (info.paper, info.needs, info.summary) == (
            "arXiv:2210.17323",
            ("x",),
            "What it does.",
        )
        assert info.options["bits"] == 4
        assert registry.info_of(info.settings()) is info

    def test_available_is_ordered(self) -> None:
        assert [info.name for info in registry.available()] == ["gptq", "smooth"]
        assert [info.name for info in registry.available("quantize")] == ["gptq", "smooth"]
        assert registry.available("inspect") == []

    def test_unknown_name_offers_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match=r"'gtpq'\. Did you mean 'gptq'\?") as caught:
            registry.find("quantize", "gtpq")
        assert caught.value.nearest == ["gptq"]
        assert "postlude methods" in str(caught.value)

    def test_a_name_like_no_other_lists_all(self) -> None:
        with pytest.raises(UnknownNameError, match="Known: gptq, smooth"):
            registry.find("quantize", "zzzzzzz")

    def test_unknown_verb(self) -> None:
        with pytest.raises(UnknownNameError, match=r"No verb named 'quantise'.*'quantize'"):
            registry.available("quantise")
        with pytest.raises(ValueError, match="has no package"):
            registry.method("quantise", "x", family="f")

    def test_unregistered_settings(self) -> None:
        with pytest.raises(UnknownNameError, match="No registered method named 'object'"):
            registry.info_of(object())

    def test_a_name_is_given_once(self) -> None:
        with pytest.raises(ValueError, match="'gptq' is already gptq"):

            @registry.method("quantize", "gptq", family="f")
            class Other:
                """Another."""

    def test_the_same_class_may_come_again(self) -> None:
        # As when a module is reloaded.
        before = registry.find("quantize", "gptq")
        registry.method("quantize", "gptq", family="f")(before.settings)
        assert registry.find("quantize", "gptq").settings is before.settings
