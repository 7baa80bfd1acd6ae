"""How far our kernels are from float64, in every precision that training uses, and whether Triton's are used at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fasttrain.benchmarks.cases import NAMES, OURS, PYTORCH, Case
from fasttrain.benchmarks.cases.apgd import apgd_cases
from fasttrain.benchmarks.cases.augment import augment_cases
from fasttrain.benchmarks.cases.contrastive import nt_xent_cases, sup_con_cases
from fasttrain.benchmarks.cases.layers import batchnorm_cases, convolution_cases
from fasttrain.benchmarks.kernels import agreement
from fasttrain.benchmarks.truth.row import Row
from fasttrain.data.augment import AugmentConfig

TEMPERATURE = 0.2
TF32 = 2.0**-9
"Relative error that a TF32 product always may have: 10 bits, cut and not rounded."


def kernels(device: torch.device) -> Iterator[Row]:
    """Each pass of each kernel against float64, as :func:`~fasttrain.benchmarks.kernels.agreement` judges.

    That Triton's form of a kernel is refused on a GPU, for whatever reason, is a failure.
    """
    gpu = device.type == "cuda"
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if gpu else (torch.float32, torch.bfloat16):
        yield from _judged(_cases(dtype, device), NAMES[dtype])
    if gpu:
        with tf32():
            yield from _judged(nt_xent_cases(512, 128, TEMPERATURE, torch.float32, device), "TF32", TF32)


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    gpu = device.type == "cuda"
    contrastive = (512, 128) if gpu else (8, 16)
    layer = (64, 64, 32, 32) if gpu else (4, 8, 6, 6)
    yield from nt_xent_cases(*contrastive, TEMPERATURE, dtype, device)
    yield from sup_con_cases(*contrastive, TEMPERATURE, dtype, device)
    yield from batchnorm_cases(layer, dtype, device)
    yield from convolution_cases(layer, dtype, device)
    if dtype == torch.float32:
        yield from apgd_cases(32 if gpu else 4, 32 if gpu else 8, device)
        config = AugmentConfig(size=224 if gpu else 16, grey=0.5, solarise=0.5)
        yield from augment_cases(32 if gpu else 2, (375, 500) if gpu else (20, 30), config, device)


def _judged(cases: Iterator[Case], precision: str, rounded: float | None = None) -> Iterator[Row]:
    torch.manual_seed(0)
    for case in cases:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            errors, refusals = agreement(case, rounded)
        name = f"{case.kernel}, {case.passes}, {case.size}, {precision}"
        own, usual = errors[OURS], errors.get(PYTORCH)
        found = ", ".join(f"{result} {error:.1e}" for result, error in zip(case.results, own.relative, strict=True))
        beside = "" if usual is None else f"; PyTorch's {', '.join(f'{error:.1e}' for error in usual.relative)}"
        reasons = "".join(f"; {other} does not run: {reason}" for other, reason in refusals.items())
        data = {"ours": own.relative, "pytorch": usual and usual.relative}
        yield Row(name, f"{found} from float64{beside}{reasons}", own.agrees, data)
        for warning in said:
            if "is not used on this GPU" in str(warning.message):
                yield Row(name, str(warning.message), False)


@contextmanager
def tf32() -> Iterator[None]:
    """Products in TF32, as whoever asks PyTorch for them has it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


__all__ = ["kernels"]
