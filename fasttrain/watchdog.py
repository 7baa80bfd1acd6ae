"""Who of the job is still there: a rank that waits in a collective for one that is gone cannot find out by itself.

Each rank has two threads. One posts a heartbeat to the launcher's store (at MASTER_ADDR) and reads the others'; the
other, which does no I/O that could hang, judges::

    a rank whose heartbeat stands still for `timeout` seconds            killed, stopped, or its host cut off
    a process of this machine that is no more                            seen after seconds
    the store, which lives with rank 0, silent for `timeout` seconds     rank 0's host is gone, or this one cut off
    this process's own clock jumped by `timeout` seconds                 it was stopped; the others have given it up
    the launcher (deepspeed, torchrun) is no more                        as if SIGTERM had come; after `GRACE` the end

All but the last end the process at once with :data:`EXIT_RANK_LOST` and a line that names who is gone. The worst case,
from a rank's last heartbeat to the end of the others, is 1.2 `timeout` and 4 seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from fasttrain import distributed, processes
from fasttrain.errors import UsageError
from fasttrain.processes import Process

EXIT_RANK_LOST = 76
"A rank, its host or the launcher is gone, or nobody steps any more; the last line names it."

GRACE = 60.0  # seconds that a job without its launcher has to save and end
BURIAL = 3.0  # seconds between a local process's end and the verdict: it may have left in order
QUIET = 600.0  # seconds without a step between two lines that say so

LEFT = "left"


class Peer(NamedTuple):
    """What is known of another rank."""

    rank: int
    host: str
    process: Process

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid} on {self.host})"


class Watchdog:
    """Watches the other ranks and the launcher until :meth:`leave`; all ranks make one together.

    Args:
        timeout: seconds without a heartbeat after which a rank is given up; 0: ranks are not watched.
        hang_timeout: seconds without a step of any rank after which the job ends; None: it is only reported.
    """

    def __init__(self, timeout: float, hang_timeout: float | None = None) -> None:
        self.step = 0
        self._timeout, self._hang_timeout = timeout, hang_timeout
        self._left, self._ending = threading.Event(), threading.Lock()
        self._launchers = processes.launchers()  # which this process must not outlive
        self._orphaned: float | None = None
        now = time.monotonic()
        self._progress, self._progressed, self._reported = -1, now, now
        self._store: dist.Store | None = None
        if timeout and distributed.world_size() > 1 and "MASTER_PORT" in os.environ:  # else no launcher made the group
            self._meet()
        if self._store is not None or self._launchers:
            threading.Thread(target=self._judge, name="fasttrain-watchdog", daemon=True).start()

    def _meet(self) -> None:
        """Connect to the store, and wait until everybody has."""
        known = distributed.all_gather_object([socket.gethostname(), *processes.this()])
        token = distributed.on_rank_zero(lambda: secrets.token_hex(8))  # a restarted job's heartbeats are others
        self._prefix = f"fasttrain/heartbeat/{token}"
        self._peers = [Peer(rank, host, Process(*process)) for rank, (host, *process) in enumerate(known)]
        self._others = [peer for peer in self._peers if peer.rank != distributed.rank()]
        self._beats, self._seen = [""] * len(known), [time.monotonic()] * len(known)
        self._talked, self._dead = time.monotonic(), {}
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=self._timeout),
        )
        self._store.set(self._key(distributed.rank()), "[0, 0]")
        dist.barrier()
        threading.Thread(target=self._talk, name="fasttrain-heartbeat", daemon=True).start()

    def leave(self, failure: BaseException | None = None) -> None:
        """Stop watching. The others hear of a ``failure`` that is this rank's own, and end too.

        Where ``failure`` is a connection that broke, the rank at its other end is what matters: wait for the verdict,
        which ends this process.
        """
        if self._store is not None and not self._left.is_set():
            if failure is None or (isinstance(failure, UsageError) and failure.everywhere):
                self._tell(self._key(distributed.rank()), LEFT)
            else:
                if _lost_connection(failure):
                    if threading.current_thread() is threading.main_thread():  # launchers are quick to send one
                        signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    time.sleep(1.1 * self._timeout + 3)
                me, text = self._peers[distributed.rank()], " ".join(str(failure).split())[:300]
                self._tell(f"{self._prefix}/gone", f"{me} failed at step {self.step}: {type(failure).__name__}: {text}")
        self._left.set()

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _talk(self) -> None:
        beat, keys = 0, [self._key(peer.rank) for peer in self._peers]
        with suppress(RuntimeError):  # the store is no more: its silence will be noticed
            while not self._left.wait(self._timeout / 10):
                beat += 1
                self._store.set(self._key(distributed.rank()), json.dumps([beat, self.step]))
                beats, now = [value.decode() for value in self._store.multi_get(keys)], time.monotonic()
                for rank, value in enumerate(beats):
                    if value != self._beats[rank]:
                        self._seen[rank] = now
                self._beats, self._talked = beats, now
                if self._store.check([f"{self._prefix}/gone"]):
                    self._end(self._store.get(f"{self._prefix}/gone").decode(), tell=False)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._left.wait(1.0):
            now = time.monotonic()
            if self._store is not None:
                if now - before > self._timeout:
                    self._end(f"rank {distributed.rank()}, this one, was stopped for {now - before:.0f} s: given up")
                self._judge_peers(now)
                self._judge_progress(now)
            before = now
            self._judge_launchers(now)

    def _judge_peers(self, now: float) -> None:
        there = [peer for peer in self._others if self._beats[peer.rank] != LEFT]
        for peer in there:
            if peer.process.gone() and now - self._dead.setdefault(peer.rank, now) > BURIAL:
                self._end(f"{peer} is gone: its process ended; {self._last_step(peer)}")
        if now - self._talked > self._timeout:
            self._end(
                f"{self._peers[0]} or its host is gone, or this host is cut off: the store at "
                f"{os.environ['MASTER_ADDR']} has not answered for {now - self._talked:.0f} s"
            )
        if lost := [peer for peer in there if now - self._seen[peer.rank] > self._timeout]:
            names = ", ".join(map(str, lost[:8])) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
            self._end(f"{names} gone: no heartbeat for {self._timeout:.0f} s; {self._last_step(lost[0])}")

    def _last_step(self, peer: Peer) -> str:
        """Heartbeats come seldom; but a step that this rank has done, the other took part in."""
        beat = self._beats[peer.rank]
        step = json.loads(beat)[1] if beat.startswith("[") else 0
        return f"last heard of at step {max(step, self.step)}"

    def _judge_progress(self, now: float) -> None:
        steps = [json.loads(beat)[1] for beat in self._beats if beat.startswith("[")]
        progress = sum(steps)
        if progress != self._progress:
            self._progress, self._progressed = progress, now
            return
        stands = now - self._progressed
        behind = f"step {min(steps)} (rank {steps.index(min(steps))}) to {max(steps)}" if steps else "no step"
        if self._hang_timeout is not None and stands > self._hang_timeout:
            self._end(f"all ranks are there, and none has stepped for {stands:.0f} s, at {behind}")
        if distributed.rank() == 0 and stands > QUIET and now - self._reported > QUIET:
            self._reported = now
            _say(f"all ranks are there, and none has stepped for {stands / 60:.0f} minutes, at {behind}")

    def _judge_launchers(self, now: float) -> None:
        if self._orphaned is None and any(launcher.gone() for launcher in self._launchers):
            self._orphaned = now
            _say(f"rank {distributed.rank()}: the launcher is gone: saving and ending")
            os.kill(os.getpid(), signal.SIGTERM)
        if self._orphaned is not None and now - self._orphaned > GRACE:
            self._end(f"the launcher is gone, and the job could not be ended in order within {GRACE:.0f} s")

    def _tell(self, key: str, value: str) -> None:
        """Set a key of the store, for no more than 2 seconds: it may be out of reach."""

        def tell() -> None:
            with suppress(RuntimeError):
                self._store.set(key, value)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(2)

    def _end(self, message: str, tell: bool = True) -> NoReturn:
        """End this process, whatever its other threads are stuck in."""
        with self._ending:
            if self._left.is_set():  # it was leaving in order just now
                raise SystemExit
            _say(f"error: {message}; rank {distributed.rank()} ends with code {EXIT_RANK_LOST}")
            if tell and self._store is not None:
                self._tell(f"{self._prefix}/gone", message)
                if distributed.rank() == 0:  # the store may go with this process: let the others read it
                    time.sleep(self._timeout / 10 + 0.5)
            os._exit(EXIT_RANK_LOST)


def _lost_connection(failure: BaseException) -> bool:
    words = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe")
    return isinstance(failure, dist.DistError) or (
        isinstance(failure, RuntimeError) and any(word in str(failure) for word in words)
    )


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # whoever read it may be gone
        print(line, file=sys.stderr, flush=True)
