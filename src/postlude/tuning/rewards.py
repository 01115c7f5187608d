"""What answers are rewarded by: Python functions of a module or a file, and the rewards that come with Postlude.

A reward is a function

    def exact(completions: list[str], prompts: list[str], **columns) -> list[float]

that is handed, by name, what it asks for of ``completions``, ``prompts`` and the other columns of the data (each a list
of the same length); with ``**columns`` everything. It returns a finite number for each completion.

A reward may have *dimensions* (:class:`Dimensioned`): then it also says what each dimension got, and which characters
of an answer speak of it. :data:`NAMED` are those that are asked for by a name alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from postlude.errors import DataError, SettingsError, UnknownNameError
from postlude.tuning.speech_rewards import SPEECH_REWARDS

__all__ = [
    "GIVEN",
    "NAMED",
    "Dimensioned",
    "Reward",
    "RewardError",
    "find_reward",
    "parse_reward",
]

GIVEN = ("completions", "prompts")
"""Names that no column of the data may have."""

NAMED: Mapping[str, Callable[[str], Any]] = SPEECH_REWARDS
"""Rewards by name; each is made from the directory of a sentence encoder, empty where none was given."""

RewardFunction = Callable[..., Sequence[float]]


class RewardError(DataError):
    """A reward function that raised something."""


@runtime_checkable
class Dimensioned(Protocol):
    """A reward function that is a sum over dimensions.

    Attributes:
        dimensions: their names.
    """

    dimensions: tuple[str, ...]

    def __call__(self, completions: list[str], **columns: list[Any]) -> list[float]:
        """The sums."""

    def by_dimension(self, completions: list[str], **columns: list[Any]) -> list[list[float]]:
        """For each completion what each dimension got."""

    def segments(self, completion: str) -> Mapping[str, tuple[int, int]]:
        """Characters ``[start, end)`` that speak of a dimension; dimensions that nothing speaks of are left out."""

    def check(self, columns: Mapping[str, Any]) -> None:
        """Refuse the columns of a line that it cannot judge by."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function and how much it counts.

    Attributes:
        name: as it was asked for.
        function: see the top of this file.
        weight: that it is multiplied with.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0

    def digest(self) -> str | None:
        """A SHA-256 of its source file, so that a run is not resumed with another reward; None where there is none."""
        try:
            file = inspect.getsourcefile(self.function)
        except TypeError:
            return None
        if file is None or not os.path.isfile(file):
            return None
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def asks_for(self) -> tuple[set[str], set[str], bool]:
        """Names it needs, names it takes beside them, and whether it takes any.

        Raises:
            SettingsError: it does not take ``completions``, or takes something that cannot be given by name.
        """
        needs: set[str] = set()
        takes: set[str] = set()
        anything = False
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                anything = True
            elif parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                (needs if parameter.default is parameter.empty else takes).add(parameter.name)
        if not ("completions" in needs | takes or anything):
            raise SettingsError(
                f"The reward {self.name} takes {', '.join(sorted(needs | takes)) or 'nothing'}; expected a function "
                "(completions, prompts, **columns) that returns a number for each completion."
            )
        return needs, takes, anything

    def __call__(self, completions: list[str], columns: Mapping[str, list[Any]]) -> list[float]:
        """The rewards of some completions.

        Args:
            completions: texts.
            columns: ``prompts`` and the columns of the data, one value for each completion.

        Raises:
            DataError: not one finite number for each.
            RewardError: the function raised something.
        """
        needs, takes, anything = self.asks_for()
        given = {"completions": completions, **columns}
        if not anything:
            given = {name: values for name, values in given.items() if name in needs | takes}
        try:
            values = self.function(**given)
        except Exception as error:
            said = f": {error}" if str(error) else ""
            raise RewardError(
                f"The reward {self.name} raised {type(error).__name__}{said}{self._place(error)}. "
                "Mend it, and run the same command again."
            ) from error
        return self._checked(values, completions)

    def _place(self, error: Exception) -> str:
        """Where an error was raised: the innermost line of the file of the function."""
        try:
            home = inspect.getsourcefile(inspect.unwrap(self.function))
        except TypeError:
            return ""
        # The first frame is the call above.
        frames = traceback.extract_tb(error.__traceback__)[1:]
        line = next((one.lineno for one in reversed(frames) if one.filename == home), None)
        return "" if home is None or line is None else f" ({Path(home).name} line {line})"

    def _checked(self, values: Any, completions: list[str]) -> list[float]:
        values = values.tolist() if hasattr(values, "tolist") else values
        expected = "expected a list with one finite number for each completion"
        if not isinstance(values, list | tuple):
            raise DataError(
                f"The reward {self.name} returned a {type(values).__name__}; {expected}."
            )
        if len(values) != len(completions):
            raise DataError(
                f"The reward {self.name} returned {len(values)} numbers for {len(completions)} completions; {expected}."
            )
        for value, completion in zip(values, completions, strict=True):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(
                    f"The reward {self.name} returned {value!r} for the completion {completion[:80]!r}; {expected}."
                )
        return [float(value) for value in values]


def parse_reward(text: str, encoder: str = "") -> Reward:
    """``module:function``, ``path/file.py:function`` or a name, with ``=WEIGHT`` behind it where the weight is not 1.

    A module is looked for where Python finds it, the current directory first. A name alone is one of :data:`NAMED`.

    Args:
        text: that.
        encoder: directory of a sentence encoder, for the rewards that compare texts with one.

    Raises:
        SettingsError: another form, a module that cannot be imported, or a weight that is no finite number.
        UnknownNameError: no such module or function; carries the nearest names.
    """
    name, _, weight = text.partition("=")
    name = name.strip()
    module, _, function = name.rpartition(":")
    if name not in NAMED and not (module and function.isidentifier()):
        raise SettingsError(
            f"The reward {text!r} is not understood: expected module:function or file.py:function, for example "
            f"my_rewards:exact, with =0.5 behind it for a weight; or one of {', '.join(NAMED)}."
        )
    try:
        number = float(weight) if weight else 1.0
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SettingsError(
            f"The reward {text!r} has the weight {weight!r}; expected a finite number."
        )
    found = NAMED[name](encoder) if name in NAMED else find_reward(module, function)
    return Reward(name, found, number)


def find_reward(module: str, function: str) -> RewardFunction:
    """A function of a module or of a .py file; see :func:`parse_reward`."""
    home = _module_of_file(Path(module)) if module.endswith(".py") else _module(module)
    public = [
        name
        for name, value in vars(home).items()
        if callable(value) and not inspect.isclass(value) and not name.startswith("_")
    ]
    found = getattr(home, function, None)
    if not callable(found):
        raise UnknownNameError(f"reward function in {module}", function, public)
    return found


def _module(name: str) -> types.ModuleType:
    with _current_directory_first(), _nothing_written():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A module that is there and misses another is not unknown.
            if not f"{name}.".startswith(f"{error.name}."):
                raise _broken(name, error) from error
            here = [path.stem for path in Path.cwd().glob("*.py")]
            raise UnknownNameError(
                "module of rewards",
                name,
                here,
                "Looked in the current directory and where Python finds modules.",
            ) from error
        except (Exception, SystemExit) as error:
            raise _broken(name, error) from error


def _module_of_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        near = [one.name for one in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UnknownNameError(f"file of rewards in {path.parent.resolve()}", path.name, near)
    name = f"postlude_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"{path} cannot be read as a Python file.")
    module = importlib.util.module_from_spec(spec)
    # Data classes and others look their module up by name.
    sys.modules[name] = module
    try:
        with _nothing_written():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _broken(str(path), error) from error
    return module


@contextmanager
def _nothing_written() -> Iterator[None]:
    """Without compiled files beside a source that is only read here."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _broken(name: str, error: BaseException) -> SettingsError:
    return SettingsError(
        f"{name} holds rewards and cannot be imported: {type(error).__name__}: {error}"
    )


@contextmanager
def _current_directory_first() -> Iterator[None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(Path.cwd()))
