"""The exceptions that reach a person as a line instead of a traceback, and which others become one."""

from __future__ import annotations

import errno
import os
import traceback

import torch

from fasttrain.printable import printable


class UsageError(Exception):
    """A mistake that its maker can mend: the message is one line that names the offending value and the remedy.

    ``everywhere`` tells that all ranks raise it together, so that one of them speaks for all.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(printable(message))
        self.everywhere = everywhere


class NotFinite(UsageError):
    """Features, scores or weights of which no metric can be made; the message says which, and why where that is known.

    Raised on all ranks together. A command ends with it; while training, the metric is NaN and this its line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, everywhere=True)


REMEDIES = {
    errno.ENOSPC: "free space or inodes there (df -h, df -i), or choose another place",
    errno.EDQUOT: "free space of your quota, or choose another place",
    errno.EACCES: "get the permission, or choose another place",
    errno.EPERM: "get the permission, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ELOOP: "mend the link, which leads back to itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of that path is no folder: mend the path",
    errno.EISDIR: "a folder is where a file should be: mend the path",
    errno.EEXIST: "something else has that name: move it away, or choose another",
    errno.ENOENT: "mend the path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the whole machine has no more open files: raise fs.file-max",
    errno.ENOMEM: "free memory, or ask for less",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u, or the container's)",
    errno.EADDRINUSE: "another program has that port: choose another (deepspeed --master_port=…)",
    errno.EADDRNOTAVAIL: "that address is not this machine's: mend MASTER_ADDR",
    errno.EIO: "the disk or its server fails: see dmesg, or choose another place",
    errno.ESTALE: "the network file system has lost it: mount it again, or choose another place",
}
"What to do about what the system says."


def explained(error: BaseException) -> UsageError | None:
    """``error`` as a line, where the system refused something or memory ran out; None: it is of another kind."""
    if isinstance(error, UsageError):
        return error
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        remedy = REMEDIES.get(error.errno, "mend that and run the same command again")
        return UsageError(f"{_file(error)}{error.strerror}: {remedy}")
    if (refused := os.strerror(errno.EMFILE)) in str(error):  # as libraries say it that are not Python's
        return UsageError(f"{refused}: {REMEDIES[errno.EMFILE]}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        text = " ".join(str(error).split())[:200] or "of this machine"
        return UsageError(f"out of memory ({text}): lower the batch, or split train.batch by train.accumulation")
    return None


def _file(error: OSError) -> str:
    """What it is about, with a colon; locks between processes lie in /dev/shm, and their errors do not say so."""
    if isinstance(error.filename, str | bytes):
        return os.fsdecode(error.filename) + ": "
    raised = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return "/dev/shm: " if raised and raised[-1].endswith("multiprocessing/synchronize.py") else ""
