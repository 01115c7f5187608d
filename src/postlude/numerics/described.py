"""Families of frozen dataclasses that are kept as small dictionaries: the name of a kind, and its fields."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from postlude.errors import SettingsError

__all__ = ["Described"]


@dataclasses.dataclass(frozen=True)
class Described(ABC):
    """What the base of such a family is derived from, with its name: ``class Format(Described, noun="number format")``.

    Attributes:
        kind: the name of a class; a class without one of its own only serves as a base.
        kinds: the classes of the family, by that name.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Any]]]
    _noun: ClassVar[str]

    def __init_subclass__(cls, noun: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if noun:
            cls._noun, cls.kinds = noun, {}
        if "kind" in cls.__dict__:
            cls.kinds[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` makes the same one from."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The member of the family that a dictionary describes.

        Raises:
            SettingsError: its kind is not known, or its fields are refused.
        """
        fields = dict(data)
        kind = fields.pop("kind", None)
        if kind not in cls.kinds:
            raise SettingsError(
                f"{cls._noun} {kind!r} is not known to this version; known: {', '.join(sorted(cls.kinds))}"
            )
        made: Self = cls.kinds[kind](**fields)
        return made
