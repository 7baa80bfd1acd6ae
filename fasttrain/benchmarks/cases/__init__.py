"""What the benchmark of kernels times: one kernel, one pass, one size, by us and by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.benchmarks.ceilings import Work

OURS, REFERENCE, PYTORCH = "ours", "reference", "PyTorch"
"Of every case: the kernel by default, its plain reference, and the usual way to write it, on which neither is built."

Results = tuple[Tensor, ...]


class Case(NamedTuple):
    """Contestants that compute the same ``results`` from the same inputs."""

    kernel: str
    passes: str
    size: str
    dtype: torch.dtype
    work: Work
    results: tuple[str, ...]  # names of what a contestant returns
    truth: Callable[[], Results]  # in float64, not by our kernels
    contestants: dict[str, Callable[[], Results]]  # OURS first
    floors: Mapping[str, Callable[[], object]] = MappingProxyType({})  # not expected to be beaten; results not compared
    rounded: float | None = None  # relative error within which results agree, if not that of the dtype's rounding

    @property
    def title(self) -> str:
        return f"{self.kernel}, {self.passes}, {self.size}, {NAMES[self.dtype]}"


NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
