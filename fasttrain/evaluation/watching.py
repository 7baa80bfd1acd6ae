"""How far long work is, for whoever watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from fasttrain import distributed

T = TypeVar("T")

EVERY = 10.0
"Seconds between two lines where no terminal shows a bar."


@contextmanager
def watching(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """``show(done)``: a bar on a terminal, else a line now and then."""
    first = distributed.rank() == 0
    terminal = sys.stderr.isatty()
    began = told = time.monotonic()
    look = {"disable": not (terminal and first), "delay": 2, "leave": False, "dynamic_ncols": True}
    with tqdm(total=total, desc=what, unit=f" {unit}", **look) as bar:

        def show(done: int) -> None:
            nonlocal told
            bar.update(done - bar.n)
            now = time.monotonic()
            if not terminal and done and now - told >= EVERY:
                told, left = now, (now - began) / done * (total - done)
                distributed.say(
                    f"{what}: {done:,} of {total:,} {unit}  left {time.strftime('%H:%M:%S', time.gmtime(left))}"
                )

        yield show


def watched(items: Iterable[T], what: str, total: int, unit: str = "batches") -> Iterator[T]:
    """``items``, of which this rank has ``total``, each counted when the next is asked for."""
    with watching(what, total, unit) as show:
        for number, item in enumerate(items, 1):
            yield item
            show(number)


__all__ = ["watched", "watching"]
