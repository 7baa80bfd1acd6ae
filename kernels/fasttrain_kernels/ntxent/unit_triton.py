"""Rows to unit rows on a GPU: one kernel a pass, which also prepares the factors of products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttrain_kernels.ntxent.log_sum_exp import Factors, Precision

DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}
"What rounded factors are kept in."


def unit(z: Tensor, precision: Precision) -> tuple[Tensor, Factors]:
    """z / ‖z‖ of rows [..., d], twice differentiable, and z itself as factors, divided by powers of 2 and rounded.

    Rows that came in bfloat16 (float16) need no rounding to bfloat16 (TF32): their factors are exact.
    """
    u, x, length = _Unit.apply(z.contiguous(), precision)
    return u, Factors(u.detach() if x is None else x, length)


def in_factors_units(adjoint: Tensor, factors: Factors) -> Tensor:
    """``adjoint`` [R, d] on unit rows, divided by their factors' lengths and rounded as the factors are."""
    if factors.length is None:
        return adjoint
    result = torch.empty_like(factors.x)
    _divide[_grid(adjoint)](adjoint, factors.length, result, *_sizes(adjoint), **_blocks(adjoint))
    return result


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        u, inverse = torch.empty_like(z), z.new_empty(z.shape[:-1])
        x, length = None, None
        if precision != "fp32":
            x, length = torch.empty_like(z, dtype=DTYPES[precision]), torch.empty_like(inverse)
            ctx.mark_non_differentiable(x, length)
        _normalise[_grid(z)](z, u, inverse, x, length, *_sizes(z), ROUNDS=precision != "fp32", **_blocks(z))
        ctx.save_for_backward(z, u, inverse)
        return u, x, length

    @staticmethod
    def backward(ctx, g: Tensor, *_: None):
        z, u, inverse = ctx.saved_tensors
        return _Gradient.apply(g.contiguous(), z, u.detach(), inverse), None


class _Gradient(torch.autograd.Function):
    """P g / ‖z‖ with P = I − u uᵀ, as a function of g and z."""

    @staticmethod
    def forward(ctx, g: Tensor, z: Tensor, u: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(g, u, inverse)
        result = torch.empty_like(g)
        _gradient[_grid(g)](g, u, inverse, result, *_sizes(g), **_blocks(g))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, q: Tensor):
        g, u, inverse = ctx.saved_tensors
        by_g, by_z = torch.empty_like(g), torch.empty_like(g)
        _second[_grid(g)](q.contiguous(), g, u, inverse, by_g, by_z, *_sizes(g), **_blocks(g))
        return by_g, by_z, None, None


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


def _blocks(x: Tensor) -> dict[str, int]:
    padded = triton.next_power_of_2(x.shape[-1])
    return {"ROWS": max(1, 1024 // padded), "DIMENSIONS": padded}


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[:-1].numel(), _blocks(x)["ROWS"]),)


@triton.jit
def _normalise(
    z, u, inverse, x, length, count, d, ROUNDS: tl.constexpr, ROWS: tl.constexpr, DIMENSIONS: tl.constexpr
):  # fmt: skip
    i, is_row, at, inside = _places(count, d, ROWS, DIMENSIONS)
    row = tl.load(z + at, inside, 0.0)
    # Divided by a power of 2 that leaves the largest in [1, 4), so that squares neither overflow nor vanish; exactly.
    exponent = (tl.max(tl.abs(row), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    by = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    row = row * by[:, None]
    one_over = _one_over_length(row)
    tl.store(u + at, row * one_over[:, None], inside)
    tl.store(inverse + i, one_over * by, is_row)
    if ROUNDS:
        row = _rounded(row, x.dtype.element_ty)
        tl.store(x + at, row, inside)
        tl.store(length + i, _one_over_length(row.to(tl.float32)), is_row)


@triton.jit
def _divide(adjoint, length, result, count, d, ROWS: tl.constexpr, DIMENSIONS: tl.constexpr):
    i, is_row, at, inside = _places(count, d, ROWS, DIMENSIONS)
    by = tl.load(length + i, is_row, 1.0)
    row = tl.load(adjoint + at, inside, 0.0) / tl.where(by == 0, 1.0, by)[:, None]  # a row of zeros has length 0
    tl.store(result + at, _rounded(row, result.dtype.element_ty), inside)


@triton.jit
def _gradient(g, u, inverse, result, count, d, ROWS: tl.constexpr, DIMENSIONS: tl.constexpr):
    i, is_row, at, inside = _places(count, d, ROWS, DIMENSIONS)
    g_i, u_i = tl.load(g + at, inside, 0.0), tl.load(u + at, inside, 0.0)
    inverse_i = tl.load(inverse + i, is_row, 0.0)
    tl.store(result + at, (g_i - u_i * tl.sum(u_i * g_i, 1)[:, None]) * inverse_i[:, None], inside)


@triton.jit
def _second(q, g, u, inverse, by_g, by_z, count, d, ROWS: tl.constexpr, DIMENSIONS: tl.constexpr):
    """By g: P q / ‖z‖. By z: −[(q · P g) u + (u · g) P q + (u · q) P g] / ‖z‖²."""
    i, is_row, at, inside = _places(count, d, ROWS, DIMENSIONS)
    q_i, g_i, u_i = tl.load(q + at, inside, 0.0), tl.load(g + at, inside, 0.0), tl.load(u + at, inside, 0.0)
    inverse_i = tl.load(inverse + i, is_row, 0.0)[:, None]
    u_q, u_g = tl.sum(u_i * q_i, 1)[:, None], tl.sum(u_i * g_i, 1)[:, None]
    q_i -= u_i * u_q
    g_i -= u_i * u_g
    tl.store(by_g + at, q_i * inverse_i, inside)
    found = tl.sum(q_i * g_i, 1)[:, None] * u_i + u_g * q_i + u_q * g_i
    tl.store(by_z + at, -found * inverse_i * inverse_i, inside)


@triton.jit
def _places(count, d, ROWS: tl.constexpr, DIMENSIONS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DIMENSIONS)
    is_row = i < count
    return i, is_row, i[:, None].to(tl.int64) * d + k[None, :], is_row[:, None] & (k < d)[None, :]


@triton.jit
def _one_over_length(row):
    """[ROWS], 0 for a row of zeros."""
    square = tl.sum(row * row, 1)
    return tl.where(square == 0, 0.0, 1.0 / tl.sqrt(square))


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """To the nearest bfloat16, or TF32: 10 binary digits in a float32, because tensor cores cut the others off."""
    if dtype == tl.float32:
        nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x)  # a NaN stays one
    else:
        return x.to(dtype)
