"""Alternating rounds of several contestants, and the table of them."""

from __future__ import annotations

import io
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from fasttrain.benchmarks.memory import peak_memory

C = TypeVar("C")
ROUND_SECONDS = 0.2
"What a round of short steps should take at least."


class Report(NamedTuple):
    """What a benchmark has found so far."""

    text: str  # Markdown
    rows: list[dict[str, Any]]  # the same with every round, for the JSON file
    bars: dict[str, float]  # name -> length, for the chart
    unit: str  # of the bars; without one there is no chart
    passed: bool = True  # False where something was found wrong, not only slow


class Timing(NamedTuple):
    """Rounds of one contestant."""

    name: str
    rates: list[float]  # items a second, one a round
    cpu: list[float]  # CPU seconds per 1,000 items, of workers too: other load on the machine disturbs them less

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def alternate(contestants: dict[str, Callable[[], int]], rounds: int) -> Iterator[list[Timing]]:
    """Run each contestant once to warm up, then ``rounds`` times in turn; each returns how many items it did.

    Yields after every round.
    """
    for run in contestants.values():
        run()
    timings = {name: Timing(name, [], []) for name in contestants}
    for _ in range(rounds):
        for name, run in _turns(contestants, pause=0.3):  # what another's threads decode ahead ends
            wall, cpu = time.perf_counter(), cpu_seconds()
            items = run()
            timings[name].rates.append(items / (time.perf_counter() - wall))
            timings[name].cpu.append((cpu_seconds() - cpu) / items * 1000)
        yield list(timings.values())


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that live: a DataLoader's workers."""
    pids = [child.pid for child in multiprocessing.active_children()]
    return time.process_time() + sum(time.clock_gettime(_cpu_clock(pid)) for pid in pids)


def _cpu_clock(pid: int) -> int:
    """Linux's number for the clock of all CPU time of a process, as clock_getcpuclockid(3) makes it."""
    return ~pid << 3 | 2


def _turns(contestants: Mapping[str, C], pause: float) -> Iterator[tuple[str, C]]:
    for turn in contestants.items():
        time.sleep(pause)
        yield turn


class Stopwatch:
    """Time of the parts of what runs on ``device``: by CUDA events, which nothing waits for, or by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Forget the parts; the first begins now."""
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, part: str) -> None:
        """What ran since the last mark was of ``part``."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part, summed over its marks."""
        if self._gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, began), (part, ended) in zip(self._marks, self._marks[1:], strict=False):
            passed = began.elapsed_time(ended) / 1000 if self._gpu else ended - began
            seconds[part] = seconds.get(part, 0.0) + passed
        return seconds

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def marked(run: Callable[[], object]) -> Callable[[Stopwatch], None]:
    """A contestant of a single part."""

    def step(stopwatch: Stopwatch) -> None:
        run()
        stopwatch.mark("all")

    return step


class StepTiming(NamedTuple):
    """Rounds of one step."""

    name: str
    parts: list[dict[str, float]]  # seconds a step of each part, one mapping a round
    cpu: list[float]  # CPU seconds of this process a step, which other load on the machine disturbs less; [] on a GPU
    memory: int | None = None  # peak bytes beyond those held before the step, where asked for

    @property
    def rounds(self) -> list[float]:
        """Seconds a step."""
        return [sum(parts.values()) for parts in self.parts]

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    def over(self, other: StepTiming) -> float:
        """This time over that one."""
        return self.seconds / other.seconds

    def cpu_over(self, other: StepTiming) -> float | None:
        """The same in CPU time; ``None`` on a GPU."""
        return statistics.median(self.cpu) / statistics.median(other.cpu) if self.cpu else None

    @property
    def spread(self) -> str:
        return f"{1000 * min(self.rounds):,.1f} to {1000 * max(self.rounds):,.1f}"

    def shares(self) -> dict[str, float]:
        """Median share of each part in its round."""
        rounds = list(zip(self.parts, self.rounds, strict=True))
        return {part: statistics.median(parts[part] / whole for parts, whole in rounds) for part in self.parts[0]}

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"seconds": self.seconds, "shares": self.shares()}


class Standing(NamedTuple):
    """Where contestants stand after a round."""

    timings: dict[str, StepTiming]
    refusals: dict[str, str]  # who left, and why


def alternate_steps(
    contestants: Mapping[str, Callable[[Stopwatch], None]],
    rounds: int,
    steps: int | None,
    device: torch.device,
    memory: bool = False,
    needed: Collection[str] = (),
    before_round: Callable[[], None] = lambda: None,
) -> Iterator[Standing]:
    """Run each contestant once to warm up, then ``rounds`` times in turn; each marks its parts.

    Yields after every round. One that raises a RuntimeError, out of memory say, leaves.

    Args:
        steps: of each contestant a round; ``None``: as many as take 0.2 s, up to 100.
        memory: whether to find each one's peak memory, in a run that is not timed.
        needed: whose failure is raised.
        before_round: called, untimed, before the warm-up and every round.
    """
    stopwatch = Stopwatch(device)
    timings = {name: StepTiming(name, [], []) for name in contestants}
    refusals: dict[str, str] = {}
    counts = dict.fromkeys(contestants, steps or 1)

    def attempt(name: str, run: Callable[[], None]) -> None:
        if (refusal := refused(run, raises=name in needed)) is not None:
            refusals[name] = refusal
            del timings[name]

    def try_out(name: str) -> None:
        def once() -> None:
            stopwatch.start()
            contestants[name](stopwatch)

        if memory:
            timings[name] = timings[name]._replace(memory=peak_memory(once, device))
        else:
            once()
        if steps is None:
            counts[name] = min(math.ceil(ROUND_SECONDS / sum(stopwatch.read().values())), 100)

    def take(name: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        cpu = time.process_time()
        stopwatch.start()
        for _ in range(counts[name]):
            contestants[name](stopwatch)
        parts = stopwatch.read()
        cpu = time.process_time() - cpu
        timings[name].parts.append({part: seconds / counts[name] for part, seconds in parts.items()})
        if device.type == "cpu":
            timings[name].cpu.append(cpu / counts[name])

    before_round()
    for name, step in contestants.items():
        attempt(name, partial(step, stopwatch))
    for name in list(timings) if memory or steps is None else ():
        attempt(name, partial(try_out, name))
    for _ in range(rounds):
        before_round()
        for name, _ in _turns(dict(timings), pause=0.03):
            attempt(name, partial(take, name))
        yield Standing(dict(timings), dict(refusals))


def refused(run: Callable[[], object], raises: bool = False) -> str | None:
    """Why ``run`` does not run, out of memory or without a second derivative say; ``None`` where it does.

    Raises:
        RuntimeError: that, if ``raises``.
    """
    try:
        run()
        return None
    except RuntimeError as error:  # torch's OutOfMemoryError is one
        if raises:
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of what it held, now that its frames are gone
    return reason


class Comparison(NamedTuple):
    """One contestant against the plain way to the same result."""

    ours: str
    reference: str
    agrees: bool
    evidence: str  # how far the results are from each other

    def sentence(self, timings: Mapping[str, StepTiming]) -> str:
        """The speed-up, or, where the results differ, that instead."""
        if not self.agrees:
            return f"{self.ours} DOES NOT MATCH {self.reference}: {self.evidence}; no speed-up is given"
        ours, theirs = timings[self.ours], timings[self.reference]
        by_cpu = theirs.cpu_over(ours)
        by_cpu = "" if by_cpu is None else f", {by_cpu:.2f} by CPU time"
        return f"{self.ours}: {theirs.over(ours):.2f} times as fast as {self.reference}{by_cpu} ({self.evidence})"


def bars(values: Mapping[str, float], unit: str) -> bytes:
    """Horizontal bars, the first on top, as a PNG. Of names "group\\nname" in a row the group is shown once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [name.rpartition("\n")[0] for name in values]
    labels = [
        name.removeprefix(f"{group}\n") if group == before else name
        for name, group, before in zip(values, groups, ["", *groups], strict=False)
    ]
    figure, axis = pyplot.subplots(figsize=(9, 0.8 + 0.35 * len(values)), layout="constrained")
    drawn = axis.barh(range(len(values)), list(values.values()), tick_label=labels)
    axis.bar_label(drawn, fmt="{:,.3g}", padding=3)
    axis.tick_params("y", labelsize="small")
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.01)
    axis.set_xlabel(unit)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return picture.getvalue()


def table(timings: list[Timing], unit: str, gives: Mapping[str, str]) -> str:
    """Markdown: median, least and greatest rate, CPU time, and what each gives."""
    lines = [
        f"| what | {unit}/s, median | least to greatest | CPU s per 1,000 | gives |",
        "| --- | --- | --- | --- | --- |",
    ]
    for timing in timings:
        name, cpu = timing.name, statistics.median(timing.cpu)
        spread = f"{min(timing.rates):,.0f} to {max(timing.rates):,.0f}"
        lines.append(f"| {name} | {timing.rate:,.0f} | {spread} | {cpu:.3f} | {gives[name]} |")
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    """With a prefix: 34.4 GFLOP."""
    power = min(int(math.log10(value)) // 3, 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"
