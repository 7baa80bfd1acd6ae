"""Memory that processes of a host share: found by its key, gone with the last of them; and how much there is."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from fasttrain.data import shared_memory

PROGRAM = """
import sys, time
import numpy as np
from fasttrain.data.shared_memory import shared

def fill(allocate):
    print("filled", flush=True)
    time.sleep(float(sys.argv[2]))
    allocate(1000)[:] = np.arange(1000) % 251
    return b"and more"

array, extra = shared(sys.argv[1], fill)
assert (array == np.arange(1000) % 251).all() and extra == b"and more"
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Processes that share what has a key, until their input ends."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    running = []

    def begin(key: str = "key", seconds: float = 0.0) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), key, str(seconds)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def test_the_second_finds_what_the_first_made_also_after_its_end(start):
    first = start(seconds=1.0)
    assert first.stdout.readline() == "filled\n"
    second = start()  # waits
    assert first.stdout.readline() == second.stdout.readline() == "has it\n"
    first.kill()
    first.wait()
    third = start()
    assert third.stdout.readline() == "has it\n"
    assert start("other").stdout.readline() == "filled\n"


def test_with_the_last_of_them_it_is_gone(start):
    for _ in range(2):
        process = start()
        assert [process.stdout.readline() for _ in range(2)] == ["filled\n", "has it\n"]
        process.kill()
        process.wait()


def test_nothing_is_said_of_what_nobody_has(start, tmp_path):
    process = start()
    assert [process.stdout.readline() for _ in range(2)] == ["filled\n", "has it\n"]
    process.kill()
    process.wait()
    assert start("other").stdout.readline() == "filled\n"
    assert [path.name for path in tmp_path.rglob("shared-*")] == ["shared-other"]


def test_one_that_was_killed_half_way_leaves_nothing(start):
    process = start(seconds=60)
    assert process.stdout.readline() == "filled\n"
    process.kill()
    process.wait()
    assert start().stdout.readline() == "filled\n"


def test_in_one_process_it_goes_with_the_last_array(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "private_folder", lambda: str(tmp_path))
    filled = []

    def fill(allocate) -> bytes:
        filled.append(allocate(10))
        filled[-1][:] = len(filled)
        return b""

    first, _ = shared_memory.shared("key", fill)
    second, _ = shared_memory.shared("key", fill)
    assert len(filled) == 1
    second[0] = 9
    assert first[0] == 9
    filled.clear()
    del first, second
    third, _ = shared_memory.shared("key", fill)
    assert len(filled) == 1 and third.tolist() == [1] * 10


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "private_folder", lambda: str(tmp_path))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            shared_memory.shared("key", lambda allocate: 1 / len(allocate(3)[:0]))


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/job/step", {"job/memory.max": "3000000", "job/memory.current": "2000000", "job/step/memory.max": "max"}),
        ("4:memory:/j", {"memory/j/memory.limit_in_bytes": "3000000", "memory/j/memory.usage_in_bytes": "2000000"}),
        ("0::/", {"memory.max": "3000000", "memory.current": "2000000"}),
    ],
    ids=["version 2", "version 1", "inside a container"],
)  # fmt: skip
def test_a_containers_limit_is_the_memory_there_is(tmp_path, monkeypatch, group, files):
    folders = {str((tmp_path / name).parent) for name in files}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for folder in folders:
        with open(f"{folder}/memory.stat", "w") as file:
            file.write("anon 5\ninactive_file 500000\n")
    (tmp_path / "self").write_text(f"{group}\n")
    monkeypatch.setattr(shared_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(shared_memory, "_SELF", tmp_path / "self")
    assert shared_memory.host_memory() == 3_000_000 and shared_memory.free_memory() == 1_500_000


def test_without_a_limit_it_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "_CGROUPS", tmp_path)
    total, free = shared_memory.host_memory(), shared_memory.free_memory()
    assert 0 < free <= total < 2**63
