"""The C library's heap, kept between the steps of a training run."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_heap() -> bool:
    """Let this process keep the memory that its tensors free, for its next ones; return whether the C library can.

    glibc maps each block beyond 32 MiB anew and hands it back when it is freed, so every large tensor on a CPU starts
    as pages that the kernel has to find and clear at their first touch. With this, blocks of any size come from the
    heap, which does not shrink. It costs other processes the memory that this one does not need at the moment.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


__all__ = ["keep_heap"]
