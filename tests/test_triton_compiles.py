"""Every Triton kernel compiles to machine code for the GPUs it is meant for, where there is no GPU.

The interpreter runs kernels by NumPy and knows neither Triton's types nor a GPU's limits; the compiler does.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
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


def _pairs(dim, precision, among=24, offset=0, like=0, attracts=True):
    """Of 2 views of 24 images; the columns are the rows if there are no more of them."""
    from fasttrain_kernels.ntxent import triton as passes
    from fasttrain_kernels.ntxent.log_sum_exp import Factors, Pairs, Place, Setting

    setting = Setting(1.0, Place(24, among, offset), passes, attracts, precision, like)
    rows, columns = torch.zeros(48, dim), torch.zeros(2 * among, dim)

    def factors(u):
        dtype = {"bf16": torch.bfloat16}.get(precision, torch.float32)
        return Factors(u.to(dtype), None if precision == "fp32" else torch.zeros(len(u)))

    if among == 24:
        return Pairs(rows, rows, True, setting, factors(rows), factors(rows))
    return Pairs(rows, columns, False, setting, factors(rows), factors(columns))


def _compile(pairs):
    sums = c = torch.zeros(48)
    passes = pairs.setting.passes
    passes.log_sum_exp(pairs)
    passes.gradient(pairs, sums, c, True)
    passes.second(pairs, sums, c, pairs.rows, None if pairs.symmetric else pairs.columns, True)


@pytest.mark.parametrize(("dim", "precision"), [(16, "fp32"), (128, "bf16"), (2048, "tf32")])
def test_nt_xent(compiled, dim, precision):
    for pairs in (
        _pairs(dim, precision),
        _pairs(dim, precision, among=48, attracts=False),
        _pairs(dim, precision, among=48, offset=None, attracts=False),
    ):
        _compile(pairs)


@pytest.mark.parametrize("compiled", [90], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_registers_suffice_for_nt_xent(compiled, precision, tmp_path):
    """On the kernels of a large batch at d = 128: hardly any number that a thread needs is kept in memory."""
    _compile(_pairs(128, precision, like=2**15))
    for kernel in compiled:
        assert kernel.metadata.shared <= 99 * 1024
        stack = _usage(kernel, tmp_path)["STACK"]
        assert stack <= 64, f"{kernel.metadata.name}: {stack} bytes"


def _usage(kernel, folder: Path) -> dict[str, int]:
    """REG: a thread's registers; STACK: the bytes of it that lie in memory; and more."""
    from triton.backends import nvidia

    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this Triton comes without cuobjdump")
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True)
    return {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", usage.stdout + usage.stderr)}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_rows_are_prepared_for_nt_xent(compiled, precision):
    from fasttrain_kernels.ntxent import unit_triton

    z = torch.zeros(2, 24, 128).requires_grad_()
    u, factors = unit_triton.unit(z, precision)
    (first,) = torch.autograd.grad(u.sum(), z, create_graph=True)
    first.sum().backward()
    unit_triton.in_factors_units(torch.zeros(2, 24, 128), factors)


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


@pytest.mark.parametrize("size", [32, 224])
def test_the_augmentation(compiled, size, tmp_path):
    from fasttrain_kernels.augment.triton import augment_triton

    table, levels = torch.zeros(2, 3, 10, dtype=torch.int32), torch.zeros(2, 3, size, size, 3, dtype=torch.uint8)
    place = torch.zeros(3, dtype=torch.long), torch.zeros(3, 2, dtype=torch.int32)
    augment_triton(levels, None, None, table, levels.float())
    augment_triton(levels.flatten(), *place, table, levels.float())
    augment_triton(levels.flatten(), *place, table, levels)
    usages = [_usage(kernel, tmp_path) for kernel in compiled]
    assert not any(usage["STACK"] for usage in usages), "what a thread needs stays in registers"
    assert max(usage["REG"] for usage in usages) <= 64, "four programs at once on a multiprocessor"
    assert max(kernel.metadata.shared for kernel in compiled) <= 1024
    assert not any("fma" in kernel.asm["ptx"] for kernel in compiled), "a crop is the batched one to the bit"
