"""What the machine can do at most, measured beside what is held against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.benchmarks.timing import StepTiming

PRODUCT, COPY = "large matrix product", "large copy"


class Work(NamedTuple):
    """What the mathematics of a pass needs, however it is computed: work done twice to save memory counts once."""

    flops: int  # of its products and convolutions, a multiplication and an addition being two
    bytes: int  # read and written at least, where every full-size pass over a tensor goes to memory


class Ceilings(NamedTuple):
    """A large matrix product and a large copy, as contestants of the same rounds."""

    contestants: dict[str, Callable[[], Tensor]]
    work: dict[str, Work]

    def share(self, work: Work, timing: StepTiming, timings: Mapping[str, StepTiming]) -> tuple[float, str]:
        """The ceiling's least time for ``work`` over the time taken, and the ceiling that binds."""
        product, copy = (timings[name].seconds for name in (PRODUCT, COPY))
        least = {
            PRODUCT: work.flops / self.work[PRODUCT].flops * product,
            COPY: work.bytes / self.work[COPY].bytes * copy,
        }
        binding = max(least, key=lambda name: least[name])
        return least[binding] / timing.seconds, binding


def ceilings(dtype: torch.dtype, device: torch.device, side: int | None = None, mib: int | None = None) -> Ceilings:
    """Of matrices in ``dtype`` of ``side`` rows, and of ``mib`` MiB, by default many times what a cache holds."""
    gpu = device.type == "cuda"
    side = side or (8192 if gpu else 2048)
    size = (mib or (1024 if gpu else 256)) * 2**20
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Ceilings(
        {PRODUCT: product(a, b), COPY: lambda: target.copy_(source)},
        {PRODUCT: Work(2 * side**3, 3 * side**2 * a.element_size()), COPY: Work(0, 2 * size)},
    )


def product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """a bᵀ by the fastest that PyTorch has: on AMD's CPUs oneDNN, which takes half the time of MKL in float32."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    result = torch.empty_like(a)
    return lambda: torch.mm(a, b.T, out=result)
