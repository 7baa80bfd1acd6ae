"""Processes of this machine: which is which, which are gone, and which launched this one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process, told apart from a later one of the same number."""

    pid: int
    started: str  # clock ticks since boot
    space: str  # of process numbers: machine, boot, container

    def gone(self) -> bool:
        """Whether it has ended. Only a process of this machine and container can be asked after."""
        if self.space != _space():
            return False
        state, started, _ = _stat(self.pid)
        return state in "ZX" or started != self.started


def this() -> Process:
    return Process(os.getpid(), _stat(os.getpid())[1], _space())


def launchers() -> list[Process]:
    """The processes of ``deepspeed`` or ``torchrun`` above this one, nearest first."""
    found, pid = [], os.getppid()
    while pid > 1 and _is_launcher(pid):
        _, started, parent = _stat(pid)
        found.append(Process(pid, started, _space()))
        pid = parent
    return found


def _is_launcher(pid: int) -> bool:
    """Not a shell that names one in its command line, which may well end before its children."""
    try:
        program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (OSError, ValueError):
        return False
    named = {argument.rpartition("/")[2] for argument in arguments[:6]}
    launchers = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run"}
    return program.rpartition("/")[2].startswith("python") and not launchers.isdisjoint(named)


def _stat(pid: int) -> tuple[str, str, int]:
    """(state, start in clock ticks, parent); state "X", dead, where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", "", 0
    return fields[0], fields[19], int(fields[1])


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # nobody else's


__all__ = ["Process", "launchers", "this"]
