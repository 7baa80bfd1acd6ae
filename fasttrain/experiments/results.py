"""What is there: which jobs are done, and the values that tables show of their results."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.errors import UsageError
from fasttrain.experiments.commands import Job


class Value(NamedTuple):
    """A cell: mean and standard deviation (with n − 1; None of one value) of n values."""

    mean: float
    sd: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.sd:.2f}" if self.sd is not None else "")


def is_done(job: Job, jobs: dict[str, Job]) -> bool:
    """Whether what the very command gives is there, made of what it needs as that is now.

    A run says so in its ``environment.json``; an evaluation's file holds its command and its date, which is not before
    those of what it was made of.
    """
    when = done_at(job)
    if when is None:
        return False
    before = [done_at(jobs[name]) for name in job.needs if name in jobs]
    return all(needed is not None and needed <= when for needed in before) if not job.is_run else True


def done_at(job: Job) -> str | None:
    """When (ISO 8601, UTC) this command was done; None: it was not, or another command was."""
    if job.is_run:
        facts = read(job.result / "environment.json")
        there = (job.result / "encoder.safetensors").is_file()
        return facts.get("done") if there and facts.get("arguments") == job.arguments else None
    facts = read(job.result)
    return facts.get("date") if _arguments(facts.get("command")) == job.arguments else None


def _arguments(command: Any) -> list[str] | None:
    if not isinstance(command, str):
        return None
    try:
        return shlex.split(command)[1:]
    except ValueError:  # no shell would read it
        return None


def read(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def value_of(found: Sequence[dict[str, Any]], way: str, factor: float = 1.0) -> Value | None:
    """The values at ``way`` in results, together: of several numbers their mean and deviation; None: there is none.

    Args:
        found: the results.
        way: as :class:`~fasttrain.experiments.recipe.ColumnRecipe` says it.
        factor: on all of them.

    Raises:
        UsageError: what stands there is no number.
    """
    leaves = [leaf for one in found for leaf in at(one, way.split("/"))]
    spreads = [leaf for leaf in leaves if isinstance(leaf, dict) and {"mean", "sd", "n"} <= leaf.keys()]
    if len(spreads) == 1 == len(leaves) and spreads[0]["mean"] is not None:
        sd = spreads[0]["sd"]
        return Value(factor * spreads[0]["mean"], None if sd is None else abs(factor) * sd, spreads[0]["n"])
    numbers = []
    for leaf in leaves:
        leaf = leaf["mean"] if leaf in spreads else leaf
        if leaf is None or (isinstance(leaf, float) and not math.isfinite(leaf)):
            return None  # what was not finite, or was never reached
        if isinstance(leaf, bool) or not isinstance(leaf, int | float):
            raise UsageError(f"'{way}' leads to {str(leaf)[:60]!r}, which is no number: mend the table's value")
        numbers.append(factor * leaf)
    if not numbers:
        return None
    return Value(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def at(value: Any, way: Sequence[str]) -> Iterator[Any]:
    """All that stands at the end of ``way``; a key may itself have a / in it."""
    if not way:
        yield value
        return
    taken = 1
    if isinstance(value, dict):
        taken = next((n for n in range(len(way), 1, -1) if "/".join(way[:n]) in value), 1)
    for below in _step(value, "/".join(way[:taken])):
        yield from at(below, way[taken:])


def _step(value: Any, part: str) -> Iterator[Any]:
    if isinstance(value, list):
        key, equals, wanted = part.partition("=")
        if equals:
            yield from (one for one in value if isinstance(one, dict) and _same(one.get(key), wanted))
        elif part == "*":
            yield from value
        elif part.lstrip("-").isdecimal() and -len(value) <= int(part) < len(value):
            yield value[int(part)]
    elif isinstance(value, dict):
        key, at_sign, where = part.partition("@")
        other, _, wanted = where.partition("=")
        if part in value:
            yield value[part]
        elif at_sign and isinstance(value.get(key), list) and isinstance(value.get(other), list):
            pairs = zip(value[key], value[other], strict=False)
            yield from (one for one, standing in pairs if _same(standing, wanted))
        elif part == "*":
            yield from value.values()
        elif part.startswith("#") and part[1:].isdecimal() and int(part[1:]) < len(value):
            yield list(value.values())[int(part[1:])]


def _same(value: Any, text: str) -> bool:
    """Whether a value is what the text says: numbers by their size."""
    try:
        return not isinstance(value, bool) and math.isclose(float(value), float(text), rel_tol=1e-9)
    except (TypeError, ValueError):
        return str(value) == text


__all__ = ["Value", "at", "done_at", "is_done", "read", "value_of"]
