"""The passes of BatchNorm on a GPU where a row's channels lie together; ``native`` states what each computes.

Sums go in two stages: each program adds its stretch of rows for its channels in float32, and ``triton_channels`` adds
the programs' sums in float64, so that the result does not depend on the order in which programs run.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels.batchnorm import triton_channels
from fasttrain_kernels.batchnorm.triton_channels import quotient

channels = triton_channels
ROWS, CHANNELS = 32, 64
"A program's tile."
PROGRAMS = 1024
"About as many as a sum is given, each a stretch of tiles: what 132 multiprocessors run at once, 8 on each."


def takes(x: Tensor) -> bool:
    """Whether x is on a GPU (anywhere for Triton's interpreter), channels-last or [M, C], of a dtype they read."""
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.movedim(1, -1).is_contiguous()


def statistics(x: Tensor) -> Tensor:
    return _summed(2, x, lambda grid, *into: _powers[grid](x, *into))


def normalise(x: Tensor, residual: Tensor | None, by: Tensor, relu: bool) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        _normalise[_tiles(x)](x, residual, by, y, *_shape(x), relu, residual is not None, ROWS, CHANNELS)
    return y


def gradient_sums(g: Tensor, x: Tensor, y: Tensor | None, by: Tensor) -> tuple[Tensor, Tensor]:
    gated = g if y is None else torch.empty_like(g)
    return _summed(2, x, lambda grid, *into: _gradient_sums[grid](g, x, y, gated, by, y is not None, *into)), gated


def gradient(g: Tensor, x: Tensor, by: Tensor) -> Tensor:
    g_x = torch.empty_like(x)
    if x.numel():
        _gradient[_tiles(x)](g, x, by, g_x, *_shape(x), ROWS, CHANNELS)
    return g_x


def second_sums(u: Tensor, g: Tensor, x: Tensor, by: Tensor) -> Tensor:
    return _summed(3, x, lambda grid, *into: _second_sums[grid](u, g, x, by, *into))


def second(u: Tensor, g: Tensor, x: Tensor, q: Tensor | None, y: Tensor | None, by: Tensor) -> tuple[Tensor, Tensor]:
    on_g, on_x = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        given = q is not None, y is not None
        _second[_tiles(x)](u, g, x, q, y, by, on_g, on_x, *_shape(x), *given, ROWS, CHANNELS)
    return on_g, on_x


def _shape(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[1], x.shape[1]


def _tiles(x: Tensor) -> tuple[int, int]:
    rows, columns = _shape(x)
    return quotient(rows, ROWS), quotient(columns, CHANNELS)


def _summed(terms: int, x: Tensor, launch) -> Tensor:
    """Sums [programs, terms, C] of the programs that ``launch(grid, sums, …)`` starts."""
    rows, columns = _shape(x)
    tiles, blocks = _tiles(x)
    stretch = quotient(tiles * blocks, PROGRAMS)
    programs = quotient(tiles, max(stretch, 1))
    sums = torch.empty(programs, terms, columns, dtype=torch.float32, device=x.device)
    if programs:
        launch((programs, blocks), sums, rows, columns, stretch, ROWS, CHANNELS)
    return sums


@triton.jit
def _tile(array, m, c, columns, inside):
    """A tile of rows m and channels c in float32; 0 outside."""
    return tl.load(array + m[:, None].to(tl.int64) * columns + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(array, m, c, columns, inside, values):
    tl.store(array + m[:, None].to(tl.int64) * columns + c[None, :], values.to(array.dtype.element_ty), mask=inside)


@triton.jit
def _by(by, k, c, columns):
    """Row k of the numbers a channel, as a row of a tile."""
    return tl.load(by + k * columns + c, mask=c < columns, other=0.0)[None, :]


@triton.jit
def _where(rows, columns, row_block, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    m = row_block * HEIGHT + tl.arange(0, HEIGHT)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    return m, c, (m < rows)[:, None] & (c < columns)[None, :]


@triton.jit
def _powers(x, sums, rows, columns, stretch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Of x − x₀, with x₀ the first row, so that no digit is lost where the mean is far larger than the deviation."""
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    origin = tl.load(x + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    squares = tl.zeros([HEIGHT, WIDTH], tl.float32)
    program = tl.program_id(0)
    for block in range(program * stretch, (program + 1) * stretch):
        m, c, inside = _where(rows, columns, block, HEIGHT, WIDTH)
        centred = tl.where(inside, _tile(x, m, c, columns, inside) - origin, 0.0)
        total += centred
        squares += centred * centred
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    into = sums + program * 2 * columns + c
    tl.store(into, tl.sum(total, 0), mask=c < columns)
    tl.store(into + columns, tl.sum(squares, 0), mask=c < columns)


@triton.jit
def _normalise(
    x, residual, by, y, rows, columns, RELU: tl.constexpr, ADD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    m, c, inside = _where(rows, columns, tl.program_id(0), HEIGHT, WIDTH)
    centred = _tile(x, m, c, columns, inside) - _by(by, 0, c, columns)
    value = _by(by, 1, c, columns) * centred + _by(by, 2, c, columns)
    if ADD:
        value += _tile(residual, m, c, columns, inside)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    _put(y, m, c, columns, inside, value)


@triton.jit
def _gradient_sums(
    g, x, y, gated, by, GATED: tl.constexpr, sums, rows, columns, stretch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    product = tl.zeros([HEIGHT, WIDTH], tl.float32)
    program = tl.program_id(0)
    for block in range(program * stretch, (program + 1) * stretch):
        m, c, inside = _where(rows, columns, block, HEIGHT, WIDTH)
        centred = _tile(x, m, c, columns, inside) - _by(by, 0, c, columns)
        h = _tile(g, m, c, columns, inside)
        if GATED:
            h = tl.where(_tile(y, m, c, columns, inside) <= 0.0, 0.0, h)
            _put(gated, m, c, columns, inside, h)
        else:
            h = tl.where(_by(by, 1, c, columns) * centred + _by(by, 2, c, columns) <= 0.0, 0.0, h)
        total += h
        product += h * centred
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    into = sums + program * 2 * columns + c
    tl.store(into, tl.sum(total, 0), mask=c < columns)
    tl.store(into + columns, tl.sum(product, 0), mask=c < columns)


@triton.jit
def _gradient(g, x, by, g_x, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    m, c, inside = _where(rows, columns, tl.program_id(0), HEIGHT, WIDTH)
    centred = _tile(x, m, c, columns, inside) - _by(by, 0, c, columns)
    h = _tile(g, m, c, columns, inside)
    h = tl.where(_by(by, 1, c, columns) * centred + _by(by, 2, c, columns) <= 0.0, 0.0, h)
    value = _by(by, 3, c, columns) * h + _by(by, 4, c, columns) * centred + _by(by, 5, c, columns)
    _put(g_x, m, c, columns, inside, value)


@triton.jit
def _second_sums(u, g, x, by, sums, rows, columns, stretch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    on_x = tl.zeros([HEIGHT, WIDTH], tl.float32)
    on_g = tl.zeros([HEIGHT, WIDTH], tl.float32)
    program = tl.program_id(0)
    for block in range(program * stretch, (program + 1) * stretch):
        m, c, inside = _where(rows, columns, block, HEIGHT, WIDTH)
        centred = _tile(x, m, c, columns, inside) - _by(by, 0, c, columns)
        h = _tile(g, m, c, columns, inside)
        h = tl.where(_by(by, 1, c, columns) * centred + _by(by, 2, c, columns) <= 0.0, 0.0, h)
        v = _tile(u, m, c, columns, inside)
        total += v
        on_x += v * centred
        on_g += v * h
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    into = sums + program * 3 * columns + c
    tl.store(into, tl.sum(total, 0), mask=c < columns)
    tl.store(into + columns, tl.sum(on_x, 0), mask=c < columns)
    tl.store(into + 2 * columns, tl.sum(on_g, 0), mask=c < columns)


@triton.jit
def _second(
    u, g, x, q, y, by, on_g, on_x, rows, columns,
    ADD: tl.constexpr, GATED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    m, c, inside = _where(rows, columns, tl.program_id(0), HEIGHT, WIDTH)
    centred = _tile(x, m, c, columns, inside) - _by(by, 0, c, columns)
    if GATED:
        closed = _tile(y, m, c, columns, inside) <= 0.0
    else:
        closed = _by(by, 1, c, columns) * centred + _by(by, 2, c, columns) <= 0.0
    h = tl.where(closed, 0.0, _tile(g, m, c, columns, inside))
    v = _tile(u, m, c, columns, inside)
    upstream = _by(by, 3, c, columns) * v + _by(by, 4, c, columns) * centred + _by(by, 5, c, columns)
    if ADD:
        upstream += _tile(q, m, c, columns, inside)
    _put(on_g, m, c, columns, inside, tl.where(closed, 0.0, upstream))
    value = _by(by, 6, c, columns) * v + _by(by, 7, c, columns) * h
    value += _by(by, 8, c, columns) * centred + _by(by, 9, c, columns)
    _put(on_x, m, c, columns, inside, value)
