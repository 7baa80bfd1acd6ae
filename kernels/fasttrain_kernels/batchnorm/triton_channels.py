"""The numbers a channel between BatchNorm's passes on a GPU: ``channels``, in one kernel each.

Across ranks it is two, the numbers to be summed out of the one, what follows from the sums out of the other. Each
begins with the sums of a pass's programs, added in float64 and always in the same order; the numbers made of them are
computed in float64 too, and kept in float32. Nothing here depends on the host: the launches may be recorded and
replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels.batchnorm.channels import Gradient, Running, Statistics, Total

DEPTH, CHANNELS, WARPS = 256, 8, 8
"Programs whose sums are added at once, and the channels and warps of a program here."


def statistics(
    sums: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gates: bool,
    eps: float,
    running: Running | None,
    total: Total | None,
) -> Statistics:
    """From the programs' Σ (x − x₀) and Σ (x − x₀)² [programs, 2, C]."""
    channels, count, joined = x.shape[1], x.numel() // x.shape[1], None
    weight, bias = _contiguous(weight), _contiguous(bias)
    of = sums, x, count, *sums.shape[::2]
    if total is not None:
        joined = sums.new_empty(3, channels, dtype=torch.float64)
        _launch(_share_statistics, channels, *of, joined)
        joined = total(joined)
        count = joined[2, 0]
    mean = variance = batches = momentum = None
    if running is not None:
        mean, variance, batches, momentum = running
        if momentum is None:
            batches.add_(1)  # all programs read it, so none of them may
    made = sums.new_empty(5 if gates else 8, channels)
    _launch(
        _finish_statistics, channels, *of, joined, weight, bias, mean, variance, batches, made, eps,
        float(momentum or 0), gates, momentum is None,
    )  # fmt: skip
    return Statistics(made[:3], made[:3] if gates else made[5:], made[3], made[4], count)


def gradient(
    sums: Tensor, weight: Tensor | None, gate: Tensor, inv_std: Tensor, count: int | Tensor, total: Total | None
) -> Gradient:
    """From the programs' Σ h and Σ h (x − μ) [programs, 2, C]."""
    programs, _, channels = sums.shape
    weight = _contiguous(weight)
    made, joined = sums.new_empty(10, channels), None
    by, kept, means = made[:6], made[6:8], made[8:]
    if total is not None:
        joined = torch.empty_like(means)
        _launch(_share_gradient, channels, sums, weight, inv_std, kept, joined, programs, channels)
        joined = total(joined)
    _launch(_finish_gradient, channels, sums, joined, weight, gate, inv_std, by, kept, means, count, programs, channels)
    return Gradient(by, kept, means)


def second(
    sums: Tensor,
    v: Tensor | None,
    t: Tensor | None,
    weight: Tensor | None,
    gate: Tensor,
    inv_std: Tensor,
    of_gradient: tuple[Tensor, Tensor],
    count: int | Tensor,
    total: Total | None,
) -> tuple[Tensor, Tensor]:
    """From the programs' Σ u, Σ u (x − μ), Σ u h [programs, 3, C]."""
    programs, _, channels = sums.shape
    weight, v, t = _contiguous(weight), _contiguous(v), _contiguous(t)
    made, joined = sums.new_empty(11, channels), None
    by, g_weight = made[:10], made[10]
    if total is not None:
        joined = sums.new_empty(5, channels)
        _launch(_share_second, channels, sums, v, weight, inv_std, of_gradient[0], g_weight, joined, programs, channels)
        joined = total(joined)
    _launch(
        _finish_second, channels, sums, joined, v, t, weight, gate, inv_std, *of_gradient, by, g_weight, count,
        programs, channels,
    )  # fmt: skip
    return by, g_weight


def quotient(a: int, b: int) -> int:
    """a / b rounded up; on the host ``triton.cdiv`` takes some µs for it."""
    return -(-a // b)


def _contiguous(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.contiguous()


def _launch(kernel, channels: int, *arguments) -> None:
    kernel[quotient(channels, CHANNELS),](*arguments, DEPTH, CHANNELS, num_warps=WARPS)


@triton.jit
def _own(WIDTH: tl.constexpr):
    """The channels of this program."""
    return tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _get(rows, k, c, columns):
    """Row k of [k, C] in float64."""
    return tl.load(rows + k * columns + c, mask=c < columns, other=0.0).to(tl.float64)


@triton.jit
def _get_or(default: tl.constexpr, row, c, columns):
    return tl.full(c.shape, default, tl.float64) if row is None else _get(row, 0, c, columns)


@triton.jit
def _put(rows, k, c, columns, values):
    tl.store(rows + k * columns + c, values.to(rows.dtype.element_ty), mask=c < columns)


@triton.jit
def _added(sums, c, programs, columns, TERMS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """The first three terms of [programs, TERMS, C], two where there are no more, added over programs in float64."""
    first = tl.zeros([DEPTH, WIDTH], tl.float64)
    second = tl.zeros([DEPTH, WIDTH], tl.float64)
    third = tl.zeros([DEPTH, WIDTH], tl.float64)
    for start in range(0, programs, DEPTH):
        p = start + tl.arange(0, DEPTH)
        inside = (p < programs)[:, None] & (c < columns)[None, :]
        at = sums + p[:, None] * TERMS * columns + c[None, :]
        first += tl.load(at, mask=inside, other=0.0).to(tl.float64)
        second += tl.load(at + columns, mask=inside, other=0.0).to(tl.float64)
        if TERMS == 3:
            third += tl.load(at + 2 * columns, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def _at_least_0(values):
    """NaN stays, which ``tl.maximum`` would hide."""
    return tl.where(values < 0.0, 0.0, values)


@triton.jit
def _moments(sums, x, rows, c, programs, columns, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """μ and Σ (x − μ)² of this rank, and its number of values; 0 where there are none."""
    count = tl.zeros([WIDTH], tl.float64) + rows
    total, squares, _ = _added(sums, c, programs, columns, 2, DEPTH, WIDTH)
    offset = total / tl.maximum(count, 1.0)
    origin = tl.load(x + c, mask=c < columns * tl.minimum(rows, 1), other=0.0).to(tl.float64)
    return origin + offset, _at_least_0(squares - total * offset), count


@triton.jit
def _share_statistics(sums, x, rows, programs, columns, joined, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    c = _own(WIDTH)
    mean, squares, count = _moments(sums, x, rows, c, programs, columns, DEPTH, WIDTH)
    _put(joined, 0, c, columns, count * mean)
    _put(joined, 1, c, columns, squares + count * mean * mean)
    _put(joined, 2, c, columns, count)


@triton.jit
def _finish_statistics(
    sums, x, rows, programs, columns, joined, weight, bias, running_mean, running_variance, batches, made, eps,
    momentum, GATES: tl.constexpr, CUMULATIVE: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c = _own(WIDTH)
    if joined is None:
        mean, squares, count = _moments(sums, x, rows, c, programs, columns, DEPTH, WIDTH)
    else:
        count = _get(joined, 2, c, columns)
        mean = _get(joined, 0, c, columns) / count
        squares = _at_least_0(_get(joined, 1, c, columns) - count * mean * mean)
    inv_std = 1.0 / tl.sqrt(squares / count + eps)
    unbiased = squares / tl.maximum(count - 1.0, 1.0)
    _put(made, 0, c, columns, mean)
    _put(made, 1, c, columns, inv_std * _get_or(1.0, weight, c, columns))
    _put(made, 2, c, columns, _get_or(0.0, bias, c, columns))
    _put(made, 3, c, columns, inv_std)
    _put(made, 4, c, columns, unbiased)
    if not GATES:
        _put(made, 5, c, columns, mean)
        _put(made, 6, c, columns, tl.zeros([WIDTH], tl.float64))
        _put(made, 7, c, columns, tl.full([WIDTH], 1.0, tl.float64))
    if batches is not None:
        passed = tl.load(batches)
        if CUMULATIVE:
            share = 1.0 / passed.to(tl.float64)
        else:
            share = momentum
            tl.store(batches, passed + 1, mask=tl.program_id(0) == 0)
        before = _get(running_mean, 0, c, columns)
        _put(running_mean, 0, c, columns, before + share * (mean - before))
        before = _get(running_variance, 0, c, columns)
        _put(running_variance, 0, c, columns, before + share * (unbiased - before))


@triton.jit
def _share_gradient(sums, weight, inv_std, kept, joined, programs, columns, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    c = _own(WIDTH)
    sum_h, sum_hx, _ = _added(sums, c, programs, columns, 2, DEPTH, WIDTH)
    sum_hx *= _get(inv_std, 0, c, columns)
    _put(kept, 0, c, columns, sum_h)
    _put(kept, 1, c, columns, sum_hx)
    w = _get_or(1.0, weight, c, columns)
    _put(joined, 0, c, columns, w * sum_h)
    _put(joined, 1, c, columns, w * sum_hx)


@triton.jit
def _finish_gradient(
    sums, joined, weight, gate, inv_std, by, kept, means, count, programs, columns,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c = _own(WIDTH)
    r, w = _get(inv_std, 0, c, columns), _get_or(1.0, weight, c, columns)
    if joined is None:
        sum_h, sum_hx, _ = _added(sums, c, programs, columns, 2, DEPTH, WIDTH)
        sum_hx *= r
        _put(kept, 0, c, columns, sum_h)
        _put(kept, 1, c, columns, sum_hx)
        n = tl.zeros([WIDTH], tl.float64) + count
        mean_h, mean_hx = w * sum_h / n, w * sum_hx / n
    else:
        n = tl.load(count)
        mean_h, mean_hx = _get(joined, 0, c, columns) / n, _get(joined, 1, c, columns) / n
    _put(means, 0, c, columns, mean_h)
    _put(means, 1, c, columns, mean_hx)
    for k in tl.static_range(3):
        _put(by, k, c, columns, _get(gate, k, c, columns))
    _put(by, 3, c, columns, w * r)
    _put(by, 4, c, columns, -r * r * mean_hx)
    _put(by, 5, c, columns, -r * mean_h)


@triton.jit
def _share_second(
    sums, v, weight, inv_std, kept, sum_uh, joined, programs, columns, DEPTH: tl.constexpr, WIDTH: tl.constexpr
):
    c = _own(WIDTH)
    on_1, on_x, on_h = _added(sums, c, programs, columns, 3, DEPTH, WIDTH)
    _put(sum_uh, 0, c, columns, on_h)
    v = _get_or(0.0, v, c, columns)
    _put(joined, 0, c, columns, on_1)
    _put(joined, 1, c, columns, _get(inv_std, 0, c, columns) * on_x)
    _put(joined, 2, c, columns, _get_or(1.0, weight, c, columns) * on_h)
    _put(joined, 3, c, columns, v * _get(kept, 0, c, columns))
    _put(joined, 4, c, columns, v * _get(kept, 1, c, columns))


@triton.jit
def _finish_second(
    sums, joined, v, t, weight, gate, inv_std, kept, means, by, g_weight, count, programs, columns,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where ``joined`` is, Σ u h of this rank is in the memory of w's gradient."""
    c = _own(WIDTH)
    r, w = _get(inv_std, 0, c, columns), _get_or(1.0, weight, c, columns)
    v, t = _get_or(0.0, v, c, columns), _get_or(0.0, t, c, columns)
    sum_h, sum_hx = _get(kept, 0, c, columns), _get(kept, 1, c, columns)
    mean_h, mean_hx = _get(means, 0, c, columns), _get(means, 1, c, columns)
    if joined is None:
        sum_u, sum_ux, sum_uh = _added(sums, c, programs, columns, 3, DEPTH, WIDTH)
        n = tl.zeros([WIDTH], tl.float64) + count
        mean_u, mean_ux, mean_uh = sum_u / n, r * sum_ux / n, w * sum_uh / n
        mean_vh, mean_vhx = v * sum_h / n, v * sum_hx / n
    else:
        sum_uh = _get(g_weight, 0, c, columns)
        n = tl.load(count)
        mean_u, mean_ux = _get(joined, 0, c, columns) / n, _get(joined, 1, c, columns) / n
        mean_uh = _get(joined, 2, c, columns) / n
        mean_vh, mean_vhx = _get(joined, 3, c, columns) / n, _get(joined, 4, c, columns) / n
    u_ph = mean_uh - mean_u * mean_h - mean_ux * mean_hx
    mean_e = mean_vh - r * (mean_hx * mean_u + mean_ux * mean_h)
    mean_ex = mean_vhx - 2.0 * r * mean_hx * mean_ux
    for k in tl.static_range(3):
        _put(by, k, c, columns, _get(gate, k, c, columns))
    _put(by, 3, c, columns, w * r)
    _put(by, 4, c, columns, r * (v - w * r * mean_ux))
    _put(by, 5, c, columns, t - w * r * mean_u)
    _put(by, 6, c, columns, -r * r * mean_hx)
    _put(by, 7, c, columns, r * v - r * r * mean_ux * w)
    _put(by, 8, c, columns, -r * r * (mean_ex + r * u_ph))
    _put(by, 9, c, columns, -r * mean_e)
    _put(g_weight, 0, c, columns, r * (sum_uh - mean_u * sum_h - mean_ux * sum_hx))
