"""What the system says becomes a line with a remedy; what is ours to mend keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttrain import cli, distributed
from fasttrain.errors import REMEDIES, UsageError, explained

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """This process neither ends after its mistakes nor leaves Ctrl-C as they do."""
    monkeypatch.setattr(cli, "_end_soon", lambda code: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)


@pytest.mark.parametrize("number", [*REMEDIES, errno.ENODEV])
def test_an_error_of_the_system_is_a_line_with_file_and_remedy(number, capfd):
    def fail() -> int:
        raise OSError(number, os.strerror(number), "/some/where")

    assert cli._exit_code(fail, debug=False) == cli.EXIT_MISTAKE
    said = capfd.readouterr().err
    assert said.startswith(f"error: /some/where: {os.strerror(number)}: ") and said.count("\n") == 1
    assert cli._exit_code(fail, debug=True) == cli.EXIT_MISTAKE and "Traceback" in capfd.readouterr().err


def test_a_real_loop_of_links_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match=r"loop: Too many levels of symbolic links: mend the link"):
        distributed.agree(lambda: (tmp_path / "loop").read_text())


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …"),
    ],
)
def test_memory_that_ran_out_names_the_batch(failure):
    assert "out of memory (" in str(explained(failure)) and "split train.batch by train.accumulation" in str(
        explained(failure)
    )


def test_too_many_open_files_in_a_library_name_the_limit():
    failure = ImportError("filesystem error: cannot increment recursive directory iterator: Too many open files")
    assert "ulimit -n" in str(explained(failure))


def test_other_failures_keep_their_traceback(capfd):
    for failure in (RuntimeError("a bug"), OSError("image file is truncated")):

        def fail(failure=failure) -> int:
            raise failure

        assert explained(failure) is None and cli._exit_code(fail, debug=False) == cli.EXIT_FAILED
        assert "Traceback" in capfd.readouterr().err


PRINTS = """
import sys
from fasttrain import cli
from fasttrain.config import Config
class Nothing(Config):
    lines: int = 100000
def show(config):
    for line in range(config.lines):
        print(line)
    sys.stdout.flush()
    print("done", file=sys.stderr)
cli.main(Nothing, show, "")
"""


def printing(redirected: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    shell = ["bash", "-c", f'"$0" -c "$1" {redirected}; exit "${{PIPESTATUS[0]}}"', sys.executable, PRINTS]
    return subprocess.run(shell, env=environment, capture_output=True, text=True)


def test_a_reader_that_leaves_is_no_failure_and_the_work_is_done():
    done = printing("| head -n 1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "done\n")


def test_a_full_disk_under_what_is_printed_is_said_once():
    done = printing("> /dev/full")
    assert done.returncode == cli.EXIT_MISTAKE
    assert done.stderr.startswith("error: what is printed: No space left on device: ") and done.stderr.count("\n") == 1
