"""SIGTERM and SIGUSR1, which come to any rank at any instant and are acted on by all ranks at the same point."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import ClassVar, TypeVar

from fasttrain import distributed

T = TypeVar("T")


class Stopped(Exception):
    """A rank was told to stop; on all ranks at the same point."""


class StopRequest:
    """Within it, SIGTERM and SIGUSR1 are remembered; who acts on them asks for :attr:`received`."""

    in_force: ClassVar[StopRequest | None] = None

    def __enter__(self) -> StopRequest:
        self.received = False
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        StopRequest.in_force = self
        return self

    def __exit__(self, *failure: object) -> None:
        """Once stopping, more signals are ignored."""
        StopRequest.in_force = None
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = True


def until_stopped(items: Iterable[T]) -> Iterator[T]:
    """``items``, of which all ranks have as many; where no :class:`StopRequest` is in force, nothing else happens.

    Raises:
        Stopped: before the next item, a rank was told to stop.
    """
    for item in items:
        request = StopRequest.in_force
        if request is not None and distributed.any_rank(request.received):
            raise Stopped
        yield item


__all__ = ["StopRequest", "Stopped", "until_stopped"]
