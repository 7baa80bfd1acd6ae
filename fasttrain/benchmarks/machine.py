"""What a benchmark ran on: hardware and versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

DISTRIBUTIONS = {
    "torch": "torch",
    "Triton": "triton",
    "numba": "numba",
    "DeepSpeed": "deepspeed",
    "DALI": "nvidia-dali-cuda120",
    "FFCV": "ffcv",
    "lightly": "lightly",
    "solo-learn": "solo-learn",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "torchattacks": "torchattacks",
}


def hardware() -> str:
    """The GPU, or the CPU and how many of its cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)  # of the last core
    name = facts.get("model name", platform.processor()).strip()
    kind = "".join(f", {key}{facts[key]}" for key in ("cpu family", "model") if key in facts)  # names are often vague
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' * (cores > 1)} of {name}{kind}"


def versions() -> dict[str, str]:
    """Of Python, CUDA and the installed libraries that any contestant comes from."""
    found = {"Python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    return found
