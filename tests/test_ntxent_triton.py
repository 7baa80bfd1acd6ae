"""The GPU's passes of NT-Xent through second derivatives, in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fasttrain_kernels.ntxent import nt_xent, sup_con
from tests.interpreter import needs_interpreter
from tests.test_ntxent_blocked import derivatives, errors, naive, naive_nt_xent, random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _on_device(function):
    return lambda *tensors: function(*(x.to(DEVICE) for x in tensors)).cpu()


@runs_triton
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("views", "n", "d"), [(2, 1, 16), (2, 70, 20), (3, 21, 130)])
def test_nt_xent(views: int, n: int, d: int, dtype: torch.dtype) -> None:
    z = random(views, n, d).to(dtype)
    truth = derivatives(lambda z: naive_nt_xent(z, 0.1), z.double())
    ours = derivatives(_on_device(lambda z: nt_xent(z, 0.1, impl="triton")), z)
    if n == 1:
        assert ours[0].abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-3)  # of the one positive: log e^s − s = 0
    else:
        assert max(errors(ours, truth)) < BOUNDS[dtype]
        assert errors(ours, truth)[0] < {torch.bfloat16: 1e-3}.get(dtype, 1e-5)
    if dtype == torch.bfloat16 and n > 1:
        naively = errors(derivatives(lambda z: naive_nt_xent(z, 0.1), z), truth)
        assert all(mine <= theirs for mine, theirs in zip(errors(ours, truth), naively, strict=True))


@runs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_among_more_columns(dtype: torch.dtype) -> None:
    z, columns = random(2, 30, 24).to(dtype), random(2, 75, 24, seed=1).to(dtype)
    truth = derivatives(lambda z, c: naive_nt_xent(z, 0.1, c, 9), z.double(), columns.double())
    ours = derivatives(_on_device(lambda z, c: nt_xent(z, 0.1, c, 9, "triton")), z, columns)
    assert max(errors(ours, truth)) < BOUNDS[dtype]


@runs_triton
def test_sup_con_of_rows_that_are_no_columns() -> None:
    z, columns, labels = random(1, 40, 24).float(), random(2, 40, 24, seed=1).float(), torch.arange(40) % 7
    truth = derivatives(lambda z, c: naive(z, labels, 0.1, c, labels, None), z.double(), columns.double())

    def losses(z: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        there = labels.to(z.device)
        return sup_con(z, there, 0.1, columns, there, None, "triton")

    ours = derivatives(_on_device(losses), z, columns)
    assert max(errors(ours, truth)) < 1e-5


@runs_triton
def test_near_duplicates_and_zeros_at_a_temperature_of_one_hundredth() -> None:
    z = random(1, 40, 32).repeat(2, 1, 1).float()
    z[:, 1] = z[:, 0] * (1 + 1e-6)
    z[0, 2] = 0
    z[:, 3] *= 1e30
    ours = derivatives(_on_device(lambda z: nt_xent(z, 0.01, impl="triton")), z)
    expected = derivatives(lambda z: nt_xent(z, 0.01, impl="reference"), z)
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=1e-4)
    assert not ours[1][0, 2].any()


@runs_triton
def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64: choose reference"):
        nt_xent(random(2, 3, 4).to(DEVICE), 0.1, impl="triton")


@needs_interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda", reason="the tests above run here")
def test_in_the_interpreter() -> None:
    with pytest.raises(ValueError, match="impl='triton' runs on a GPU and z is on cpu"):
        nt_xent(random(2, 3, 4), 0.1, impl="triton")
    pytest.importorskip("triton")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
