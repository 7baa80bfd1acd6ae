"""Two hosts on one machine: network namespaces joined by a wire (iproute2), each with a name of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fasttrain.watchdog import EXIT_RANK_LOST
from tests.test_launch import ROOT, SMALL, environment, metrics

pytestmark = pytest.mark.faults

ADDRESSES, NAMES, WIRE = ("10.77.0.1", "10.77.0.2"), ("hosta", "hostb"), "wire0"
PATIENCE = 500  # seconds: a busy machine takes minutes for what takes 20 s
LAUNCHERS = ("static", "c10d", "deepspeed")


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def spaces() -> Iterator[tuple[str, str]]:
    """The two namespaces; what is in the way of them skips the tests."""
    tag = os.getpid() % 100_000
    spaces = f"ft{tag}a", f"ft{tag}b"
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", f"{spaces[0]}w", "type", "veth", "peer", "name", f"{spaces[1]}w")
        for space, address in zip(spaces, ADDRESSES, strict=True):
            ip("link", "set", f"{space}w", "netns", space)
            ip("-n", space, "link", "set", f"{space}w", "name", WIRE)
            ip("-n", space, "addr", "add", f"{address}/24", "dev", WIRE)
            for device in ("lo", WIRE):
                ip("-n", space, "link", "set", device, "up")
        yield spaces
    except FileNotFoundError:
        pytest.skip("needs iproute2's ip")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine permits no network namespaces: {error.stderr.strip()}")
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def command(launcher: str, rank: int, folder: Path, script: str, *arguments: str) -> list[str]:
    """What is typed on host ``rank``."""
    program = [str(ROOT / "launch" / script), *SMALL, "train.device=cpu", *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    if launcher == "static":
        place = ["--node-rank", str(rank), "--master-addr", ADDRESSES[0], "--master-port", "29555"]
        return [*torchrun, *place, *program]
    if launcher == "c10d":
        place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", folder.name]
        place += ["--rdzv-conf", f"is_host={int(rank == 0)}", "--local-addr", ADDRESSES[rank]]
        return [*torchrun, *place, *program]
    hostfile = folder / "hostfile"
    hostfile.write_text("# as hostfile.example\n" + "".join(f"{address} slots=1\n" for address in ADDRESSES))
    place = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank)]
    place += ["--master_addr", ADDRESSES[0], "--master_port", "29556"]
    return [str(Path(sys.executable).parent / "deepspeed"), *place, *program]


class Job:
    """The same command on both hosts, ended whatever happens."""

    def __init__(self, spaces: tuple[str, str], launcher: str, folder: Path, script: str, *arguments: str) -> None:
        self.outputs = [folder / f"{name}.out" for name in NAMES]
        self.processes = []
        for rank, space in enumerate(spaces):
            named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', NAMES[rank]]
            with self.outputs[rank].open("w") as output:
                process = subprocess.Popen(
                    ["ip", "netns", "exec", space, *named, *command(launcher, rank, folder, script, *arguments)],
                    env=environment() | {"GLOO_SOCKET_IFNAME": WIRE, "DS_ACCELERATOR": "cpu"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def text(self) -> str:
        return "".join(output.read_text() for output in self.outputs)

    def codes(self, seconds: float = PATIENCE) -> list[int]:
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *failure: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_doctor_sees_both(spaces, launcher, images, tmp_path):
    with Job(spaces, launcher, tmp_path, "doctor.py", f"data.root={images}", f"run.dir={tmp_path / 'run'}") as job:
        codes, text = job.codes(), job.text()
    assert codes == [0, 0], text
    assert "2 ranks on 2 hosts (hosta, hostb)" in text and "over 2 ranks" in text
    assert "fail " not in text


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_ends_on_both(spaces, launcher, images, tmp_path):
    arguments = [f"data.root={images}", f"run.dir={tmp_path / 'run'}", "evaluate.every_epochs=0"]
    with Job(spaces, launcher, tmp_path, "pretrain.py", *arguments) as job:
        codes, text = job.codes(), job.text()
    assert codes == [0, 0], text
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


DISTURBANCES = (  # the second where the kernel lacks the first: a short queue drops what a slow wire cannot take
    ["netem", "delay", "20ms", "5ms", "loss", "1%"],
    ["tbf", "rate", "40mbit", "burst", "4kb", "limit", "32kb"],
)


def tc(space: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["tc", "-s", "-n", space, "qdisc", *arguments], capture_output=True, text=True)


@pytest.fixture
def disturb(spaces) -> Iterator[Callable[[], None]]:
    """A function that makes both ends of the wire lose and delay packets; undone in the end."""

    def begin() -> None:
        for disturbance in DISTURBANCES:
            done = [tc(space, "replace", "dev", WIRE, "root", *disturbance) for space in spaces]
            if not any(end.returncode for end in done):
                return
        pytest.skip(f"this kernel has neither netem nor tbf: {done[0].stderr.strip()}")

    yield begin
    for space in spaces:
        tc(space, "del", "dev", WIRE, "root")


def test_a_wire_that_loses_and_delays_changes_no_loss(spaces, disturb, images, tmp_path):
    losses = []
    for name in ("good", "bad"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "bad":
            disturb()
        arguments = [f"data.root={images}", f"run.dir={folder / 'run'}", "evaluate.every_epochs=0"]
        with Job(spaces, "c10d", folder, "pretrain.py", *arguments) as job:
            codes, text = job.codes(), job.text()
        assert codes == [0, 0], text
        losses.append([line["loss"] for line in metrics(folder / "run")])
    shown = [tc(space, "show", "dev", WIRE).stdout for space in spaces]
    dropped = [int(number) for text in shown for number in re.findall(r"dropped (\d+)", text)]
    assert losses[0] == losses[1] and sum(dropped) > 0, shown


def test_a_host_that_is_cut_off_for_good_ends_both_and_is_named(spaces, images, tmp_path):
    arguments = [f"data.root={images}", f"run.dir={tmp_path / 'run'}", "evaluate.every_epochs=0", "train.steps=100000"]
    arguments += ["run.heartbeat_timeout=20", "run.save_every=100000"]
    with Job(spaces, "static", tmp_path, "pretrain.py", *arguments) as job:
        deadline = time.monotonic() + PATIENCE
        while "step 2/" not in job.text() and time.monotonic() < deadline:
            time.sleep(0.2)
        ip("-n", spaces[1], "link", "set", WIRE, "down")
        began = time.monotonic()
        try:
            codes = job.codes(180)
        finally:
            ip("-n", spaces[1], "link", "set", WIRE, "up")
        took, text = time.monotonic() - began, [output.read_text() for output in job.outputs]
    assert 0 not in codes, text
    assert "rank 1 (process" in text[0] and "hostb" in text[0], text[0]
    assert str(EXIT_RANK_LOST) in text[0] and took < 90, (took, text[0])
