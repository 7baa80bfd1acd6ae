"""Memory that the processes of a host share, and how much of it there is.

What one process has put there, others of the same user find by its key: ranks, loaders of the same process, jobs side
by side. It has no name in any file system, so nothing is left of it once the last of them has ended, however it ended.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from fasttrain_kernels.caches import private_folder

_POLL = 0.05  # seconds between two looks at whether another process is done
_CGROUPS, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def host_memory() -> int:
    """Bytes that there are for this process: the machine's, or its container's limit where that is lower."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Bytes of :func:`host_memory` that can be had now, the file cache's among them."""
    return min([_meminfo("MemAvailable"), *(limit - used for limit, used in _limits())])


def shared(key: str, fill: Callable[[Callable[[int], np.ndarray]], bytes]) -> tuple[np.ndarray, bytes]:
    """What lies under ``key``: uint8 [bytes] and what belongs to it; put there by ``fill`` if nothing does.

    Args:
        key: letters and digits; the same for the same contents alone.
        fill: is given a function that takes a number of bytes, at least 1, and returns memory to write to, which it
            calls once; it returns what belongs to it. Another process that asks for the key meanwhile waits.
    """
    registry = Path(private_folder(), f"shared-{key}")
    _forget_others(registry)
    with registry.open("a+") as file:
        _lock(file.fileno())
        holders = _holders(file)
        for process, descriptor, length in holders:
            if (found := _open(process, descriptor, key)) is not None:
                array, extra = _map(found, length), os.pread(found, os.fstat(found).st_size - length, length)
                _register(file, [*holders, [os.getpid(), found, length]])
                return array, extra
        descriptor, made = os.memfd_create(f"fasttrain-{key}"), []

        def allocate(length: int) -> np.ndarray:
            os.ftruncate(descriptor, length)
            made.append(_map(descriptor, length))
            return made[0]

        try:
            extra = fill(allocate)
        finally:
            if not made:
                os.close(descriptor)
        length = len(made[0])
        os.pwrite(descriptor, extra, length)
        _register(file, [[os.getpid(), descriptor, length]])
        return made[0], extra


def _forget_others(registry: Path) -> None:
    """Remove the registries of what nobody holds any more."""
    for path in registry.parent.glob("shared-*"):
        with suppress(OSError), path.open("r+") as file:  # OSError: another process is at it
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            key = path.name.partition("-")[2]
            if path != registry and not any(_is_held(*holder[:2], key) for holder in _holders(file)):
                path.unlink()


def _lock(descriptor: int) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_POLL)


def _holders(file) -> list[list[int]]:
    """(process, descriptor, length) of those who had it, some of whom may have ended since."""
    file.seek(0)
    with suppress(ValueError):
        return [[int(number) for number in holder] for holder in json.loads(file.read())]
    return []


def _register(file, holders: list[list[int]]) -> None:
    living = [holder for holder in holders if os.path.exists(f"/proc/{holder[0]}")]
    file.truncate(0)
    file.write(json.dumps(living))
    file.flush()


def _open(process: int, descriptor: int, key: str) -> int | None:
    """A descriptor of our own of what another process holds, if it still does."""
    with suppress(OSError):
        if _is_held(process, descriptor, key):
            return os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    return None


def _is_held(process: int, descriptor: int, key: str) -> bool:
    with suppress(OSError):
        return os.readlink(f"/proc/{process}/fd/{descriptor}").startswith(f"/memfd:fasttrain-{key}")
    return False


def _map(descriptor: int, length: int) -> np.ndarray:
    """The memory behind a descriptor, which is closed when nothing in this process refers to it any more."""
    array = np.frombuffer(mmap.mmap(descriptor, length), np.uint8)
    weakref.finalize(array, os.close, descriptor).atexit = False
    return array


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 2**63


def _limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of the control groups around this process; what the file cache could give back is free."""
    found = []
    with suppress(OSError):
        for line in _SELF.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = _CGROUPS / controllers
                group = root / path.lstrip("/")
                found += [group, *(parent for parent in group.parents if parent == root or root in parent.parents)]
    return [limit for group in dict.fromkeys([*found, _CGROUPS, _CGROUPS / "memory"]) for limit in _limit(group)]


def _limit(group: Path) -> list[tuple[int, int]]:
    for most, current in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with suppress(OSError, ValueError):  # ValueError: "max", no limit
            limit, used = (int((group / name).read_text()) for name in (most, current))
            lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return [(limit, used - int(lines.get("inactive_file", 0)))]
    return []


__all__ = ["free_memory", "host_memory", "shared"]
