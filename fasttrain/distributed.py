"""The process group, agreement between ranks, and collectives that can be differentiated twice."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fasttrain import rendezvous
from fasttrain.errors import UsageError, explained
from fasttrain.precision import allow_tf32
from fasttrain.printable import printable
from fasttrain_kernels.heap import keep_heap

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]
SWITCH_INTERVAL = 2e-4
"""Seconds after which a thread gives the interpreter's lock to another that waits for it. Python's own 5 ms let files
that are read one by one slow a thread that launches operations 9 to 16 times; so it is 1.0 to 1.3 times, and three
times as many files are read."""


def initialize(
    device: Device = "auto", timeout: timedelta = timedelta(minutes=30), deterministic: bool = False
) -> torch.device:
    """Join the process group through DeepSpeed and return this rank's device; seed nothing.

    ``deterministic`` is :func:`choose_algorithms`'s, and matters on a GPU only.

    Under ``deepspeed`` or ``torchrun`` the launcher's environment says who we are; plain ``python`` is a world of one.
    The backend is NCCL on GPUs and gloo on CPUs.

    Raises:
        UsageError: ``device`` is "cuda" and there is none, there are fewer GPUs than ranks on this machine, or what the
            environment says of ranks, addresses and networks cannot be.
    """
    alone = not dist.is_initialized()
    if alone:
        rendezvous.check_place()
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device=cuda, but PyTorch sees no GPU here: use train.device=auto or cpu", everywhere=True
        )
    sys.setswitchinterval(SWITCH_INTERVAL)
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda and local_rank() >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {local_rank()} has no GPU ({torch.cuda.device_count()} visible): start one process a GPU"
        )
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(local_rank())
        choose_algorithms(deterministic)
    else:
        torch.set_num_threads(cores_per_rank())
        keep_heap()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # On a CPU the first initialisation would compile this op, for minutes and under a lock that a kill leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if cuda else "gloo"
    store = rendezvous.meet(timeout) if alone else None
    try:
        _join_restarted(backend, timeout)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    except (RuntimeError, ValueError) as error:
        raise rendezvous.explained(error) or error from None
    del store  # the process group has its own by now
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")


def choose_algorithms(deterministic: bool) -> None:
    """On a GPU: cuDNN's fastest for each shape, found by trying; or only what gives the same bits each time.

    In the second case an operation that has no such algorithm runs all the same, and PyTorch warns with its name.
    In either, float32 is not rounded to TF32, until :func:`fasttrain.precision.decide` is asked for that.
    """
    allow_tf32(False)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def _join_restarted(backend: str, timeout: timedelta) -> None:
    """Join after ``torchrun --max-restarts`` restarted the ranks of one machine.

    Its store outlives the ranks, and with it the addresses of those before: without names of their own the new ranks
    wait for the dead. (On several machines ranks cannot tell which restart it is; there torchrun needs
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``.)
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not shared or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"attempt-{attempt}", dist.TCPStore(*place, is_master=False, timeout=timeout))
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout)


def finalize() -> None:
    """Leave the process group, without which a process now and then aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cores_per_rank() -> int:
    """CPU cores this process may count as its own: those it is allowed to run on, shared among the machine's ranks."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it :func:`rank`, :func:`world_size`, :func:`all_gather` and :func:`all_reduce` are those of a process
    without others: what is computed in it by one rank waits for no other.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """This process's rank; before the process group is up, what the launcher says (0 without one)."""
    if _alone:
        return 0
    return dist.get_rank() if dist.is_initialized() else _stated("RANK", 0)


def world_size() -> int:
    """Number of ranks; before the process group is up, what the launcher says (1 without one)."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_initialized() else _stated("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's rank on its machine."""
    return _stated("LOCAL_RANK", 0)


def _stated(name: str, default: int) -> int:
    """What the launcher's environment says; what makes no sense there :func:`initialize` refuses."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def say(line: str) -> None:
    """A line on standard error for the person who watches, from rank 0, :func:`printable`, without breaking a bar."""
    if rank() == 0:
        with suppress(OSError):  # the terminal may be gone, and the work goes on
            tqdm.write(printable(line), file=sys.stderr)
            sys.stderr.flush()


def agree(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; where any rank raises :class:`UsageError`, or what becomes one, all ranks raise it.

    Without this, a mistake that only one rank meets (an unwritable disk, say) leaves the others in a collective.
    """
    result, complaint = None, None
    try:
        result = work()
    except Exception as error:
        if (line := explained(error)) is None:
            raise
        complaint = str(line)
    complaints = all_gather_object(complaint)
    for where, message in enumerate(complaints):
        if message is not None:
            alone = sum(text is not None for text in complaints) < len(complaints)
            raise UsageError(f"rank {where}: {message}" if alone else message, everywhere=True)
    return result  # type: ignore[return-value]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 alone and return its result, a JSON value, on every rank; a ``UsageError`` reaches all."""
    result = agree(lambda: work() if rank() == 0 else None)
    return json.loads(broadcast_bytes(json.dumps(result).encode()))


def all_gather_object(value: T) -> list[T]:
    """Every rank's ``value``, a JSON value, in rank order; what other ranks send is never unpickled."""
    return [json.loads(data) for data in all_gather_bytes(json.dumps(value).encode())]


def all_gather_bytes(data: bytes) -> list[bytes]:
    """Every rank's ``data``, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [data]
    sizes = [torch.zeros(1, dtype=torch.int64, device=_device()) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=_device()))
    sizes = [int(size) for size in sizes]
    mine = _from_bytes(data.ljust(max(sizes), b"\0"))
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine)
    return [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def broadcast_bytes(data: bytes) -> bytes:
    """Rank 0's ``data`` on every rank; what the others give is ignored."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return data
    size = torch.tensor([len(data)], device=_device())
    dist.broadcast(size, src=0)
    if rank() != 0:
        data = bytes(int(size))
    part = _from_bytes(data)
    dist.broadcast(part, src=0)
    return data if rank() == 0 else part.cpu().numpy().tobytes()


def _from_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device())


def _device() -> torch.device:
    """Where tensors must be for the default group's collectives."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank; all ranks together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    count = torch.tensor(int(flag), device=_device())
    dist.all_reduce(count)
    return bool(count)


def mean(values: dict[str, Tensor]) -> dict[str, float]:
    """Each scalar's mean over the ranks, in one all-reduce; all ranks give the same names in the same order."""
    total = torch.stack([value.detach().float() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def all_gather(x: Tensor) -> Tensor:
    """Stack every rank's ``x`` along a first dimension, ``[...] -> [world, ...]``; derivatives of any order are right.

    Its adjoint sums the ranks' gradients and keeps this rank's slice (a reduce-scatter), whose adjoint is this gather
    again. The usual gather, with a plain all-reduce in its backward, loses the graph there: its second-order gradients
    are wrong by a few percent. Without a process group it is ``x[None]``.
    """
    if not dist.is_initialized() or world_size() == 1:
        return x.unsqueeze(0)
    return _Gather.apply(x)


def all_reduce(x: Tensor) -> Tensor:
    """Sum ``x`` over the ranks; its adjoint is the same sum, so any order of derivative is right."""
    if not dist.is_initialized() or world_size() == 1:
        return x
    return _Sum.apply(x)


def exchanges() -> int:
    """How many of these gathers and sums this process has taken part in."""
    return _exchanges


_exchanges = 0


def _exchanged() -> None:
    global _exchanges
    _exchanges += 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        _exchanged()
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _ScatterSum.apply(gradient)


class _ScatterSum(torch.autograd.Function):
    """Sum ``[world, ...]`` over the ranks and keep this rank's entry."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        if dist.get_backend() == "gloo":  # gloo has no reduce-scatter of tensors
            total = x.clone()
            dist.all_reduce(total)
            return total[dist.get_rank()].clone()
        mine = torch.empty_like(x[0])
        dist.reduce_scatter_tensor(mine, x)
        return mine

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Gather.apply(gradient)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        _exchanged()
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)
