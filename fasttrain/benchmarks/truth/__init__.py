"""What a machine says of fasttrain in a few minutes: what is there, what is right, what waits, what a step takes.

A section is a generator of :class:`~fasttrain.benchmarks.truth.row.Row`; one that fails does not take the others with
it. On a CPU everything runs at tiny sizes, to see that it runs.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from pydantic import Field

from fasttrain import distributed
from fasttrain.benchmarks.timing import Report
from fasttrain.benchmarks.truth.cases import Kind
from fasttrain.benchmarks.truth.colours import colours
from fasttrain.benchmarks.truth.facts import facts
from fasttrain.benchmarks.truth.graph import graph
from fasttrain.benchmarks.truth.kernels import kernels
from fasttrain.benchmarks.truth.row import Row
from fasttrain.benchmarks.truth.steps import modes, steps
from fasttrain.benchmarks.truth.waits import waits
from fasttrain.config import Config

Section = Literal["facts", "kernels", "waits", "colours", "modes", "steps", "graph"]


class TruthConfig(Config):
    """Which sections, of which steps."""

    sections: tuple[Section, ...] = get_args(Section)
    "which, in this order"
    steps: tuple[Kind, ...] = Field(get_args(Kind), min_length=1)
    "the kinds of step that are looked at"


def tell_truth(config: TruthConfig, rounds: int) -> Iterator[Report]:
    """Every section's rows as they come; a row that says what is wrong has not passed.

    Args:
        rounds: windows of steps that are timed.
    """
    device = distributed.initialize("auto")
    sections: dict[Section, Callable[[], Iterator[Row]]] = {
        "facts": facts,
        "kernels": lambda: kernels(device),
        "waits": lambda: waits(device, config.steps),
        "colours": lambda: colours(device),
        "modes": lambda: modes(device),
        "steps": lambda: steps(device, config.steps, rounds),
        "graph": lambda: graph(device, config.steps, rounds),
    }
    found: list[tuple[Section, Row]] = []
    for name in config.sections:
        began = time.perf_counter()
        for row in _to_its_end(sections[name]()):
            found.append((name, row))
            print(f"{name}: {row.line()}", file=sys.stderr, flush=True)
            yield _report(found)
        print(f"{name}: took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _to_its_end(section: Iterator[Row]) -> Iterator[Row]:
    """Its rows, and its failure as the last of them."""
    try:
        yield from section
    except Exception as error:
        traceback.print_exc()
        yield Row("fails", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False)


def _report(found: list[tuple[Section, Row]]) -> Report:
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        lines += [f"### {name.capitalize()}\n", *(f"- {row.line()}" for section, row in found if section == name), ""]
    rows = [{"section": name} | row.numbers() for name, row in found]
    rates = {row.name: row.data["views_per_second"] for name, row in found if name == "steps" and row.data}
    passed = all(row.passed is not False for _, row in found)
    return Report("\n".join(lines).rstrip(), rows, rates, "views/s" if rates else "", passed)


__all__ = ["Section", "TruthConfig", "tell_truth"]
