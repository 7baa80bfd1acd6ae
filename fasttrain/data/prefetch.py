"""Batches made ahead of time, whoever makes them::

    Source.produce(position) ── Finish ── queue of `prefetch` batches ── PrefetchLoader.iterate()
    └──────────────── one background thread ───────────────────────┘     the consumer

A loader is a :class:`Source` and a :class:`Finish` in a :class:`PrefetchLoader`.
"""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.data.augment import Draws
from fasttrain.data.damage import Bad, BadImages
from fasttrain.data.loader import LoaderConfig
from fasttrain.data.order import Order
from fasttrain.errors import UsageError

_PATIENCE = 5.0  # seconds that closing waits for the batch under way

_Finished = tuple[Batch, Sequence[Bad]]


class Decoded(NamedTuple):
    """One rank's part of a micro-batch: decoded, cropped, resized and flipped, the colours not yet changed."""

    views: Sequence[np.ndarray | Tensor]  # V x uint8 [B, size, size, 3]; the next produce() may overwrite them
    draws: Draws  # [B, V]
    labels: np.ndarray  # [B] int64
    ids: np.ndarray  # [B] int64, of the images shown
    bad: Sequence[Bad] = ()  # those that cannot be


class Produced(Protocol):
    """One rank's part of a micro-batch: :class:`Decoded`, or what another :class:`Finish` is made for."""

    labels: np.ndarray  # [B] int64
    ids: np.ndarray  # [B] int64, of the images shown
    bad: Sequence[Bad]  # those that cannot be


class Source(Protocol):
    """What a loader has of its own. Called from one thread at a time, but for ``reading``."""

    remedy: str
    """what to do about bad images"""

    def seek(self, position: int, end: int | None) -> None:
        """Forget what is under way: ``position`` is produced next, then those after it up to ``end``."""
        ...

    def produce(self, position: int) -> Produced:
        """This rank's part of global micro-batch ``position``."""
        ...

    def reading(self) -> list[str]:
        """The files that ``produce`` is waiting for, to be named when it takes too long."""
        ...

    def close(self) -> None: ...


class Finish(Protocol):
    """Makes the batch of what a source decoded: colours, and the way to the device. Called from one thread."""

    def __call__(self, decoded: Produced) -> Batch:
        """``images`` may be uint8, grey levels, where no colours are changed."""
        ...

    def close(self) -> None: ...


class PrefetchLoader:
    """The :class:`~fasttrain.data.loader.Loader` around a :class:`Source`: queue, time-out, hand-over, shutdown."""

    def __init__(self, source: Source, finish: Finish, config: LoaderConfig, order: Order) -> None:
        self._source, self._finish, self._config, self._order = source, finish, config, order
        self.bad = BadImages(config.bad_share, len(order.indices), source.remedy)
        self._runs: list[_Run] = []
        self._finalizer = weakref.finalize(self, _close, self._runs, source, self._finish)
        self._finalizer.atexit = False  # that would come after DALI's own shutdown, which must find no run under way
        atexit.register(self._finalizer)

    def __len__(self) -> int:
        return len(self._order)

    def iterate(self, start: int = 0, *, levels: bool = False) -> Iterator[Batch]:
        """See :meth:`Loader.iterate`. Work starts at once, not with the first ``next``."""
        while self._runs:
            if not self._runs[-1].stop(self._config.timeout):
                raise self._runs[-1].overdue(self._config.timeout)
            self._runs.pop()
        end = None if self._order.drop_last else len(self)
        run = _Run(self._source, self._finish, start, end, self._config.prefetch)
        self._runs.append(run)
        return self._batches(run, levels)

    def close(self) -> None:
        """Stop the threads. Happens by itself when the loader is collected, or at the interpreter's exit."""
        self._finalizer()
        atexit.unregister(self._finalizer)

    def _batches(self, run: _Run, levels: bool) -> Iterator[Batch]:
        try:
            for _ in run.positions():
                batch, bad = run.take(self._config.timeout)
                self.bad.add(bad)
                if batch.images.is_cuda:  # made on another stream, whose allocator must not reuse it under ours
                    for tensor in (batch.images, batch.labels, batch.index):
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
                if batch.images.dtype == torch.uint8 and not levels:
                    batch = batch._replace(images=batch.images * (1 / 255))
                yield batch
        finally:
            run.stop(0)


class Workers:
    """A few daemon threads. Unlike ThreadPoolExecutor's they hold up no exit of the interpreter when a read hangs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=_work, args=(self._tasks,), daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        self._tasks.put((future, function, arguments))
        return future

    def over_slices(self, function: Callable[[slice], Any], length: int) -> list[Future]:
        """``function`` of slices that cover ``range(length)``, a few for each thread so that all end together.

        They are as ``np.array_split`` would cut it."""
        parts = np.array_split(np.arange(length), max(1, min(length, 4 * self.count))) if length else []
        return [self.submit(function, slice(int(part[0]), int(part[-1]) + 1)) for part in parts]

    def close(self) -> None:
        for _ in range(self.count):
            self._tasks.put(None)


def slices(length: int, count: int) -> list[slice]:
    """``count`` that cover ``range(length)``, fewer where they would be empty: one for each thread.

    Each hand-over to a thread is one of the interpreter's lock, too: four for each slow a thread that launches
    operations 1.6 times beside the running loader, one 1.35 times.
    """
    ends = np.linspace(0, length, min(count, length) + 1).astype(int).tolist()
    return [slice(*pair) for pair in pairwise(ends)]


def _work(tasks: queue.SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        del task, future, function, arguments  # else a waiting thread keeps the last batch in memory


class _Run:
    """One call of ``iterate``: the thread that fills the queue, and the consumer's end of it."""

    def __init__(self, source: Source, finish: Finish, start: int, end: int | None, prefetch: int) -> None:
        self._source, self._finish, self._start, self._end, self._prefetch = source, finish, start, end, prefetch
        self._ready: deque[_Finished | BaseException] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._fill, name="fasttrain-loader", daemon=True)
        self._thread.start()

    def positions(self) -> Iterator[int]:
        return itertools.count(self._start) if self._end is None else iter(range(self._start, self._end))

    def take(self, timeout: float) -> _Finished:
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._stopped, timeout):
                raise self.overdue(timeout)
            if not self._ready:
                raise RuntimeError("this iterator was abandoned: the loader was closed or iterates from elsewhere")
            item = self._ready[0]
            if isinstance(item, BaseException):
                raise item
            self._changed.notify_all()
            return self._ready.popleft()

    def overdue(self, timeout: float) -> UsageError:
        return UsageError(
            f"no batch for {timeout:g} s while reading {_shorten(self._source.reading())}: check that the disk or "
            f"network mount answers, or raise the loader's timeout"
        )

    def stop(self, patience: float) -> bool:
        """Tell the thread to end; False if after ``patience`` seconds it is still in a read or a decoder."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(patience)
        return not self._thread.is_alive()

    def _fill(self) -> None:
        try:
            self._source.seek(self._start, self._end)
            for position in self.positions():
                if self._stopped:
                    return
                decoded = self._source.produce(position)
                self._put((self._finish(decoded), decoded.bad))
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Finished | BaseException) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._prefetch or self._stopped)
            if not self._stopped:
                self._ready.append(item)
                self._changed.notify_all()


def _close(runs: list[_Run], source: Source, finish: Finish) -> None:
    if all(run.stop(_PATIENCE) for run in runs):  # else a read hangs: its thread, a daemon, ends with the process
        source.close()
        finish.close()


def _shorten(paths: list[str], most: int = 3) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(f"'{path}'" for path in paths[:most]) + more if paths else "(nothing: the decoder itself hangs)"


__all__ = ["Decoded", "Finish", "PrefetchLoader", "Produced", "Source", "Workers", "slices"]
