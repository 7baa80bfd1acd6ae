"""The GPU's passes of NT-Xent through second derivatives, in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fasttrain_kernels.ntxent import blocks, nt_xent, sup_con
from fasttrain_kernels.ntxent.reference import unit_rows
from tests.interpreter import needs_interpreter
from tests.test_ntxent_blocked import derivatives, errors, naive, naive_nt_xent, random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LOSS_BOUND = 1e-5 if DEVICE == "cpu" else 1e-4
"""Factors of float16 and bfloat16 rows are exact, so that no loss is rounded but by its sums: float32's in the
interpreter; a tensor core cuts each of 16 partial sums of d = 128 numbers off at 2⁻²³ of it, 2e-5 of s at τ = 0.1."""


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at tens of thousands of rows; the interpreter takes its time for each block."""
    monkeypatch.setattr(blocks, "MULTIPROCESSORS", 0)


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
        assert ours[0].abs().max() < 1e-3  # of the one positive: log e^s − s = 0
    else:
        assert max(errors(ours, truth)) < BOUNDS[dtype]
        assert errors(ours, truth)[0] < LOSS_BOUND
    if dtype == torch.bfloat16 and n > 1:
        naively = errors(derivatives(lambda z: naive_nt_xent(z, 0.1), z), truth)
        assert all(mine <= theirs for mine, theirs in zip(errors(ours, truth), naively, strict=True))


@runs_triton
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_small_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MULTIPROCESSORS", 132)
    z = random(2, 21, 20).to(dtype)
    truth = derivatives(lambda z: naive_nt_xent(z, 0.1), z.double())
    ours = derivatives(_on_device(lambda z: nt_xent(z, 0.1, impl="triton")), z)
    assert max(errors(ours, truth)) < BOUNDS[dtype]


@runs_triton
@pytest.mark.parametrize("temperature", [1 / 31, 1 / 33])
def test_below_a_temperature_each_row_has_its_own_maximum(temperature: float) -> None:
    z = random(2, 30, 24) + 1  # crowded, so that softmaxes are wide
    truth = derivatives(lambda z: naive_nt_xent(z, temperature), z.float().double())
    ours = derivatives(_on_device(lambda z: nt_xent(z, temperature, impl="triton")), z.float())
    assert max(errors(ours, truth)) < 2e-5


@runs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_among_more_columns(dtype: torch.dtype) -> None:
    z, columns = random(3, 20, 24).to(dtype), random(3, 45, 24, seed=1).to(dtype)
    truth = derivatives(lambda z, c: naive_nt_xent(z, 0.1, c, 9), z.double(), columns.double())
    ours = derivatives(_on_device(lambda z, c: nt_xent(z, 0.1, c, 9, "triton")), z, columns)
    assert max(errors(ours, truth)) < BOUNDS[dtype]


@runs_triton
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_rows_cast_from_low_precision_are_multiplied_in_it(precision: torch.dtype) -> None:
    z = random(2, 30, 24).to(precision)
    given = derivatives(_on_device(lambda z: nt_xent(z, 0.1, impl="triton", precision=precision)), z.float())
    itself = derivatives(_on_device(lambda z: nt_xent(z, 0.1, impl="triton")), z)
    assert torch.equal(given[0], itself[0])
    assert torch.equal(given[1].to(precision), itself[1])
    exactly = derivatives(_on_device(lambda z: nt_xent(z, 0.1, impl="triton")), z.float())
    assert not torch.equal(given[1], exactly[1])
    assert errors(given[:1], [exactly[0].double()])[0] < LOSS_BOUND / 10 * (1 if DEVICE == "cpu" else 10)


@runs_triton
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("scale", [2.0**-126, 1.0, 2.0**100])
def test_unit_rows_and_their_factors(scale: float, precision: str) -> None:
    from fasttrain_kernels.ntxent import unit_triton

    z = (random(2, 9, 20) * scale).float().to(DEVICE)
    z[1, 3] = 0
    u, (x, length) = unit_triton.unit(z, precision)
    torch.testing.assert_close(u, unit_rows(z.double()).float(), rtol=3e-7, atol=1e-8)
    if precision == "fp32":
        assert length is None and torch.equal(x, u)
        return
    whole = (x.double() * length.double()[..., None]).float()
    digits = {"bf16": 8, "tf32": 11}[precision]
    assert (whole - u).norm() < 2.0**-digits * u.norm()
    torch.testing.assert_close(whole.norm(dim=-1), (z != 0).any(-1).float(), rtol=1e-6, atol=0)  # of length 1 again
    fraction, _ = torch.frexp(x.double())
    assert torch.equal(fraction * 2**digits, (fraction * 2**digits).round())
    held = x.float() * scale  # needs no rounding
    _, (again, length) = unit_triton.unit(held, precision)
    exact = (again.double() * length.double()[..., None]).float()
    torch.testing.assert_close(exact, unit_rows(held.double()).float(), rtol=3e-7, atol=1e-8)


@runs_triton
def test_derivatives_of_unit_rows() -> None:
    from fasttrain_kernels.ntxent import unit_triton

    z = random(2, 9, 20)
    truth = derivatives(unit_rows, z.float().double())
    assert max(errors(derivatives(_on_device(lambda z: unit_triton.unit(z, "bf16")[0]), z.float()), truth)) < 1e-6


@runs_triton
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_nan(value: float, dtype: torch.dtype) -> None:
    z = random(2, 9, 20).to(dtype)
    z[0, 2, 5] = value
    assert nt_xent(z.to(DEVICE), 0.1, impl="triton").isnan().all()


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
def test_sup_con_of_rows_that_are_columns() -> None:
    columns, labels = random(2, 40, 24).float(), torch.arange(40) % 7
    for offset, n in ((0, 40), (9, 20)):
        own = labels[offset : offset + n]
        truth = derivatives(
            lambda c, offset=offset, n=n, own=own: naive(c[:, offset : offset + n], own, 0.1, c, labels, offset),
            columns.double(),
        )

        def losses(c: torch.Tensor, offset: int = offset, n: int = n, own: torch.Tensor = own) -> torch.Tensor:
            rows = c if n == 40 else c[:, offset : offset + n]
            return sup_con(rows, own.to(c.device), 0.1, c, labels.to(c.device), offset, "triton")

        assert max(errors(derivatives(_on_device(losses), columns), truth)) < 1e-5


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
