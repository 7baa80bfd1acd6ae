"""Mean and standard deviation of a figure over seeds, and the table that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Of n values."""

    mean: float
    sd: float | None  # √(Σ (x − mean)² / (n − 1)); None of one value
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.sd:.2f}" if self.sd is not None else "")


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def spreads(runs: Sequence[dict[str, Any]], *keys: str, of: str = "accuracy") -> dict[str, Any]:
    """``{value of the first key: {value of the second: … Spread}}`` over the runs that share them, in their order."""
    if not keys:
        return spread([run[of] for run in runs])  # type: ignore[return-value]
    first, *rest = keys
    return {
        value: spreads([run for run in runs if run[first] == value], *rest, of=of)
        for value in dict.fromkeys(run[first] for run in runs)
    }


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


__all__ = ["Spread", "aligned", "spread", "spreads"]
