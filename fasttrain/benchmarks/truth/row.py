"""What a section says, a row at a time."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One thing that was looked at."""

    name: str
    says: str
    passed: bool | None = None  # None where nothing is right or wrong
    data: Mapping[str, Any] = MappingProxyType({})  # the same and more as numbers

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "passed": self.passed, "says": self.says, **self.data}

    def line(self) -> str:
        mark = {True: "ok, ", False: "FAILS, ", None: ""}[self.passed]
        return f"{mark}{self.name}: {self.says}"


__all__ = ["Row"]
