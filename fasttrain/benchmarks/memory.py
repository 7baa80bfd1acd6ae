"""The most memory that a call holds at once."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fasttrain_kernels.heap import heap_given_back

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``run`` held at its peak beyond those held when it began; what it returns counts.

    On a GPU by torch's counter of allocated memory. On a CPU by the high-water mark of this process's resident memory,
    reset first: that is what decides whether a job fits. Unlike a profiler of torch's allocator it sees what NumPy,
    numba, oneDNN and the BLAS allocate; unlike a sampling thread it misses nothing. Pages count once they are touched,
    so what the C library keeps of memory freed earlier is given back to the system before, and during the run it keeps
    no block of 128 KiB or more. Warm up first, or compiled code and loaded libraries count. ``None`` where the mark
    cannot be reset (not Linux, or a sandbox).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    with heap_given_back():
        try:
            _CLEAR.write_text("5")
        except OSError:
            return None
        before = _high_water()
        run()
        return _high_water() - before


def _high_water() -> int:
    """VmHWM, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
