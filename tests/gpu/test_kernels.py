"""The kernels at sizes and in precisions that training uses, against float64, on the GPU's own implementations."""

from __future__ import annotations

import warnings

import pytest
import torch

from fasttrain.benchmarks.cases import NAMES, OURS
from fasttrain.benchmarks.cases.apgd import apgd_cases
from fasttrain.benchmarks.cases.contrastive import nt_xent_cases, sup_con_cases
from fasttrain.benchmarks.cases.layers import batchnorm_cases, convolution_cases
from fasttrain.benchmarks.kernels import agreement

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
MAKERS = {
    "NT-Xent": lambda dtype: nt_xent_cases(4096, 128, 0.1, dtype, GPU),
    "NT-Xent, few and odd": lambda dtype: nt_xent_cases(37, 96, 0.1, dtype, GPU),
    "SupCon": lambda dtype: sup_con_cases(4096, 128, 0.1, dtype, GPU),
    "BatchNorm, first layers": lambda dtype: batchnorm_cases((512, 64, 32, 32), dtype, GPU),
    "BatchNorm, last layers": lambda dtype: batchnorm_cases((512, 512, 4, 4), dtype, GPU),
    "BatchNorm, odd": lambda dtype: batchnorm_cases((3, 24, 7, 5), dtype, GPU),
    "convolution": lambda dtype: convolution_cases((512, 64, 32, 32), dtype, GPU),
    "APGD": lambda dtype: apgd_cases(256, 32, GPU),
}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES.get)
@pytest.mark.parametrize("kernel", MAKERS)
def test_a_kernel_agrees_with_float64(kernel, dtype):
    if kernel == "APGD" and dtype != torch.float32:
        pytest.skip("its state is float32")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not used on this GPU", category=RuntimeWarning)
        for case in MAKERS[kernel](dtype):
            errors, _ = agreement(case)
            assert errors[OURS].agrees, f"{case.title}: {errors[OURS].relative}"
