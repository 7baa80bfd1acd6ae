"""How the ranks of a job find each other, and never those of another job.

Launchers say where rank 0's store is by MASTER_ADDR and MASTER_PORT. ``torchrun`` holds the store itself. ``deepspeed``
names port 29500 for every job: on one host rank 0 takes a free one instead, and tells the others by a file that is
named after their launcher. Wherever a port is shared all the same, the second job is refused.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from fasttrain import processes
from fasttrain.errors import UsageError
from fasttrain_kernels import caches

DEFAULT_PORT = "29500"
"Of deepspeed's launcher, where --master_port is not given."
PATIENCE = 30.0
"Seconds for the name MASTER_ADDR to be known: in a cluster it may come with its host."
LEAVE = "start ranks with deepspeed or torchrun, or unset RANK for one process"


def check_place() -> None:
    """Whether the environment says who this rank is.

    Raises:
        UsageError: a variable is missing, no number, or contradicts another.
    """
    if "RANK" not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set and RANK is not: {LEAVE} and WORLD_SIZE")
        return
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < world:
        raise UsageError(f"RANK={rank} is none of the WORLD_SIZE={world} ranks, which count from 0: {LEAVE}")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name):
            _number(name)
    if not os.environ.get("MASTER_ADDR"):
        raise UsageError(f"RANK={rank} is set and MASTER_ADDR, the host of rank 0, is not: {LEAVE}")
    if not 0 < _number("MASTER_PORT") < 2**16:
        raise UsageError(f"MASTER_PORT={os.environ['MASTER_PORT']} is no port: give one from 1024 to 65535")


def _number(name: str) -> int:
    text = os.environ.get(name)
    if not text:
        raise UsageError(f"RANK={os.environ['RANK']} is set and {name} is not: {LEAVE}")
    if not text.isdecimal():
        raise UsageError(f"{name}={text} is no whole number: {LEAVE}")
    return int(text)


def meet(timeout: timedelta) -> dist.Store | None:
    """Let MASTER_PORT be a port of this job alone. The store at it, to be kept until the process group is up.

    Raises:
        UsageError: the port is another's, or nobody knows the host MASTER_ADDR.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _resolve(os.environ["MASTER_ADDR"])
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _resolve(os.environ["MASTER_ADDR"])
    told = _told_by_file() if world > 1 else None
    if world == 1 or told is not None:  # 0 is any that is free
        os.environ["MASTER_PORT"] = "0" if rank == 0 else _read(told, timeout)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _store(rank, timeout)
    if told is not None and rank == 0:
        _write(told, str(store.port))
    if store.compare_set(f"fasttrain/rank {rank}", "", me := str(processes.this())).decode() != me:
        raise UsageError(f"rank {rank} of another job is at {place} already: {_another_port()}")
    if rank == 0:
        store.wait([f"fasttrain/rank {other}" for other in range(world)], timeout)
        if told is not None:
            told.unlink(missing_ok=True)
    return store


def _store(rank: int, timeout: timedelta) -> dist.TCPStore:
    """Rank 0's store; ``multi_tenant``, since the process group will open it once more by the same address."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        if rank == 0 and "EADDRINUSE" in str(error):
            raise UsageError(f"port {port} (MASTER_PORT) is another program's, or job's: {_another_port()}") from None
        raise
    os.environ["MASTER_PORT"] = str(store.port)
    return store


def _another_port() -> str:
    return "give this job a port of its own (deepspeed --master_port=…, torchrun --master-port=…, or MASTER_PORT)"


def explained(error: Exception) -> UsageError | None:
    """What in the network's settings kept the process group from coming up; None where it is something else."""
    text = " ".join(str(error).split())
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if (named and named in text) or "ifa != nullptr" in text:
        has = ", ".join(name for _, name in socket.if_nameindex())
        return UsageError(f"GLOO_SOCKET_IFNAME={named} is no network interface of this host: it has {has}")
    return None


def _resolve(host: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"MASTER_ADDR={host} is no host that can be found ({error}): give the address of rank 0's "
                    "(deepspeed --master_addr, torchrun --master-addr)"
                ) from None
            time.sleep(1)


def _told_by_file() -> Path | None:
    """Where rank 0 tells the port; None where ranks cannot all see it, or a port was asked for."""
    here = os.environ.get("CROSS_SIZE") == "1" and os.environ["MASTER_PORT"] == DEFAULT_PORT  # of deepspeed's launcher
    launchers = processes.launchers() if here else []
    if not launchers:
        return None
    name = hashlib.blake2b(repr(launchers[0]).encode(), digest_size=8).hexdigest()
    return Path(caches.private_folder(), f"port-{name}")


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _read(path: Path, timeout: timedelta) -> str:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            return path.read_text()
        time.sleep(0.05)
    raise UsageError(f"rank 0 has not come within {timeout.total_seconds():.0f} s: see its output")


__all__ = ["check_place", "explained", "meet"]
