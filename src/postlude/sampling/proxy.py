"""A scheduler around another one, which pipelines take for that one.

Diffusers pipelines ask a scheduler for anything: they read its config, look at the signatures of its methods, save
it by its class, set attributes on it. So everything that a proxy does not do itself is its base's, also what
``isinstance`` and ``inspect.signature`` see. A proxy is no ``torch.nn.Module``: a pipeline takes its device from the
first one among its components.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

__all__ = ["SchedulerProxy", "plain_scheduler"]


class SchedulerProxy:
    """Everything is ``base``'s, but for the methods that a subclass names in ``overrides``.

    A method ``step`` is overridden by one called ``_step``. Saving a proxy saves ``base``.

    Attributes:
        base: the scheduler that does the work.
    """

    overrides: tuple[str, ...] = ()

    def __init__(self, base: Any) -> None:
        own = self.__dict__
        own["base"] = base
        # What pipelines write into their index: where the class of the scheduler is found again.
        own["__module__"] = type(base).__module__
        for name in self.overrides:
            own[name] = _disguised(getattr(self, f"_{name}"), getattr(base, name))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of ``base``; ``type`` tells the truth."""
        return type(self.__dict__["base"])

    def __getattr__(self, name: str) -> Any:
        if "base" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["base"], name, value)

    def __len__(self) -> int:
        return len(self.__dict__["base"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__dict__['base']!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerProxy:
        return self._twin(lambda value: copy.deepcopy(value, memo))

    def __copy__(self) -> SchedulerProxy:
        return self._twin(copy.copy)

    def _twin(self, copied: Callable[[Any], Any]) -> SchedulerProxy:
        """Another one of this class; methods are bound to it, not to this one."""
        twin = type(self).__new__(type(self))
        own = twin.__dict__
        for name, value in self.__dict__.items():
            if name not in self.overrides:
                own[name] = copied(value)
        for name in self.overrides:
            own[name] = _disguised(getattr(twin, f"_{name}"), getattr(own["base"], name))
        return twin


def plain_scheduler(scheduler: Any) -> Any:
    """What is inside all proxies."""
    while issubclass(type(scheduler), SchedulerProxy):
        scheduler = scheduler.base
    return scheduler


def _disguised(method: Callable[..., Any], base: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` with the name and signature of ``base``."""

    @functools.wraps(base)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call
