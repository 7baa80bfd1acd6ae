"""A loop in slices, one a thread, for compiled functions that release Python's global lock.

PyTorch's own loops are OpenMP's, whose threads by default spin while they wait for each other: beside another busy
process each wait then lasts until that one is off the core, with a whole core lost to spinning. The package says
``OMP_WAIT_POLICY=passive`` where the environment says nothing, so that they sleep. ``launch/pretrain.py`` on 2 cores
(family 25 model 1, 2026-11-27, medians of images/s in one session, spinning / sleeping): alone 197 / 195, beside a
2-thread PyTorch process 85 / 170.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch


def in_slices(count: int, work: Callable[[int, int], None]) -> None:
    """``work(start, stop)`` over parts of ``range(count)`` that together are the whole, at once on torch's threads.

    As many parts as ``torch.get_num_threads()``, equal to within one, one of them on the calling thread. Returns when
    all are done; raises what any of them raised.
    """
    parts = max(1, min(torch.get_num_threads(), count))
    bounds = [count * part // parts for part in range(parts + 1)]
    others = [_pool(os.getpid(), parts).submit(work, *pair) for pair in pairwise(bounds[1:])]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Per process, since threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fasttrain-kernel")
