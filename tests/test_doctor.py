"""The doctor's findings where something is wrong, its table and exit code as a person sees them; the SLURM file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fasttrain import cli, distributed, doctor
from fasttrain.config import load
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.errors import UsageError
from fasttrain.optim import OptimizerConfig
from fasttrain.run import RunConfig, read_metrics
from tests.ranks import run_ranks
from tests.test_launch import ROOT, SMALL, environment, metrics, script

MB = 1_000_000


def run(*arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    command = [*launcher, str(ROOT / "launch" / "doctor.py"), *SMALL, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)


def status(output: str, name: str) -> str:
    """Of a line of the table."""
    return next(line.split()[0] for line in output.splitlines() if line[8:].startswith(name))


def test_a_sound_machine_passes_with_a_line_a_check(images, tmp_path):
    done = run(f"data.root={images}", f"run.dir={tmp_path / 'run'}", "train.device=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["ranks", "versions", "GPU", "open files", "shared memory", "apex", "FFCV", "clocks", "decode on cpu"]
    for name in [*names, "collective", "data, val", "loader", "run.dir"]:
        assert status(done.stdout, name) in ("ok", "warning")
    assert status(done.stdout, "data, train") == "warning" and f"launch/prepare.py data.root={images}" in done.stdout
    assert "torch 2" in done.stdout and not (tmp_path / "run").exists() and not list(tmp_path.iterdir())


def test_two_ranks_and_a_folder_that_cannot_be_written(images, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    (tmp_path / "file").write_text("")
    done = run(f"data.root={images}", "run.dir=/proc/run", "train.device=cpu", launcher=launcher)
    assert done.returncode and status(done.stdout, "run.dir") == "fail"
    assert "choose another run.dir" in done.stdout and status(done.stdout, "collective") == "ok"
    assert done.stdout.count("ranks             2 ranks on 1 hosts") == 1  # one table, not one a rank


def test_a_mistake_in_the_configuration_is_a_finding(tmp_path):
    done = run("data.root=/nowhere", f"run.dir={tmp_path}", "train.device=cpu")
    assert done.returncode == cli.EXIT_MISTAKE
    assert status(done.stdout, "configuration") == "fail" and "'/nowhere' does not exist" in done.stdout


def test_the_limits_of_a_machine(monkeypatch):
    for most, expected in ((512, "fail"), (1024, "warning"), (1 << 20, "ok")):
        monkeypatch.setattr(doctor.resource, "getrlimit", lambda which, most=most: (most, most))
        assert doctor.open_files().status == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for free, expected in ((100, "fail"), (300, "warning"), (600, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free << 20))
        assert doctor.shared_memory().status == expected
    monkeypatch.undo()
    assert doctor.shared_memory("/nowhere").status == "fail"


def test_a_gpu_that_pytorch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver", lambda: "470.0")
    assert doctor.gpu("auto").status == doctor.gpu("cuda").status == "fail"
    assert "driver 470.0" in doctor.gpu("auto").what and doctor.gpu("cpu").status == "warning"
    monkeypatch.setattr(doctor, "driver", lambda: None)
    assert doctor.gpu("auto").status == "ok" and doctor.gpu("cuda").status == "fail"


def pretend_gpus(monkeypatch, count=2, capability=(9, 0), free=0.99):
    properties = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "get_device_name": lambda index: "H200",
        "get_device_capability": lambda index: capability,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "mem_get_info": lambda index: (int(free * 2**37), 2**37),
    }
    for name, function in properties.items():
        monkeypatch.setattr(torch.cuda, name, function)


def test_gpus_too_few_too_new_and_taken(monkeypatch):
    pretend_gpus(monkeypatch)
    assert doctor.gpu("auto") == doctor.Finding("GPU", "ok", "2 x H200, 127 of 128 GiB free")
    pretend_gpus(monkeypatch, free=0.5)
    assert doctor.gpu("auto").status == "warning"
    pretend_gpus(monkeypatch, capability=(12, 0))
    assert doctor.gpu("auto").status == "fail" and "sm_120" in doctor.gpu("auto").what
    pretend_gpus(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert doctor.gpu("auto").what == "2 for 3 ranks on this machine"


def test_a_machine_with_a_gpu_is_told_how_it_is_measured():
    line = doctor.measuring().line()
    assert line.startswith("ok") and "python launch/bench.py gpu" in line
    assert load(script("bench").GpuBench, ["gpu"], positional=("task",)).minutes == 8  # and that is a command


def test_what_is_absent_fails_only_where_it_is_needed(monkeypatch):
    def absent():
        raise UsageError("no")

    monkeypatch.setattr(doctor, "require_apex", absent)
    assert doctor.apex(OptimizerConfig()).status == "ok" and "NVIDIA/apex" in doctor.apex(OptimizerConfig()).remedy
    assert doctor.apex(OptimizerConfig(name="adamw", implementation="apex")).status == "fail"

    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert doctor.ffcv(LoaderConfig()).status == "ok" and doctor.ffcv(LoaderConfig(kind="ffcv")).status == "fail"


def test_room_for_the_checkpoints(tmp_path, monkeypatch):
    module = nn.Linear(1000, 1000, bias=False)  # 4 MB, and as much for each state of the optimiser
    for name, one in (("sgd", 8), ("adamw", 12)):
        for free, expected in ((4 * one - 1, "fail"), (4 * one + 1, "warning"), (8 * one + 1, "ok")):
            monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free * MB))
            found = doctor.disk(RunConfig(dir=str(tmp_path / "a/b"), keep=3), OptimizerConfig(name=name), module, 100)
            assert (found.status, found.what.rsplit(": ")[1]) == (expected, f"4 x {one}.0 MB")
    some = RunConfig(dir=str(tmp_path), keep=2, save_every=10, keep_every=20, keep_best="max:knn_top1")
    assert doctor.disk(some, OptimizerConfig(name="sgd"), module, 100).what.endswith(": 9 x 8.0 MB")
    assert not list(tmp_path.iterdir())


def test_a_decoder_that_is_wrong_or_broken(monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert doctor.decode(torch.device("cpu")).status == "ok"
    decode = doctor.Image.open
    monkeypatch.setattr(doctor.Image, "open", lambda path: decode(path).rotate(90))
    assert doctor.decode(torch.device("cpu")).status == "fail"
    monkeypatch.setattr(doctor, "make_loader", lambda *arguments: 1 / 0)
    found = doctor.attempt("decode on cpu", lambda: doctor.decode(torch.device("cpu")), "mend it")
    assert found == doctor.Finding("decode on cpu", "fail", "ZeroDivisionError: division by zero", "mend it")


def _two_ranks_differ(root: str, elsewhere: str) -> list:
    first = distributed.rank() == 0
    doctor.versions = lambda: {"torch": "2.13" if first else "2.12", "Python": "3.11"}
    clock, ahead = time.time, 0.0 if first else 100.0
    doctor.time.time = lambda: clock() + ahead
    catalog = open_catalog(DataConfig(root=root if first else elsewhere), "train")
    mine = [doctor.Finding("a", "ok", "fine"), doctor.Finding("b", "ok" if first else "fail", "so", "do")]
    run = RunConfig(dir=root if first else elsewhere)
    findings = [doctor.same_versions(), doctor.clocks(), *doctor.same_data([catalog], root), *doctor.joined(mine)]
    findings += [doctor.collective(torch.device("cpu"), nn.Linear(10, 10))]
    seen = Path.is_file
    Path.is_file = lambda self: seen(self) and first  # as where rank 1 has a disk of its own
    findings += [doctor.disk(run, OptimizerConfig(), nn.Linear(2, 2), 1)]
    Path.is_file = seen
    return [tuple(finding) for finding in findings]


def test_what_differs_between_ranks(images, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / "other"))
    (other / "train/cat/0.jpg").unlink()
    left, right = run_ranks(2, _two_ranks_differ, str(images), str(other))
    assert left[0][1] == "fail" and "torch differs: 2.12 (" in left[0][2]
    assert left[1][1] == "warning" and left[1][2].startswith("rank 0 is ") and left[1][2].endswith(" s behind rank 1")
    assert left[2][1] == "fail" and left[2][2].startswith("rank 1 lists other images than rank 0")
    assert left[3] == ("a", "ok", "fine", "") and left[4] == ("b", "fail", "rank 1: so", "do")
    assert left[5][1] == "ok" and "over 2 ranks" in left[5][2]
    assert left[6][1] == "fail" and left[6][2].startswith("rank 1 does not see")
    assert [finding[1] for finding in right] == [finding[1] for finding in left]


# SLURM ---------------------------------------------------------------------------------------------------------------

SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
STUBS = {
    "scontrol": 'case "$1" in show) printf "node1\\nnode2\\n";; *) echo "$@" > "$NOTES/scontrol";; esac',
    "scancel": 'echo "$@" > "$NOTES/scancel"; kill -TERM "$(cat "$NOTES/pid")"',
    "srun": 'shift; export SLURM_NODEID=${NODE:-0}; exec "$@"',
    "torchrun": 'trap \'exit ${AFTER:-1}\' TERM; echo $$ > "$NOTES/pid"; echo "$@" > "$NOTES/torchrun"\n'
    '[ -n "$WAIT" ] || exit ${CODE:-0}; while :; do sleep 0.05; done',
}


@pytest.fixture
def sbatch(tmp_path):
    """Start the file as SLURM would, with stand-ins for its commands that leave notes."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "notes").mkdir()
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    slurm |= {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "NOTES": str(tmp_path / "notes"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }

    started = []

    def start(*arguments: str, **variables: str) -> subprocess.Popen:
        """``variables``: what differs from two nodes of eight GPUs."""
        command, settings = ["bash", str(SBATCH), *arguments], environment() | slurm | variables
        started.append(subprocess.Popen(command, env=settings, start_new_session=True))
        return started[-1]

    start.notes = tmp_path / "notes"
    yield start
    for job in started:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.parametrize("node", ["0", "1"])
def test_slurm_starts_one_torchrun_a_node(sbatch, node):
    assert sbatch("pretrain", "a.yaml", "data.root=/a b", NODE=node).wait(30) == 0
    started = (sbatch.notes / "torchrun").read_text().strip()
    assert started.endswith("--max-restarts 3 launch/pretrain.py a.yaml data.root=/a b")
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29400" in started
    assert f"--rdzv-conf is_host={int(node == '0')} --rdzv-id 42.0" in started


def test_slurm_passes_a_failure_on_and_does_not_queue_it_again(sbatch):
    assert sbatch("doctor", CODE="2").wait(30) == 2
    assert not (sbatch.notes / "scontrol").exists()
    assert sbatch(CODE="0").wait(30) != 0  # without a script's name


@pytest.mark.parametrize("after", ["1", "0"])
def test_slurm_ends_the_run_before_the_limit_and_queues_it_again_unless_it_is_done(sbatch, after):
    job = sbatch("pretrain", WAIT="yes", AFTER=after)
    deadline = time.monotonic() + 30
    while not (sbatch.notes / "torchrun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    notes = {path.name: path.read_text().strip() for path in sbatch.notes.iterdir()}
    assert notes["scancel"] == "--signal=TERM 42" and notes.get("scontrol") == ("requeue 42" if after == "1" else None)


@pytest.mark.faults
def test_slurm_ends_a_real_run_which_goes_on_when_it_is_started_again(sbatch, images, tmp_path):
    (tmp_path / "torchrun").unlink()
    (tmp_path / "srun").write_text('#!/bin/bash\nshift; echo $$ > "$NOTES/pid"; export SLURM_NODEID=0; exec "$@"\n')
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{STUBS['scontrol'].replace('node1', 'localhost')}\n")
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "MASTER_PORT": "29477", "PATH": path}
    steps = ["train.steps=60", "train.device=cpu", "evaluate.every_epochs=0"]
    arguments = ["pretrain", *SMALL, *steps, f"data.root={images}", f"run.dir={tmp_path / 'run'}"]
    job = sbatch(*arguments, **variables)
    deadline = time.monotonic() + 300
    while not (seen := read_metrics(tmp_path / "run/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0
    stopped = metrics(tmp_path / "run")[-1]["step"]
    assert seen and stopped < 60 and (sbatch.notes / "scontrol").read_text() == "requeue 42\n"
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{stopped:08d}"
    assert sbatch(*arguments, **variables).wait(300) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 61))
