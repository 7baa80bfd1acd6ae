"""Long evaluations in parts: shared among the ranks, each kept when it is done, so that what is done is done once.

::

    points ── done before? ── found in the folder ──────────────┐
              └─ no ── the next free rank works on it ── kept ──┴── all results, in order, on every rank

A *point* says all that its result depends on (which weights, which images, which ε) as plain data, and a line of the
folder says what was found there. So an interrupted evaluation loses the points under way, one with more points does the
new ones alone, and a result depends on no number of ranks: each point is one rank's work, done as one rank would.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fasttrain import __version__, distributed
from fasttrain.errors import UsageError, explained
from fasttrain.evaluation.watching import watching
from fasttrain.run import replace_file
from fasttrain.stop import Stopped, StopRequest

Point = dict[str, Any]
"What a part's result depends on, as JSON has it."
Found = dict[str, Any]
"What was found there: plain values, and tensors."


class Parts:
    """What is kept of an evaluation's parts: a folder of ``<host>-<process>-<time>.jsonl`` and ``<point>.safetensors``.

    Args:
        folder: made when something is kept; None: nothing is.
    """

    _runs: ClassVar[Iterator[int]] = itertools.count()  # of the process: each has a queue of its own

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lines = f"{os.uname().nodename}-{os.getpid()}-{time.time_ns()}.jsonl"  # a pid may come again

    def run(self, what: str, points: Sequence[Point], work: Callable[[Point], Found]) -> list[Found]:
        """``[work(point), …]`` on every rank, what was found before taken from the folder; all ranks together.

        ``work`` runs on one rank, in no stated order, and waits for no other. Plain values come back as JSON has them
        (a tuple is a list), floats to the bit; tensors on the CPU.

        Raises:
            Stopped: a rank was told to stop; what is done is kept.
            UsageError: ``work`` raised it on some rank, or the folder cannot be written; on all ranks.
        """
        keys = [key_of(point) for point in points]
        wanted = dict(zip(keys, points, strict=True))
        known = json.loads(distributed.broadcast_bytes(self._read(wanted.keys()) if distributed.rank() == 0 else b""))
        done: dict[str, Found] = {key: known[key] for key in wanted if key in known}
        missing = [key for key in wanted if key not in done]
        if done and missing:
            distributed.say(f"{what}: {len(done):,} of {len(wanted):,} parts are there already, in {self.folder}")
        mine = self._work(what, missing, wanted, work) if missing else {}
        for data in distributed.all_gather_bytes(_packed(mine)):
            done |= _unpacked(data)
        tensors = _unpacked(distributed.broadcast_bytes(self._tensors(known) if distributed.rank() == 0 else b""))
        done |= {key: known[key] | tensors[key] for key in tensors}
        return [done[key] for key in keys]

    def missing(self, points: Sequence[Point]) -> list[Point]:
        """Those that :meth:`run` would work on, so that what only they need is made for them alone; ranks together."""
        wanted = {key_of(point): point for point in points}
        known = distributed.broadcast_bytes(self._read(wanted.keys()) if distributed.rank() == 0 else b"")
        return [point for key, point in wanted.items() if key not in json.loads(known)]

    def _work(
        self, what: str, missing: list[str], wanted: dict[str, Point], work: Callable[[Point], Found]
    ) -> dict[str, Found]:
        """What this rank found, when all ranks have ended."""
        queue, mine = Queue(f"parts-{next(self._runs)}"), {}
        failure: Exception | None = None
        with watching(what, len(missing), "parts") as show:
            try:
                while not queue.halted() and (number := queue.take()) < len(missing):
                    key = missing[number]
                    began = time.perf_counter()
                    mine[key] = work(wanted[key])
                    self._keep(key, wanted[key], mine[key], time.perf_counter() - began)
                    queue.finish()
                    show(queue.finished())
            except Stopped:
                StopRequest.in_force.agree(True)
            except Exception as error:
                failure = error
                if explained(error) is None:
                    raise
            queue.leave(halt=failure is not None or _told())
            while queue.others_work():
                time.sleep(0.05)
                show(queue.finished())
                if _told():
                    queue.halt()

        def raised() -> None:
            if failure is not None:
                raise failure

        distributed.agree(raised)
        if distributed.any_rank(_told()):
            StopRequest.in_force.agree(True)
            raise Stopped
        return mine

    def _keep(self, key: str, point: Point, found: Found, seconds: float) -> None:
        if self.folder is None:
            return
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in found.items() if name not in tensors}
        line = {"key": key, "point": point, "found": plain, "arrays": sorted(tensors), "seconds": round(seconds, 3)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if tensors:
                replace_file(self.folder / f"{key}.safetensors", _saved(tensors))
            with (self.folder / self._lines).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UsageError(
                f"what is done cannot be kept in '{self.folder}' ({error.strerror}): free space and run the same "
                "command again, or choose another place with output=…"
            ) from None

    def _read(self, wanted: Any) -> bytes:
        """What the folder has of the wanted points, without tensors; lines that a kill cut short are passed over."""
        known: dict[str, Found] = {}
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder is not None else ():
            for raw in path.read_bytes().splitlines():
                try:
                    line = json.loads(raw)
                    key, found, arrays = line["key"], line["found"], line["arrays"]
                except (ValueError, LookupError, TypeError):
                    continue
                if key in wanted and all(name in self._arrays(key) for name in arrays):
                    known[key] = found
        return json.dumps(known).encode()

    def _arrays(self, key: str) -> dict[str, Tensor]:
        try:
            return load((self.folder / f"{key}.safetensors").read_bytes())
        except (OSError, SafetensorError):
            return {}

    def _tensors(self, known: dict[str, Found]) -> bytes:
        return _packed({key: found for key in known if (found := self._arrays(key))}) if known else _packed({})


class Queue:
    """Numbers from 0 for whoever asks next, over all ranks, without a rank that waits for another."""

    def __init__(self, name: str) -> None:
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._store = None if self._alone else dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        self._counts: dict[str, int] = {}

    def _add(self, key: str, amount: int) -> int:
        if self._store is not None:
            return self._store.add(key, amount)
        self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts[key]

    def take(self) -> int:
        """The next number."""
        return self._add("taken", 1) - 1

    def finish(self) -> None:
        self._add("finished", 1)

    def finished(self) -> int:
        """How many all ranks have finished."""
        return self._add("finished", 0)

    def halt(self) -> None:
        """Let no rank take another."""
        self._add("halted", 1)

    def halted(self) -> bool:
        """Whether a rank has said so, or this one is told to stop."""
        if _told():
            self.halt()
        return self._add("halted", 0) > 0

    def leave(self, halt: bool) -> None:
        """This rank takes no more."""
        if halt:
            self.halt()
        self._add("left", 1)

    def others_work(self) -> bool:
        return self._add("left", 0) < (1 if self._alone else dist.get_world_size())


def key_of(point: Point) -> str:
    """A name for a point: a hash of what it says, and of the version that works on it."""
    text = json.dumps([__version__, point], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it PyTorch computes with one thread: sums over a batch, as in the gradients of weights, are then the same
    bits whatever the number of cores and ranks. (Forward passes and gradients of images are so with any number.)

    On a CPU ``torchrun --nproc-per-node <cores>`` keeps all cores at work, each on a part of its own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _told() -> bool:
    return StopRequest.in_force is not None and StopRequest.in_force.received


def _saved(tensors: dict[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _packed(parts: dict[str, Found]) -> bytes:
    """Plain values as JSON behind their length, then the tensors as safetensors."""
    tensors = {f"{k}/{n}": v for k, found in parts.items() for n, v in found.items() if isinstance(v, Tensor)}
    plain = {k: {n: v for n, v in found.items() if not isinstance(v, Tensor)} for k, found in parts.items()}
    head = json.dumps(plain).encode()
    return len(head).to_bytes(8, "little") + head + _saved(tensors)


def _unpacked(data: bytes) -> dict[str, Found]:
    size = int.from_bytes(data[:8], "little")
    parts: dict[str, Found] = json.loads(data[8 : 8 + size])
    for name, value in load(data[8 + size :]).items():
        key, _, name = name.partition("/")
        parts[key][name] = value
    return parts


__all__ = ["Found", "Parts", "Point", "key_of", "one_thread"]
