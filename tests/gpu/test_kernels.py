"""The kernels at sizes and in precisions that training uses, against float64, on the GPU's own implementations."""

from __future__ import annotations

import warnings

import pytest
import torch

from fasttrain.benchmarks.cases import NAMES, OURS
from fasttrain.benchmarks.cases.apgd import apgd_cases
from fasttrain.benchmarks.cases.augment import augment_cases
from fasttrain.benchmarks.cases.contrastive import nt_xent_cases, sup_con_cases
from fasttrain.benchmarks.cases.layers import batchnorm_cases, convolution_cases
from fasttrain.benchmarks.kernels import agreement
from fasttrain.data.augment import AugmentConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
COLOURED = AugmentConfig(grey=0.3, solarise=0.3)
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
    "augmentation, large": lambda dtype: augment_cases(32, (375, 500), COLOURED, GPU),
    "augmentation, small": lambda dtype: augment_cases(256, (32, 32), COLOURED.model_copy(update={"size": 32}), GPU),
    "augmentation, odd": lambda dtype: augment_cases(5, (300, 41), COLOURED.model_copy(update={"size": 57}), GPU),
}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES.get)
@pytest.mark.parametrize("kernel", MAKERS)
def test_a_kernel_agrees_with_float64(kernel, dtype):
    if kernel.startswith(("APGD", "augmentation")) and dtype != torch.float32:
        pytest.skip("it is for float32")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not used on this GPU", category=RuntimeWarning)
        for case in MAKERS[kernel](dtype):
            errors, _ = agreement(case)
            assert errors[OURS].agrees, f"{case.title}: {errors[OURS].relative}"
