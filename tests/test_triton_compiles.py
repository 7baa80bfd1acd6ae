"""Every Triton kernel compiles to machine code for the GPUs it is meant for, where there is no GPU.

The interpreter runs kernels by NumPy and knows neither Triton's types nor a GPU's limits; the compiler does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, interprets nothing")

SHARED_MEMORY = {89: 99, 90: 227}
"KiB that a program may use, by compute capability: L40S and RTX 4090 (the least), H100 and H200."


@pytest.fixture(params=SHARED_MEMORY)
def compiled(request, monkeypatch) -> Iterator[list]:
    """What launches compile to from now on: none is run, tensors on the host stand for those on a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))

    target = SimpleNamespace(  # kernels are cached by device
        get_current_device=lambda: request.param,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
    )
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(type(driver), "active", target)
    yield kernels
    assert kernels and all("cubin" in kernel.asm for kernel in kernels)
    assert max(kernel.metadata.shared for kernel in kernels) <= SHARED_MEMORY[request.param] * 1024


@pytest.mark.parametrize(("dim", "precision"), [(16, "ieee"), (128, "bf16"), (2048, "tf32")])
def test_nt_xent(compiled, dim, precision):
    from fasttrain_kernels.ntxent import triton as passes
    from fasttrain_kernels.ntxent.log_sum_exp import Pairs

    rows, columns, own = torch.zeros(48, dim), torch.zeros(96, dim), torch.arange(48)
    lse = c = torch.zeros(48)
    for pairs in (
        Pairs(rows, rows, own, 1.0, precision, True),
        Pairs(rows, columns, own, 1.0, precision, False),
        Pairs(rows, columns, None, 1.0, precision, False),
    ):
        passes.log_sum_exp(pairs)
        passes.gradient(pairs, lse, c, True)
        passes.second(pairs, lse, c, rows, None if pairs.symmetric else columns, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batchnorm(compiled, dtype):
    from fasttrain_kernels.batchnorm import triton as passes

    x = torch.zeros(2, 24, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    by = torch.zeros(10, 24)
    passes.statistics(x)
    for residual in (None, x):
        for relu in (False, True):
            passes.normalise(x, residual, by, relu)
    passes.gradient(x, x, by)
    passes.second_sums(x, x, x, by)
    for y in (None, x):
        passes.gradient_sums(x, x, y, by)
        for q in (None, x):
            passes.second(x, x, x, q, y, by)


@pytest.mark.parametrize("total", [None, torch.clone])
def test_batchnorm_s_numbers_a_channel(compiled, total):
    from fasttrain_kernels.batchnorm import Running
    from fasttrain_kernels.batchnorm import triton_channels as channels

    x, row, sums = torch.zeros(5, 24, dtype=torch.bfloat16), torch.zeros(24), torch.zeros(3, 2, 24)
    for weight, momentum, gates in ((None, 0.1, False), (row, None, True), (row.bfloat16(), 0.1, True)):
        running = Running(torch.zeros(24), torch.zeros(24), torch.tensor(1), momentum)
        _, gate, inv_std, _, count = channels.statistics(sums, x, weight, weight, gates, 1e-5, running, total)
    for weight in (None, row):
        kept = channels.gradient(sums, weight, gate, inv_std, count, total)[1:]
        channels.second(torch.zeros(3, 3, 24), weight, weight, weight, gate, inv_std, kept, count, total)
    channels.statistics(sums, x, None, None, True, 1e-5, None, total)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_apgd_step(compiled, norm):
    from fasttrain_kernels.apgd.reference import State
    from fasttrain_kernels.apgd.triton import apgd_step_triton

    images, loss = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    counts, flags = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    state = State(*[images] * 4, *[loss] * 4, counts, flags)
    for first in (False, True):
        for window in (0, 2):
            apgd_step_triton(state, loss, images, images, 0.1, norm, first, window, 0.75, 0.75)
    assert not any("fma" in kernel.asm["ptx"] for kernel in compiled), "products are to be rounded as the reference's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_relu(compiled, dtype):
    from fasttrain_kernels.relu.triton import before_relu_triton

    before_relu_triton(*torch.zeros(3, 2, 64, 8, 8, dtype=dtype))
    assert "ld.global.v" in compiled[0].asm["ptx"]
