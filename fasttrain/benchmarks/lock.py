"""How much of the interpreter's lock a loader takes: a thread that launches small operations, beside each kind.

The launching thread does what a training step does when the device is faster than Python. Its rate leaves out the time
in which it could run and had no core, as Linux counts it: what is left is the wait for the lock, so that a machine with
few cores, or a busy one, shows the same ratios. The loader beside it runs as fast as it can, which is the most that it
can take; a step that takes its batches slower loses less. DALI's reads files without a manifest one by one in the first
epoch, which costs most.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from pydantic import Field

from fasttrain import distributed
from fasttrain.benchmarks.timing import Report
from fasttrain.config import Config
from fasttrain.data.augment import AugmentConfig, SimCLR
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.errors import UsageError

if TYPE_CHECKING:
    from fasttrain.data.pipelines import Images, Whole

Work = Callable[[], int]
"""Does a little and returns how many images it made; called again and again by one thread."""

ALONE, COMPUTING, PYTHON = "nothing", "a thread that computes without the lock", "a thread of plain Python"
_SCHEDULER = Path("/proc/thread-self/schedstat")
_WARM_UP = 0.3  # seconds that what runs beside has before it counts
_TOGETHER = 100  # operations between two looks at the clock


class LockBenchConfig(Config):
    """What to load beside."""

    batch: int = Field(512, ge=1)
    "images a batch"
    seconds: float = Field(1.0, gt=0)
    "of launching, each time"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()


class Beside(NamedTuple):
    """Rounds of the launching thread beside something."""

    name: str
    operations: list[float]  # a second in which it had a core or waited for the lock
    slower: list[float]  # than alone in the same round
    images: list[float]  # a second


def compare_lock(config: LockBenchConfig, rounds: int) -> Iterator[Report]:
    """Operations a second of a launching thread beside each loader that reads the data; yields after every round."""
    sys.setswitchinterval(distributed.SWITCH_INTERVAL)  # as in training
    beside = {ALONE: None, COMPUTING: _compute, PYTHON: _interpret} | dict(_loaders(config))
    found = {name: Beside(name, [], [], []) for name in beside}
    for work in filter(None, beside.values()):
        work()
    for _ in range(rounds):
        for name, work in beside.items():
            operations, images = launch_beside(work, config.seconds)
            row = found[name]
            row.operations.append(operations)
            row.slower.append(found[ALONE].operations[-1] / operations)
            row.images.append(images)
        rows = list(found.values())
        slower = {row.name: statistics.median(row.slower) for row in rows}
        yield Report(_table(rows), [row._asdict() for row in rows], slower, "times slower than alone")


def launch_beside(work: Work | None, seconds: float) -> tuple[float, float]:
    """Operations that this thread launches, and images that ``work`` makes in another, a second."""
    done, stop, failed = 0, threading.Event(), []

    def repeat() -> None:
        nonlocal done
        try:
            while not stop.is_set():
                done += work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=repeat, daemon=True)
    if work is not None:
        thread.start()
        time.sleep(_WARM_UP)
    before, count, x = done, 0, torch.zeros(4)
    begun, waited = time.perf_counter(), _without_core()
    while (passed := time.perf_counter() - begun) < seconds:
        for _ in range(_TOGETHER):
            x.add_(1)
        count += _TOGETHER
    made, waited = done - before, _without_core() - waited
    stop.set()
    if work is not None:
        thread.join()
    if failed:
        raise failed[0]
    return count / (passed - min(waited, 0.99 * passed)), made / passed


def _without_core() -> float:
    """Seconds in which this thread could have run and had no core; 0 where the system does not say."""
    return int(_SCHEDULER.read_text().split()[1]) * 1e-9 if _SCHEDULER.exists() else 0.0


def _compute() -> int:
    hashlib.sha256(_BYTES)
    return 0


def _interpret() -> int:
    sum(range(100_000))
    return 0


_BYTES = bytes(1 << 24)


def _loaders(config: LockBenchConfig) -> Iterator[tuple[str, Work]]:
    catalog = open_catalog(config.data, "train")
    order = Order(catalog.indices, 0, min(config.batch, len(catalog)))
    augment = SimCLR(config.augment, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if catalog.beton is None:
        yield "dali, without decoding", _undecoded(catalog, order, augment, config.loader.thread_count())
    kinds = set(get_args(LoaderConfig.model_fields["kind"].annotation)) - {"auto"}
    for kind in sorted(kinds):
        settings = config.loader.model_copy(update={"kind": kind})
        try:
            batches = make_loader(settings, catalog, order, augment, device).iterate()
        except UsageError:  # not of such data, or it does not fit
            continue
        yield kind, lambda batches=batches: len(next(batches).labels)


def _undecoded(catalog: Catalog, order: Order, augment: SimCLR, threads: int) -> Work:
    """Python's side of the DALI loader: files read, draws, contents handed to DALI, which does nothing with them."""
    from fasttrain.data.dali import DaliSource
    from fasttrain.data.pipelines import OnCpu, Undecoded, Whole

    class Fed(OnCpu):
        def _define(self) -> tuple[Any, ...]:
            return (self._contents().shape(),)

        def collect(self, images: Images) -> Whole:
            self._outputs()
            return Whole.of(np.zeros(0, np.uint8), np.zeros((0, 2), np.int32), images.draws)

    class Source(DaliSource):
        def _open(self, batch: int) -> Fed | Undecoded:
            return Fed(batch, threads, False) if catalog.encoded else Undecoded()

    source, positions = Source(catalog, order, augment, torch.device("cpu"), threads), iter(range(1 << 62))
    source.seek(0, None)
    return lambda: len(source.produce(next(positions)).labels)


def _table(rows: list[Beside]) -> str:
    lines = [
        "| beside | operations/s | times slower | least to greatest | images/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        operations, slower, images = (statistics.median(values) for values in row[1:])
        spread = f"{min(row.slower):.2f} to {max(row.slower):.2f}"
        lines.append(f"| {row.name} | {operations:,.0f} | {slower:.2f} | {spread} | {images:,.0f} |")
    return "\n".join(lines)


__all__ = ["LockBenchConfig", "compare_lock", "launch_beside"]
