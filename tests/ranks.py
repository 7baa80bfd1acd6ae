"""Run a function on several gloo ranks, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """``[function(*arguments) on rank 0, on rank 1, …]``, with the process group up on each.

    ``function`` (a module's own, so that it pickles) asks ``torch.distributed`` for its rank. Results come back
    pickled: return CPU tensors, numbers, strings. Whatever happens, no process outlives the call.

    Raises:
        RuntimeError: a rank raised (its traceback is quoted) or died.
        TimeoutError: not all ranks answered within ``timeout`` seconds.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        ranks = [
            context.Process(target=_rank, args=(rank, world, store, timeout, answers, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            results = _collect(ranks, answers, time.monotonic() + timeout, timeout)
            for process in ranks:
                process.join(10)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world)]


def _collect(ranks: list, answers: Any, deadline: float, timeout: float) -> dict[int, Any]:
    results: dict[int, Any] = {}
    dead_since = None
    while len(results) < len(ranks):
        try:
            rank, result, failure = answers.get(timeout=0.1)
        except queue.Empty:
            dead = [r for r, process in enumerate(ranks) if r not in results and process.exitcode is not None]
            dead_since = (dead_since or time.monotonic()) if dead else None
            if dead_since and time.monotonic() - dead_since > 1:  # an answer may still be in the pipe
                raise RuntimeError(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(ranks))) - results.keys())
                raise TimeoutError(f"no answer from ranks {missing} within {timeout} s") from None
            continue
        if failure is not None:
            raise RuntimeError(f"rank {rank} raised:\n{failure}")
        results[rank] = pickle.loads(result)
    return results


def _rank(
    rank: int, world: int, store: str, timeout: float, answers: Any, function: Callable, arguments: tuple
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        # pickled here and in full: a queue's own pickling would share the tensors' memory, which dies with this process
        result, failure = pickle.dumps(function(*arguments)), None
    except BaseException:
        result, failure = None, traceback.format_exc()
    answers.put((rank, result, failure))
    answers.close()
    answers.join_thread()
    if failure is None:
        dist.barrier()
        dist.destroy_process_group()
