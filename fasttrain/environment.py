"""What a command ran on and what it was: hardware, versions, code, command line; an ``environment.json`` a run."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fasttrain
from fasttrain import distributed

CPUINFO = Path("/proc/cpuinfo")
DISTRIBUTIONS = {
    "Triton": "triton",
    "NumPy": "numpy",
    "numba": "numba",
    "DeepSpeed": "deepspeed",
    "FFCV": "ffcv",
    "torchvision": "torchvision",
    "kornia": "kornia",
    "lightly": "lightly",
    "solo-learn": "solo-learn",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "torchattacks": "torchattacks",
}


def environment() -> dict[str, Any]:
    """What this job is and runs on, as JSON has it; all ranks together, each has it.

    ``command`` with its ``arguments``, ``cwd`` (that its paths are relative to), ``started`` (UTC), ``slurm_job``
    (null: SLURM did not start it), ``ranks``, ``hosts`` and ``machines`` (each with its number of ranks), ``machine``,
    ``cpu`` and ``versions`` (rank 0's), ``git`` (of fasttrain's code; null: it is no checkout).
    """
    hosts, machines = zip(*distributed.all_gather_object([socket.gethostname(), hardware()]), strict=True)
    return distributed.on_rank_zero(
        lambda: {
            "command": command(),
            "arguments": arguments(),
            "cwd": folder(),
            "started": now(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "ranks": distributed.world_size(),
            "hosts": Counter(hosts),
            "machine": machines[0],
            "machines": Counter(machines),
            "cpu": processor(),
            "versions": versions(),
            "git": git_state(),
        }
    )


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def arguments() -> list[str]:
    """What the script was given, without what launchers add."""
    return [a for a in sys.argv[1:] if not a.replace("-", "_").startswith("__local_rank=")]


def command() -> str:
    """The script and its arguments, as a shell reads them; not what launched it."""
    script, here = Path(sys.argv[0]), folder()
    if here is not None and script.is_absolute() and script.is_relative_to(here):
        script = script.relative_to(here)
    return shlex.join([str(script), *arguments()])


def folder() -> str | None:
    """Where the command was started; None: it is not there any more."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def hardware() -> str:
    """The GPU, or the CPU and how many of its cores this process may use."""
    if torch.cuda.is_available():
        gibibytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        return f"{torch.cuda.get_device_name()}, {gibibytes:.0f} GiB"
    return processor()


def processor() -> str:
    """The CPU, and how many of its cores this process may use."""
    lines = []
    with suppress(OSError):
        lines = CPUINFO.read_text(errors="replace").splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)  # of the last core
    name = facts.get("model name", platform.processor() or platform.machine()).strip()  # ARM's have no name there
    kind = "".join(f", {key}{facts[key]}" for key in ("cpu family", "model") if key in facts)  # names are often vague
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' * (cores > 1)} of {name}{kind}"


def versions() -> dict[str, str]:
    """Of Python, the installed libraries that results depend on, and where there is a GPU of what drives it."""
    found = {"fasttrain": fasttrain.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    distributions = DISTRIBUTIONS | {"DALI": dali_package() or ""}
    for name, distribution in distributions.items():
        with suppress(metadata.PackageNotFoundError, ValueError):  # the latter of no name
            found[name] = metadata.version(distribution)
    if "DALI" in found:
        found["DALI"] += f" ({distributions['DALI']})"
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found |= {
            "driver": driver() or "unknown",
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def git_state() -> dict[str, Any] | None:
    """The commit of fasttrain's checkout, and whether files that git knows were changed since; None: it is none."""
    root = Path(fasttrain.__file__).parents[1]
    if not (root / ".git").exists():  # a checkout around an environment that fasttrain is installed in is another's
        return None
    git = ["git", "--no-optional-locks", "-C", str(root)]  # whoever commits meanwhile is not in its way
    try:
        said = [_said([*git, *words]) for words in (["rev-parse", "HEAD"], ["status", "-s", "-uno"])]
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": said[0], "changed": bool(said[1])}


def dali_package() -> str | None:
    """``nvidia-dali-cuda120`` or however it is called here."""
    names = (distribution.metadata["Name"] or "" for distribution in metadata.distributions())
    return next((name for name in names if name.lower().startswith("nvidia-dali-cuda")), None)


def driver() -> str | None:
    """The NVIDIA driver's version, by ``nvidia-smi``."""
    try:
        said = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split("\n")[0].strip() or None


def _said(words: list[str]) -> str:
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # another repository's
    done = subprocess.run(words, env=others, capture_output=True, timeout=60, check=True)
    return done.stdout.decode(errors="replace").strip()


__all__ = [
    "arguments",
    "command",
    "dali_package",
    "driver",
    "environment",
    "folder",
    "git_state",
    "hardware",
    "now",
    "processor",
    "versions",
]
