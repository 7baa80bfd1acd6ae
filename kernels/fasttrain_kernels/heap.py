"""The C library's heap: kept between the steps of a training run, given back while memory is measured."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_kept = False


def keep_heap() -> bool:
    """Let this process keep the memory that its tensors free, for its next ones; return whether the C library can.

    glibc maps each block beyond 32 MiB anew and hands it back when it is freed, so every large tensor on a CPU starts
    as pages that the kernel has to find and clear at their first touch. With this, blocks of any size come from the
    heap, which does not shrink. It costs other processes the memory that this one does not need at the moment.
    """
    global _kept
    _kept = _set(_MMAP_MAX, 0) and _set(_TRIM_THRESHOLD, -1)
    return _kept


@contextmanager
def heap_given_back() -> Iterator[None]:
    """Within it nothing of 128 KiB or more is kept once it is freed, nor what was freed before."""
    if _set(_MMAP_MAX, 2**16) and _set(_MMAP_THRESHOLD, 2**17) and _set(_TRIM_THRESHOLD, 2**17):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        yield
    finally:
        if _kept:
            keep_heap()
        else:  # where glibc's own adaptation, which is off from now on, ends
            _set(_MMAP_THRESHOLD, 2**25)
            _set(_TRIM_THRESHOLD, 2**26)


def _set(option: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (AttributeError, OSError):  # not glibc
        return False


__all__ = ["heap_given_back", "keep_heap"]
