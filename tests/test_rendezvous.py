"""Ranks find each other and nobody else; what is wrong with the environment is a line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from fasttrain import processes, rendezvous
from fasttrain.errors import UsageError

ROOT = Path(__file__).parent.parent
SECONDS = timedelta(seconds=60)
PLACE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
VARIABLES = (*PLACE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture
def place(monkeypatch):
    """A function that sets what a launcher sets."""

    def put(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
            if values.get(name):
                monkeypatch.setenv(name, values[name])

    return put


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": ""}, "RANK=0 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no whole number"),
        ({"RANK": "x"}, "RANK=x is no whole number"),
        ({"RANK": "2"}, "RANK=2 is none of the WORLD_SIZE=2 ranks"),
        ({"RANK": ""}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK=a is no whole number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR, the host of rank 0, is not"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(place, changed, message):
    place(**PLACE | changed)
    with pytest.raises(UsageError, match=message) as caught:
        rendezvous.check_place()
    assert "start ranks with deepspeed or torchrun, or unset RANK" in str(caught.value) or "give one" in message + str(
        caught.value
    )


def test_a_good_environment_and_none_at_all_pass(place):
    place(**PLACE)
    rendezvous.check_place()
    place()
    rendezvous.check_place()


@contextmanager
def taken() -> Iterator[str]:
    """A port that another program has."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield str(other.getsockname()[1])


def test_a_port_that_is_taken_is_named_with_the_remedy(place):
    with taken() as port:
        place(**PLACE | {"MASTER_PORT": port})
        with pytest.raises(UsageError, match=rf"port {port} \(MASTER_PORT\) is another .*--master_port="):
            rendezvous.meet(SECONDS)
        place(**PLACE | {"MASTER_PORT": port, "WORLD_SIZE": "1"})  # which nobody else has to know
        rendezvous.meet(SECONDS)
        assert os.environ["MASTER_PORT"] != port


RANK = """
import os
from datetime import timedelta
from fasttrain import rendezvous
from fasttrain.errors import UsageError
try:
    store = rendezvous.meet(timedelta(seconds=60))
    print(os.environ["MASTER_PORT"], flush=True)
    input()
except UsageError as error:
    print("refused", error, flush=True)
"""


def rank(**values: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | values
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", RANK], env=environment, **pipes)


def test_a_second_job_never_joins_the_store_of_the_first():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = PLACE | {"MASTER_PORT": port}
    ranks = [rank(**shared, LOCAL_RANK="0"), rank(**shared | {"RANK": "1"})]
    try:
        assert [process.stdout.readline().strip() for process in ranks] == [port, port]
        ranks += [rank(**shared), rank(**shared | {"RANK": "1"})]
        assert f"refused port {port} (MASTER_PORT) is another" in ranks[2].stdout.readline()
        assert f"refused rank 1 of another job is at 127.0.0.1:{port} already" in ranks[3].stdout.readline()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_on_one_host_deepspeeds_default_port_is_nobodys(place, monkeypatch, tmp_path):
    """Rank 0 takes a free one and tells those of the same launcher."""
    monkeypatch.setattr(processes, "launchers", lambda: [processes.Process(1, "2", "here")])
    monkeypatch.setattr(rendezvous.caches, "private_folder", lambda: str(tmp_path))
    place(**PLACE, CROSS_SIZE="1")
    told = rendezvous._told_by_file()
    assert told.parent == tmp_path
    rendezvous._write(told, "12345")
    assert rendezvous._read(told, SECONDS) == "12345"
    place(**PLACE, CROSS_SIZE="2")
    assert rendezvous._told_by_file() is None
    place(**PLACE | {"MASTER_PORT": "29501"}, CROSS_SIZE="1")  # which was asked for
    assert rendezvous._told_by_file() is None


def test_a_host_that_nobody_knows_is_named(place, monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.0)
    place(**PLACE | {"MASTER_ADDR": "no-such-host.invalid"})
    with pytest.raises(UsageError, match=r"MASTER_ADDR=no-such-host\.invalid is no host that can be found"):
        rendezvous.meet(SECONDS)
