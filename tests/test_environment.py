"""What a command says of itself: what it was, where and on what it ran, and whether it was done."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

import fasttrain
from fasttrain import environment
from fasttrain.config import Config
from fasttrain.errors import UsageError
from fasttrain.run import Run, RunConfig
from tests.ranks import run_ranks


class Settings(Config):
    run: RunConfig


def life(folder: Path, start: int = 0, done: bool = True, **options) -> None:
    """A run that goes on at ``start`` and has nothing to do."""
    with Run(RunConfig(dir=str(folder), **options)) as run:
        run.open(Settings(run=run.config), start, 9)
        if done:
            run.done()


def left(folder: Path) -> dict:
    return json.loads((folder / "environment.json").read_text())


def recent(time: str) -> bool:
    then = datetime.fromisoformat(time)
    return timedelta(seconds=-1) < datetime.now(timezone.utc) - then < timedelta(minutes=5)


# A run's file --------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_was_and_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "launch/pretrain.py"), "--local_rank=0", "run.dir=a folder"])
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    life(tmp_path / "run")
    found = left(tmp_path / "run")
    assert found["command"] == "launch/pretrain.py 'run.dir=a folder'" and found["arguments"] == ["run.dir=a folder"]
    assert found["cwd"] == str(tmp_path) and found["slurm_job"] == "123"
    assert found["ranks"] == 1 and found["hosts"] == {os.uname().nodename: 1}
    assert found["machines"] == {found["machine"]: 1} == {environment.hardware(): 1}
    assert found["cpu"] == environment.processor() and found["versions"]["torch"] == torch.__version__
    assert recent(found["started"]) and recent(found["done"]) and (found["step"], found["earlier"]) == (0, [])


def test_a_run_that_goes_on_keeps_what_its_earlier_starts_said(tmp_path):
    life(tmp_path, 0, done=False)
    first = left(tmp_path)
    life(tmp_path, 3, done=False)
    second = left(tmp_path)
    life(tmp_path, 5)
    third = left(tmp_path)
    assert (first["step"], second["step"], third["step"]) == (0, 3, 5)
    assert first["done"] is second["done"] is None and recent(third["done"])
    without = [{key: value for key, value in start.items() if key != "earlier"} for start in (first, second)]
    assert third["earlier"] == without and second["earlier"] == without[:1]
    life(tmp_path, 0)  # anew: nothing is left of those
    assert left(tmp_path)["earlier"] == []


UNREADABLE = [
    b"",
    b"\xff",
    b"{",
    b"5",
    b"[]",
    b"{}",
    b'{"earlier": 5}',
    b'{"earlier": ["no start"]}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_cannot_be_read_is_set_aside_and_the_run_goes_on(tmp_path, capfd, content):
    (tmp_path / "environment.json").write_bytes(content)
    life(tmp_path, 3)
    assert left(tmp_path)["step"] == 3 and left(tmp_path)["earlier"] == []
    assert (tmp_path / "environment.json.unreadable").read_bytes() == content
    assert "environment.json cannot be read" in capfd.readouterr().err


def test_a_disk_that_is_full_is_a_line_and_the_file_that_was_there_stays(tmp_path, capfd, monkeypatch):
    life(tmp_path, 0, done=False)
    before = left(tmp_path)

    def full(path: Path, content: str | bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasttrain.run.replace_file", full)
    life(tmp_path, 3, on_save_error="continue")
    assert left(tmp_path) == before and "No space left" in capfd.readouterr().err
    with pytest.raises(UsageError, match="No space left"):
        life(tmp_path, 3)


def _on_rank(folder: Path) -> dict:
    """Each rank is a host and has a machine of its own."""
    rank = torch.distributed.get_rank()
    environment.socket.gethostname = lambda: f"node{rank}"
    environment.hardware = lambda: f"GPU {'AB'[rank]}"
    life(folder)
    return environment.environment()


def test_ranks_are_counted_by_host_and_by_machine(tmp_path):
    first, second = run_ranks(2, _on_rank, tmp_path)
    for found in (first, second, left(tmp_path)):
        assert (found["ranks"], found["machine"]) == (2, "GPU A")
        assert found["hosts"] == {"node0": 1, "node1": 1} and found["machines"] == {"GPU A": 1, "GPU B": 1}


# Its parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local-rank=3"])
def test_what_launchers_add_is_no_argument(monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["/elsewhere/eval.py", flag, "knn", "a b", "--debug"])
    assert environment.arguments() == ["knn", "a b", "--debug"]
    assert environment.command() == "/elsewhere/eval.py knn 'a b' --debug"


def test_a_folder_that_is_gone_is_none(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["/elsewhere/eval.py"])
    assert environment.folder() is None and environment.command() == "/elsewhere/eval.py"


def test_the_processor_has_a_name_whatever_the_system_tells(tmp_path, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    start = f"{cores} core{'s' * (cores > 1)} of "
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(environment, "CPUINFO", told)
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    assert environment.processor() == f"{start}aarch64"  # nothing is there
    told.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert environment.processor() == f"{start}aarch64"
    told.write_text("model name\t: A CPU\ncpu family\t: 25\nmodel\t\t: 1\n\n")
    assert environment.processor() == f"{start}A CPU, cpu family 25, model 1"


def test_versions_name_dali_whatever_cuda_it_is_for(monkeypatch):
    monkeypatch.setattr(environment, "dali_package", lambda: "nvidia-dali-cuda130")
    known = environment.metadata.version
    monkeypatch.setattr(environment.metadata, "version", lambda n: "2.4.0" if n.startswith("nvidia-dali") else known(n))
    assert environment.versions()["DALI"] == "2.4.0 (nvidia-dali-cuda130)"
    monkeypatch.setattr(environment, "dali_package", lambda: None)
    assert "DALI" not in environment.versions()


@pytest.mark.parametrize(
    ("program", "expected"),
    [("echo 570.1; echo 570.1", "570.1"), ("exit 9", None), ("printf '\\377\\n'", "\ufffd"), ("true", None)],
)
def test_the_driver_is_what_nvidia_smi_says(tmp_path, monkeypatch, program, expected):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert environment.driver() == expected
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.driver() is None


def git(*words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    return environment._said(["git", *identity, *words])


def test_the_code_is_a_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    module = tmp_path / "code" / "fasttrain" / "__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(fasttrain, "__file__", str(module))
    git("init", str(tmp_path))  # around an environment that it is installed in: another's
    assert environment.git_state() is None
    root = str(tmp_path / "code")
    git("init", root)
    assert environment.git_state() is None  # nothing was committed yet
    git("-C", root, "add", ".")
    git("-C", root, "commit", "-m", "one")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of the other
    commit = git("-C", root, "rev-parse", "HEAD")
    assert environment.git_state() == {"commit": commit, "changed": False} and len(commit) == 40
    module.with_name("new.py").write_text("")
    assert environment.git_state() == {"commit": commit, "changed": False}
    module.write_text("1")
    assert environment.git_state() == {"commit": commit, "changed": True}
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.git_state() is None
