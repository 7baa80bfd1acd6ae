"""What is there: versions, the GPU and its driver, and whether all that is needed imports."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from importlib import import_module

import torch

from fasttrain.benchmarks.truth.row import Row
from fasttrain.environment import hardware, versions

NEEDED = ("numpy", "numba", "pydantic", "safetensors", "deepspeed", "fasttrain.engine", "fasttrain_kernels.batchnorm")
OPTIONAL = ("triton", "nvidia.dali", "ffcv", "pytest", "xdist", "matplotlib")
COMMANDS = {
    "nvidia-smi": "nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader",
    "processor": "lscpu | grep 'Model name' | head -n 1",
    "compiler": "${CC:-cc} --version | head -n 1",  # Triton needs one
    "memory": "free -g | sed -n 2p",
}


def facts() -> Iterator[Row]:
    """Commands that are not there say so and are no failure; a package that is needed and does not import is one."""
    yield Row("machine", hardware())
    for name, version in versions().items():
        yield Row(name, version)
    for name, command in COMMANDS.items():
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        yield Row(name, " ".join((done.stdout or done.stderr).split()) or "says nothing")
    yield Row("cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")
    if torch.cuda.is_available():
        yield Row("architectures", " ".join(torch.cuda.get_arch_list()))
    for name in NEEDED + OPTIONAL:
        try:
            version = getattr(import_module(name), "__version__", "")
            yield Row(name, f"imports {version}".rstrip(), True)
        except Exception as error:
            reason = f"does not import ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            yield Row(name, reason, False if name in NEEDED else None)


__all__ = ["facts"]
