"""A rank, its host or its launcher gone: the others end in time and name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fasttrain.watchdog import EXIT_RANK_LOST
from tests.faults.job import free_port

ROOT = Path(__file__).parent.parent
TIMEOUT = 3.0

RANK = f"""
import os, signal, sys, time
import torch, torch.distributed as dist
from fasttrain.errors import UsageError
from fasttrain.watchdog import Watchdog
dist.init_process_group("gloo")
rank = dist.get_rank()
watchdog = Watchdog({TIMEOUT}, hang_timeout={{hang}})
print("up", flush=True)
try:
{{body}}
except BaseException as failure:
    watchdog.leave(failure)
    raise
watchdog.leave()
print("left", flush=True)
os._exit(0)
"""
STEPS = """
    x = torch.zeros(1)
    while True:
        dist.all_reduce(x)
        watchdog.step += 1
        time.sleep(0.05)
"""
WAITS = "    time.sleep(3600)"  # as in a collective of a GPU, which no exception ends


def program(body: str, hang: float | None = None) -> list[str]:
    return [sys.executable, "-c", RANK.format(body=body, hang=hang)]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | {k: str(v) for k, v in place.items()} | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def job(*programs: list[str]) -> Iterator[list[subprocess.Popen]]:
    """A rank of each program, all of them up; killed at the end."""
    port, ranks = free_port(), []
    try:
        for rank, arguments in enumerate(programs):
            where = environment(rank, len(programs), port)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            ranks.append(subprocess.Popen(arguments, env=where, **pipes))
        for process in ranks:
            assert process.stdout.readline() == "up\n", process.stderr.read()
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen, within: float) -> str:
    """What the rank said on stderr; it has to end with the code of a lost rank."""
    began = time.monotonic()
    _, said = process.communicate(timeout=within + 60)  # the machine may be busy
    assert process.returncode == EXIT_RANK_LOST, said
    assert time.monotonic() - began < 60
    return said


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("body", [STEPS, WAITS])
def test_a_rank_killed_or_stopped_is_named_and_the_others_end(number, body):
    with job(program(body), program(body), program(body)) as ranks:
        ranks[1].send_signal(number)
        for survivor in (ranks[0], ranks[2]):
            said = ended(survivor, 1.1 * TIMEOUT + 2)
            assert f"rank 1 (process {ranks[1].pid} on " in said
        if number == signal.SIGSTOP:
            ranks[1].send_signal(signal.SIGCONT)
            ended(ranks[1], 5)


def test_a_lost_rank_was_heard_of_at_the_last_step_that_it_took_part_in():
    """Heartbeats come seldom: by the last one it was at step 0."""
    steps = "    x = torch.zeros(1)\n    for _ in range(15): dist.all_reduce(x); watchdog.step += 1\n"
    with job(program(steps + WAITS), program(steps + "    os._exit(1)")) as ranks:
        said = ended(ranks[0], 5)
        assert f"rank 1 (process {ranks[1].pid} on " in said and "last heard of at step 15" in said


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_zero_with_which_the_store_goes_is_named_too(number):
    with job(program(WAITS), program(WAITS)) as ranks:
        ranks[0].send_signal(number)
        assert f"rank 0 (process {ranks[0].pid} on " in ended(ranks[1], 2 * TIMEOUT)


def test_a_rank_that_fails_by_itself_tells_the_others_why():
    fails = '    time.sleep(0.5); raise UsageError("no batch for 120 s")'
    with job(program(WAITS), program(fails)) as ranks:
        said = ended(ranks[0], 5)
        assert "rank 1 (process" in said and "failed at step 0: UsageError: no batch for 120 s" in said


@pytest.mark.faults
def test_ranks_that_leave_in_order_are_not_missed():
    leaves, stays = "    pass", f"    time.sleep({2 * TIMEOUT})"
    with job(program(stays), program(leaves)) as ranks:
        assert ranks[0].wait(60) == 0 and ranks[1].wait(60) == 0


@pytest.mark.faults
def test_a_job_in_which_nobody_steps_ends_only_when_told_to():
    with job(program(WAITS, hang=2), program(WAITS, hang=2)) as ranks:
        assert "none has stepped for" in ended(ranks[0], 10)
        assert "none has stepped for" in ended(ranks[1], 10)


LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(3600)
"""
CHILD = """
import signal, sys, time
from fasttrain.watchdog import Watchdog
def stop(*_):
    open({told!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
watchdog = Watchdog(45.0)
open({up!r}, "w").close()
time.sleep(3600)
"""


@pytest.mark.parametrize(("name", "watched"), [("deepspeed", True), ("mine.py", False)])
def test_without_its_launcher_a_rank_stops_as_if_told_to(tmp_path, name, watched):
    """By SIGKILL or SIGTERM to ``deepspeed``, which passes it on to nobody. Other parents may end: think of nohup."""
    launcher, up, told = tmp_path / name, tmp_path / "up", tmp_path / "told"
    launcher.write_text(LAUNCHER)
    child = CHILD.format(up=str(up), told=str(told))
    with subprocess.Popen(
        [sys.executable, str(launcher), child], stdout=subprocess.PIPE, text=True, env=environment(0, 1, free_port())
    ) as process:
        pid = int(process.stdout.readline())
        try:
            assert until(up.exists, 120)
            process.kill()
            assert until(told.exists, 30 if watched else 4) == watched
        finally:
            process.kill()
            if not told.exists():
                os.kill(pid, signal.SIGKILL)


def until(condition, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()
