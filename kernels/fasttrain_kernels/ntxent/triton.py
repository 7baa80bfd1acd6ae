"""The three passes on a GPU: a program holds a block of rows and streams all columns past it, as in flash attention.

The gradient by the columns is the same kernel with the sides exchanged, so that nothing is added atomically and the
results do not depend on the order in which programs run. Where the columns are the rows one launch serves both.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels.ntxent.log_sum_exp import Pairs

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are of base 2, which is what the hardware has
LN_2 = tl.constexpr(0.6931471805599453)


class _Side(NamedTuple):
    """One side of the pairs, in the dtype that is multiplied, with what weights need of it."""

    x: Tensor  # [R, d]
    on_x: Tensor  # [R, d], x itself in the first derivative, which does not look at it
    lse: Tensor  # [R]
    c: Tensor  # [R]
    mean: Tensor  # [R]
    own: Tensor  # [R] int32, the position on the other side, -1 for none
    weighs: bool  # whether softmaxes of this side's rows are part of the weights


def log_sum_exp(pairs: Pairs) -> Tensor:
    lse = pairs.rows.new_empty(len(pairs.rows))
    rows, columns = _multiplied(pairs.rows, pairs), _multiplied(pairs.columns, pairs)
    own, _ = _positions(pairs)
    blocks = _blocks(pairs)
    _forward[(triton.cdiv(len(rows), blocks["ROWS"]),)](
        rows, columns, own, lse, len(rows), len(columns), rows.shape[1], pairs.scale, **blocks
    )
    return lse


def gradient(pairs: Pairs, lse: Tensor, c: Tensor, with_columns: bool) -> tuple[Tensor, Tensor | None]:
    rows, columns = _sides(pairs, lse, c, c, None, None)
    return _both(pairs, rows, columns, with_columns, second=False)


def second(
    pairs: Pairs, lse: Tensor, c: Tensor, on_rows: Tensor, on_columns: Tensor | None, with_columns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    mean = torch.empty_like(lse)
    on_columns = torch.zeros_like(pairs.columns) if on_columns is None else on_columns
    rows, columns = _sides(pairs, lse, c, mean, on_rows, on_columns)
    blocks = _blocks(pairs, second=True)
    _means[(triton.cdiv(len(rows.x), blocks["ROWS"]),)](
        rows.x, rows.on_x, columns.x, columns.on_x, rows.own, lse, mean,
        len(rows.x), len(columns.x), rows.x.shape[1], pairs.scale, **blocks,
    )  # fmt: skip
    return mean, *_both(pairs, rows, columns, with_columns, second=True)


def _both(pairs: Pairs, rows: _Side, columns: _Side, with_columns: bool, second: bool) -> tuple[Tensor, Tensor | None]:
    by_rows = _derivative(pairs, rows, columns, second)
    by_columns = _derivative(pairs, columns, rows, second) if with_columns and not pairs.symmetric else None
    return by_rows, by_columns


def _derivative(pairs: Pairs, here: _Side, there: _Side, second: bool) -> Tensor:
    """By the rows ``here``, with their softmaxes and those of ``there`` as each side ``weighs``."""
    result = torch.empty_like(here.x, dtype=torch.float32)
    blocks = _blocks(pairs, second)
    grid = triton.cdiv(len(here.x), blocks["ROWS"]), triton.cdiv(here.x.shape[1], blocks["WIDTH"])
    _derivatives[grid](
        here.x, here.on_x, there.x, there.on_x, here.own,
        here.lse, here.c, here.mean, there.lse, there.c, there.mean,
        result, len(here.x), len(there.x), here.x.shape[1], pairs.scale,
        HERE=here.weighs, THERE=there.weighs, SECOND=second, **blocks,
    )  # fmt: skip
    return result


def _sides(
    pairs: Pairs, lse: Tensor, c: Tensor, mean: Tensor, on_rows: Tensor | None, on_columns: Tensor | None
) -> tuple[_Side, _Side]:
    own, inverse = _positions(pairs)
    x = _multiplied(pairs.rows, pairs)
    on_x = x if on_rows is None else _multiplied(on_rows, pairs)
    rows = _Side(x, on_x, lse, c, mean, own, True)
    if pairs.symmetric:
        return rows, rows
    x = _multiplied(pairs.columns, pairs)
    on_x = x if on_columns is None else _multiplied(on_columns, pairs)
    return rows, _Side(x, on_x, lse, c, mean, inverse, False)


def _multiplied(x: Tensor, pairs: Pairs) -> Tensor:
    return x.to(torch.bfloat16) if pairs.precision == "bf16" else x


def _positions(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """For each row the column that it is, and for each column the row, -1 for none."""
    none = torch.full((len(pairs.columns),), -1, dtype=torch.int32, device=pairs.rows.device)
    if pairs.own is None:
        return torch.full_like(pairs.rows[:, 0], -1, dtype=torch.int32), none
    own = pairs.own.int()
    return own, none.scatter(0, pairs.own, torch.arange(len(own), dtype=torch.int32, device=own.device))


def _blocks(pairs: Pairs, second: bool = False) -> dict[str, int | str]:
    """Sizes of blocks; compiled for sm_80, sm_89 and sm_90, not tuned by measuring.

    For d = 128 each kernel's registers suffice on sm_90 but for a few, and its shared memory on all three.
    """
    padded = max(16, triton.next_power_of_2(pairs.rows.shape[1]))
    half = pairs.precision == "bf16"
    return {
        "ROWS": 128 if half and not second else 64,
        "COLUMNS": 64 if half and not second else 32,
        "DEPTH": min(padded, 128 if half else 64),
        "WIDTH": min(padded, 128),
        "DIMENSIONS": padded,
        # The interpreter multiplies bfloat16 wrongly, so there its values are multiplied in float32.
        "PRECISION": "ieee" if os.environ.get("TRITON_INTERPRET") == "1" else pairs.precision,
        "num_warps": 8 if pairs.precision == "ieee" or (half and not second) else 4,
        "num_stages": 2,
    }


@triton.jit
def _forward(
    rows, columns, own, lse, row_count, column_count, d, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, DIMENSIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    itself = tl.load(own + i, i < row_count, -1)
    top = tl.full((ROWS,), -1e30, tl.float32)  # finite: the difference of two infinities is none
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, column_count, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        s = _product(s, rows, columns, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        s = tl.where(_pair(j, itself, column_count), s * (scale * LOG2_E), float("-inf"))
        largest = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - largest) + tl.sum(tl.exp2(s - largest[:, None]), 1)
        top = largest
    tl.store(lse + i, (top + tl.log2(total)) * LN_2, i < row_count)


@triton.jit
def _means(
    rows, on_rows, columns, on_columns, own, lse, mean, row_count, column_count, d, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, DIMENSIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """μ_i = Σ_j p_ij m_ij with m_ij = scale (on_i · column_j + row_i · on_j)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    itself = tl.load(own + i, i < row_count, -1)
    row_lse = tl.load(lse + i, i < row_count, 0.0) * LOG2_E
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, column_count, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        s = _product(s, rows, columns, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        m = tl.zeros((ROWS, COLUMNS), tl.float32)
        m = _product(m, on_rows, columns, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        m = _product(m, rows, on_columns, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - row_lse[:, None])
        total += tl.sum(tl.where(_pair(j, itself, column_count), p * m, 0.0), 1)
    tl.store(mean + i, total * scale, i < row_count)


@triton.jit
def _derivatives(
    rows, on_rows, columns, on_columns, own,
    row_lse, row_c, row_mean, column_lse, column_c, column_mean,
    result, row_count, column_count, d, scale,
    HERE: tl.constexpr, THERE: tl.constexpr, SECOND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, DIMENSIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale · Σ_j w_ij column_j with w_ij = c_i p_ij [HERE] + c_j p_ji [THERE].

    SECOND: scale · Σ_j (b_ij column_j + w_ij on_j) with b_ij = c_i p_ij (m_ij − μ_i) + c_j p_ji (m_ij − μ_j) likewise.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_row = i < row_count
    itself = tl.load(own + i, is_row, -1)
    if HERE:
        lse_i = tl.load(row_lse + i, is_row, 0.0) * LOG2_E
        c_i = tl.load(row_c + i, is_row, 0.0)
        mean_i = tl.load(row_mean + i, is_row, 0.0)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, column_count, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        is_column = j < column_count
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        s = _product(s, rows, columns, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        s = tl.where(_pair(j, itself, column_count), s * (scale * LOG2_E), float("-inf"))
        w = tl.zeros((ROWS, COLUMNS), tl.float32)
        b = tl.zeros((ROWS, COLUMNS), tl.float32)
        if SECOND:
            m = tl.zeros((ROWS, COLUMNS), tl.float32)
            m = _product(m, on_rows, columns, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
            m = _product(m, rows, on_columns, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
            m = m * scale
        if HERE:
            by_row = c_i[:, None] * tl.exp2(s - lse_i[:, None])
            w += by_row
            if SECOND:
                b += by_row * (m - mean_i[:, None])
        if THERE:
            lse_j = tl.load(column_lse + j, is_column, 0.0) * LOG2_E
            c_j = tl.load(column_c + j, is_column, 0.0)
            by_column = c_j[None, :] * tl.exp2(s - lse_j[None, :])
            w += by_column
            if SECOND:
                mean_j = tl.load(column_mean + j, is_column, 0.0)
                b += by_column * (m - mean_j[None, :])
        at = j[:, None].to(tl.int64) * d + k[None, :]
        inside = is_column[:, None] & (k < d)[None, :]
        values = tl.load(columns + at, inside, 0.0)
        if SECOND:
            found = _dot(b.to(values.dtype), values, found, PRECISION)
            values = tl.load(on_columns + at, inside, 0.0)
        found = _dot(w.to(values.dtype), values, found, PRECISION)
    tl.store(result + i[:, None].to(tl.int64) * d + k[None, :], found * scale, is_row[:, None] & (k < d)[None, :])


@triton.jit
def _product(
    found, rows, columns, i, j, row_count, column_count, d,
    DEPTH: tl.constexpr, DIMENSIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """found [ROWS, COLUMNS] + row_i · column_j."""
    if DIMENSIONS == DEPTH:  # no loop, so that the rows' load can move out of the loop around
        found = _partial_product(found, rows, columns, i, j, 0, row_count, column_count, d, DEPTH, PRECISION)
    else:
        for first in range(0, DIMENSIONS, DEPTH):
            found = _partial_product(found, rows, columns, i, j, first, row_count, column_count, d, DEPTH, PRECISION)
    return found


@triton.jit
def _partial_product(
    found, rows, columns, i, j, first, row_count, column_count, d, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    k = first + tl.arange(0, DEPTH)
    is_row = (i < row_count)[:, None] & (k < d)[None, :]
    a = tl.load(rows + i[:, None].to(tl.int64) * d + k[None, :], is_row, 0.0)
    is_column = (j < column_count)[None, :] & (k < d)[:, None]
    b = tl.load(columns + j[None, :].to(tl.int64) * d + k[:, None], is_column, 0.0)
    return _dot(a, b, found, PRECISION)


@triton.jit
def _dot(a, b, found, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a, b, found)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), found, input_precision=PRECISION)


@triton.jit
def _pair(j, itself, column_count):
    """Whether column j is there and is not the row itself; what rows beyond the last find is not stored."""
    return (j < column_count)[None, :] & (itself[:, None] != j[None, :])
