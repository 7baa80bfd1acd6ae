"""A job of several ranks, started in a fraction of a second, killed at will, never left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

from tests.faults.trainee import Fault, Place, Poison, run

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.faults.trainee"])


class Job:
    """``world`` ranks of ``launch/<script>.py arguments``; a context, at whose end all of them are dead."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        world: int = 1,
        fault: Fault | None = None,
        poison: Poison | None = None,
        script: str = "pretrain",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, port = folder, free_port()
        common = str(folder), arguments, fault, poison
        self.ranks = [
            _server.Process(target=run, args=(script, Place(rank, world, port), *common), daemon=True)
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        for process in self.ranks:
            process.join(10)

    def signal(self, number: int, *ranks: int) -> None:
        """To the given ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].is_alive():
                os.kill(self.ranks[rank].pid, number)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit codes of all ranks (−n: by signal n; None: still there after ``timeout`` seconds)."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def log(self, rank: int = 0) -> str:
        """What the rank printed, in all its lives in this folder."""
        path = self.folder / f"rank-{rank}.log"
        return path.read_text() if path.exists() else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
