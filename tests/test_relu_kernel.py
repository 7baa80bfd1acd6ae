"""The gradient before a ReLU against its definition, number by number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fasttrain_kernels.relu import before_relu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
triton = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1")


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 16, 9, 9), (1, 1, 1, 1), (0, 4, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_its_definition(impl, dtype, shape, memory_format):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds to bfloat16 towards zero")
    torch.manual_seed(0)
    a, b, y = torch.randn(3, *shape).to(DEVICE, dtype)
    a, b, y = (t.contiguous(memory_format=memory_format) for t in (a, b, y.relu()))
    kept = [t.clone() for t in (a, b, y)]
    found = before_relu(a, b, y, impl)
    assert found.dtype == dtype and found.stride() == y.stride()
    sums = (a.float() + b.float()).to(dtype).flatten().tolist()
    expected = [s if at > 0 else 0.0 for s, at in zip(sums, y.flatten().tolist(), strict=True)]
    assert found.flatten().tolist() == expected
    assert all(torch.equal(t, before) for t, before in zip((a, b, y), kept, strict=True))


def test_gradients_that_lie_otherwise_are_taken_and_others_refused():
    a, b, y = torch.randn(3, 2, 8, 3, 3)
    b, expected = b.contiguous(memory_format=torch.channels_last), (a + b) * (y > 0)
    assert torch.equal(before_relu(a, b, y), expected)
    with pytest.raises(ValueError, match="use impl='auto'"):
        before_relu(a, b, y, "triton")
    with pytest.raises(ValueError, match="impl='cuda'"):
        before_relu(a, b, y, "cuda")
    with pytest.raises(ValueError, match="one shape and type"):
        before_relu(a, b, y.double())


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run")
def test_triton_interpreted():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
