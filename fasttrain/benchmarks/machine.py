"""What a benchmark ran on: hardware and versions."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from fasttrain.doctor import dali_package, driver

DISTRIBUTIONS = {
    "Triton": "triton",
    "numba": "numba",
    "DeepSpeed": "deepspeed",
    "FFCV": "ffcv",
    "lightly": "lightly",
    "solo-learn": "solo-learn",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "torchattacks": "torchattacks",
}


def hardware() -> str:
    """The GPU, or the CPU and how many of its cores this process may use."""
    if torch.cuda.is_available():
        gibibytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        return f"{torch.cuda.get_device_name()}, {gibibytes:.0f} GiB"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)  # of the last core
    name = facts.get("model name", platform.processor()).strip()
    kind = "".join(f", {key}{facts[key]}" for key in ("cpu family", "model") if key in facts)  # names are often vague
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' * (cores > 1)} of {name}{kind}"


def versions() -> dict[str, str]:
    """Of Python, the installed libraries that any contestant comes from, and where there is a GPU of what drives it."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
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
