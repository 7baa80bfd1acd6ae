"""Signals to stop, which come to any rank at any instant and are acted on by all ranks at the same point."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import ClassVar, TypeVar

from fasttrain import distributed

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO = 1.0
"Seconds in which another SIGINT is the same Ctrl-C, passed on by a launcher."


class Stopped(Exception):
    """A rank was told to stop; on all ranks at the same point."""


class StopRequest:
    """Within it, SIGTERM, SIGUSR1 and Ctrl-C are remembered; who acts on them asks for :attr:`received`.

    What a terminal sends and what launchers make of it differ: ranks get SIGINT from the one, SIGTERM from others, or
    both at once. So all three ask for the same. A second Ctrl-C ends the process at once.
    """

    in_force: ClassVar[StopRequest | None] = None

    def __enter__(self) -> StopRequest:
        self.received, self._interrupted = False, None
        heeded = [
            number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
        ]  # a shell's `&` ignores ^C
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        StopRequest.in_force = self
        return self

    def __exit__(self, *failure: object) -> None:
        """Once stopping, more signals than a second Ctrl-C change nothing."""
        StopRequest.in_force = None
        if not self.received:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def agree(self, received: bool) -> None:
        """A signal that came to any rank counts as this one's: a launcher may yet send it here too."""
        self.received = self.received or received

    def _note(self, number: int, frame: object) -> None:
        self.received, now = True, time.monotonic()
        if number != signal.SIGINT:
            return
        if self._interrupted is None:
            self._interrupted = now
            if distributed.rank() == 0:
                with suppress(OSError):  # a handler may come in the midst of a print
                    os.write(2, b"interrupted: saving and ending; Ctrl-C again ends at once, without saving\n")
        elif now - self._interrupted > ECHO:
            raise KeyboardInterrupt


def until_stopped(items: Iterable[T]) -> Iterator[T]:
    """``items``, of which all ranks have as many; where no :class:`StopRequest` is in force, nothing else happens.

    Raises:
        Stopped: before the next item, a rank was told to stop.
    """
    for item in items:
        request = StopRequest.in_force
        if request is not None and distributed.any_rank(request.received):
            request.agree(True)
            raise Stopped
        yield item


def heeded(items: Iterable[T]) -> Iterator[T]:
    """``items``, of this rank alone; where no :class:`StopRequest` is in force, nothing else happens.

    Raises:
        Stopped: before the next item, this rank was told to stop; nobody else knows of it.
    """
    for item in items:
        heed()
        yield item


def heed() -> None:
    """Raise :class:`Stopped` if this rank was told to stop."""
    if StopRequest.in_force is not None and StopRequest.in_force.received:
        raise Stopped


__all__ = ["StopRequest", "Stopped", "heed", "heeded", "until_stopped"]
