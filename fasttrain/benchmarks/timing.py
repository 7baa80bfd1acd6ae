"""Alternating rounds of several contestants, and the table of them."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Rounds of one contestant."""

    name: str
    rates: list[float]  # items a second, one a round
    cpu: list[float]  # CPU seconds of this process per 1,000 items, which other load on the machine disturbs less

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def alternate(contestants: dict[str, Callable[[], int]], rounds: int) -> list[Timing]:
    """Run each contestant once to warm up, then ``rounds`` times in turn; each returns how many items it did."""
    for run in contestants.values():
        run()
    timings = [Timing(name, [], []) for name in contestants]
    for _ in range(rounds):
        for timing, run in zip(timings, contestants.values(), strict=True):
            time.sleep(0.3)  # what another has under way ends
            wall, cpu = time.perf_counter(), time.process_time()
            items = run()
            timing.rates.append(items / (time.perf_counter() - wall))
            timing.cpu.append((time.process_time() - cpu) / items * 1000)
    return timings


def table(timings: list[Timing], unit: str) -> str:
    """Markdown: median, least and greatest rate, and CPU time."""
    lines = [f"| what | {unit}/s, median | least to greatest | CPU s per 1,000 |", "| --- | --- | --- | --- |"]
    for timing in timings:
        spread = f"{min(timing.rates):,.0f} to {max(timing.rates):,.0f}"
        lines.append(f"| {timing.name} | {timing.rate:,.0f} | {spread} | {statistics.median(timing.cpu):.3f} |")
    return "\n".join(lines)


def machine() -> str:
    """Hardware, versions and date, in one line."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        hardware = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"
    return f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}; {datetime.date.today()}"
