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

from fasttrain_kernels.ntxent.blocks import FORWARD_REGISTERS, blocks
from fasttrain_kernels.ntxent.log_sum_exp import LARGEST_BOUND, Factors, Pairs, Precision
from fasttrain_kernels.ntxent.unit_triton import in_factors_units

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are of base 2, which is what the hardware has
LN_2 = tl.constexpr(0.6931471805599453)
PLACE = ("images", "among", "shift", "views")


class _Side(NamedTuple):
    """One side of the pairs: rows of the ``length`` 1/‖x‖, and what weights need of them."""

    x: Tensor  # [R, d], in the dtype that is multiplied
    on_x: Tensor  # [R, d] the adjoints / length, or x itself in the first derivative, which does not look at them
    adjoint: Tensor  # [R, d] before that, exactly; likewise x itself
    length: Tensor | None  # [R]; None: all 1
    sums: Tensor  # [R]
    height: Tensor  # [R] c_i e^(κ − L_i) where the exponentials are e^(s_ij − κ), c_i where they are e^(s_ij − L_i)
    c: Tensor  # [R]
    mean: Tensor  # [R]
    images: int  # of each view
    shift: int  # image i is image i + shift of the other side
    weighs: bool  # whether softmaxes of this side's rows are part of the weights


def log_sum_exp(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """``sums`` are e^(κ − L) where κ is what is subtracted before every exponential, and L where a row's maximum is."""
    rows, columns = pairs.row_factors, pairs.column_factors
    result, sums = pairs.rows.new_empty(len(pairs.rows)), pairs.rows.new_empty(len(pairs.rows))
    images, among, offset = pairs.setting.place
    sizes = _blocks(pairs)
    _forward[(triton.cdiv(len(rows.x), sizes["ROWS"]),)](
        rows.x, rows.length, columns.x, columns.length, result, sums, len(rows.x), len(columns.x), rows.x.shape[1],
        pairs.scale, images, among, offset or 0, len(rows.x) // images, **_flags(pairs), **sizes,
        **({"maxnreg": FORWARD_REGISTERS} if pairs.setting.precision == "bf16" else {}),
    )  # fmt: skip
    return result, sums


def gradient(pairs: Pairs, sums: Tensor, c: Tensor, with_columns: bool) -> tuple[Tensor, Tensor | None]:
    rows, columns = _sides(pairs, sums, c, c, None, None)
    return _both(pairs, rows, columns, with_columns, second=False)


def second(
    pairs: Pairs, sums: Tensor, c: Tensor, on_rows: Tensor, on_columns: Tensor | None, with_columns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    mean, by_c = torch.empty_like(sums), torch.empty_like(sums)
    if on_columns is None and not pairs.symmetric:
        on_columns = torch.zeros_like(pairs.columns)
    rows, columns = _sides(pairs, sums, c, mean, on_rows, on_columns)
    sizes = _blocks(pairs, second=True)
    _means[(triton.cdiv(len(rows.x), sizes["ROWS"]),)](
        rows.x, rows.on_x, rows.length, columns.x, columns.on_x, columns.length, sums, mean, by_c,
        len(rows.x), len(columns.x), rows.x.shape[1], pairs.scale,
        rows.images, columns.images, rows.shift, len(rows.x) // rows.images, **_flags(pairs), **sizes,
    )  # fmt: skip
    return by_c, *_both(pairs, rows, columns, with_columns, second=True)


def _both(pairs: Pairs, rows: _Side, columns: _Side, with_columns: bool, second: bool) -> tuple[Tensor, Tensor | None]:
    by_rows = _derivative(pairs, rows, columns, second)
    by_columns = _derivative(pairs, columns, rows, second) if with_columns and not pairs.symmetric else None
    return by_rows, by_columns


def _derivative(pairs: Pairs, here: _Side, there: _Side, second: bool) -> Tensor:
    """By the rows ``here``, with their softmaxes and those of ``there`` as each side ``weighs``."""
    result = torch.empty_like(here.x, dtype=torch.float32)
    sizes = _blocks(pairs, second)
    grid = triton.cdiv(len(here.x), sizes["ROWS"]), triton.cdiv(here.x.shape[1], sizes["WIDTH"])
    _derivatives[grid](
        here.x, here.on_x, here.length, there.x, there.on_x, there.adjoint, there.length,
        here.sums, here.height, here.c, here.mean, there.sums, there.height, there.c, there.mean,
        result, len(here.x), len(there.x), here.x.shape[1], pairs.scale,
        here.images, there.images, here.shift, len(here.x) // here.images,
        HERE=here.weighs, THERE=there.weighs, SECOND=second, **_flags(pairs), **sizes,
    )  # fmt: skip
    return result


def _sides(
    pairs: Pairs, sums: Tensor, c: Tensor, mean: Tensor, on_rows: Tensor | None, on_columns: Tensor | None
) -> tuple[_Side, _Side]:
    height = c * sums if _is_bounded(pairs) else c
    images, among, offset = pairs.setting.place
    shift = offset or 0

    def side(factors: Factors, adjoint: Tensor | None, images: int, shift: int, weighs: bool) -> _Side:
        x, length = factors
        on_x, adjoint = (x, x) if adjoint is None else (in_factors_units(adjoint, factors), adjoint)
        return _Side(x, on_x, adjoint, length, sums, height, c, mean, images, shift, weighs)

    rows = side(pairs.row_factors, on_rows, images, shift, True)
    return rows, rows if pairs.symmetric else side(pairs.column_factors, on_columns, among, -shift, False)


def _is_bounded(pairs: Pairs) -> bool:
    return pairs.scale <= LARGEST_BOUND


def _flags(pairs: Pairs) -> dict[str, bool]:
    return {
        "AMONG": pairs.setting.place.offset is not None,
        "ATTRACTS": pairs.setting.attracts,
        "BOUNDED": _is_bounded(pairs),
        "SCALED": pairs.row_factors.length is not None,
    }


def _blocks(pairs: Pairs, second: bool = False) -> dict[str, int | str]:
    rows, dimensions = pairs.rows.shape
    precision = pairs.setting.precision
    return blocks(pairs.setting.like or rows, dimensions, precision, second) | {"PRECISION": _instruction(precision)}


def _instruction(precision: Precision) -> str:
    """How products are computed. Three TF32 products make one that is as exact as float32's, and faster.

    The interpreter multiplies bfloat16 wrongly, so there its values are multiplied in float32.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "ieee"
    return "tf32x3" if precision == "fp32" else precision


@triton.jit(do_not_specialize=PLACE)
def _forward(
    rows, row_length, columns, column_length, result, sums, row_count, column_count, d, scale,
    images, among, shift, views,
    AMONG: tl.constexpr, ATTRACTS: tl.constexpr, BOUNDED: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, DIMENSIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = i < row_count
    itself = _itself(i, is_row, images, among, shift, views, AMONG)
    length_i = _length(row_length, i, is_row, SCALED)
    bound = scale * LOG2_E if BOUNDED else 0.0
    held = _held(rows, i, row_count, d, DEPTH, DIMENSIONS)
    top = tl.full((ROWS,), -1e30, tl.float32)  # finite: the difference of two infinities is none
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, column_count, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        length_j = _length(column_length, j, j < column_count, SCALED)
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        there = _held(columns, j, column_count, d, DEPTH, DIMENSIONS)
        s = _product(s, held, there, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        s = _exponents(s, length_i * (scale * LOG2_E), length_j, j, column_count, bound, SCALED)
        s = _without_itself(s, itself, j, start, column_count, AMONG)
        if BOUNDED:
            total += tl.sum(tl.exp2(s), 1)
        else:
            largest = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - largest) + tl.sum(tl.exp2(s - largest[:, None]), 1)
            top = largest
    lse = ((bound if BOUNDED else top) + tl.log2(total)) * LN_2
    kept = 1 / total if BOUNDED else lse
    tl.store(sums + i, tl.where(total == 0, 0.0, kept), is_row)
    if ATTRACTS:
        attraction = tl.zeros((ROWS,), tl.float32)
        for step in range(1, views):
            j = _counterpart(i, is_row, step, images, among, shift, views)
            attraction += _row_products(rows, columns, i, j, d, DEPTH, DIMENSIONS, ROWS) * _length(
                column_length, j, j >= 0, SCALED
            )
        lse -= attraction * length_i * (scale / (views - 1))
    tl.store(result + i, lse, is_row)


@triton.jit(do_not_specialize=PLACE)
def _means(
    rows, on_rows, row_length, columns, on_columns, column_length, sums, mean, by_c, row_count, column_count, d, scale,
    images, among, shift, views,
    AMONG: tl.constexpr, ATTRACTS: tl.constexpr, BOUNDED: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, DIMENSIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """μ_i = Σ_j p_ij m_ij with m_ij = scale (on_i · column_j + row_i · on_j); by c_i μ_i, less what attracts of it."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = i < row_count
    itself = _itself(i, is_row, images, among, shift, views, AMONG)
    length_i = _length(row_length, i, is_row, SCALED)
    sum_i = tl.load(sums + i, is_row, 0.0)
    bound = scale * LOG2_E if BOUNDED else 0.0
    held, on_held = _held(rows, i, row_count, d, DEPTH, DIMENSIONS), _held(on_rows, i, row_count, d, DEPTH, DIMENSIONS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, column_count, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        length_j = _length(column_length, j, j < column_count, SCALED)
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        there = _held(columns, j, column_count, d, DEPTH, DIMENSIONS)
        s = _product(s, held, there, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        m = tl.zeros((ROWS, COLUMNS), tl.float32)
        on_there = _held(on_columns, j, column_count, d, DEPTH, DIMENSIONS)
        m = _product(m, on_held, there, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        m = _product(m, held, on_there, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        s = _exponents(s, length_i * (scale * LOG2_E), length_j, j, column_count, bound, SCALED)
        s = _without_itself(s, itself, j, start, column_count, AMONG)
        if SCALED:
            m = m * length_j[None, :]
        p = tl.exp2(s) if BOUNDED else tl.exp2(s - sum_i[:, None] * LOG2_E)
        total += tl.sum(p * m, 1)
    if BOUNDED:
        total = total * sum_i
    total = total * length_i * scale
    tl.store(mean + i, total, is_row)
    if ATTRACTS:
        attraction = tl.zeros((ROWS,), tl.float32)
        for step in range(1, views):
            j = _counterpart(i, is_row, step, images, among, shift, views)
            m_j = _row_products(on_rows, columns, i, j, d, DEPTH, DIMENSIONS, ROWS)
            m_j += _row_products(rows, on_columns, i, j, d, DEPTH, DIMENSIONS, ROWS)
            attraction += m_j * _length(column_length, j, j >= 0, SCALED)
        total -= attraction * length_i * (scale / (views - 1))
    tl.store(by_c + i, total, is_row)


@triton.jit(do_not_specialize=PLACE)
def _derivatives(
    rows, on_rows, row_length, columns, on_columns, adjoints, column_length,
    row_sums, row_height, row_c, row_mean, column_sums, column_height, column_c, column_mean,
    result, row_count, column_count, d, scale, images, among, shift, views,
    HERE: tl.constexpr, THERE: tl.constexpr, SECOND: tl.constexpr,
    AMONG: tl.constexpr, ATTRACTS: tl.constexpr, BOUNDED: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, DIMENSIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale · Σ_j w_ij column_j with w_ij = c_i p_ij [HERE] + c_j p_ji [THERE], less what attracts.

    SECOND: scale · Σ_j (b_ij column_j + w_ij on_j) with b_ij = c_i p_ij (m_ij − μ_i) + c_j p_ji (m_ij − μ_j) likewise.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * WIDTH
    k = first + tl.arange(0, WIDTH)
    is_row = i < row_count
    itself = _itself(i, is_row, images, among, shift, views, AMONG)
    length_i = _length(row_length, i, is_row, SCALED)
    bound = scale * LOG2_E if BOUNDED else 0.0
    held, on_held = _held(rows, i, row_count, d, DEPTH, DIMENSIONS), _held(on_rows, i, row_count, d, DEPTH, DIMENSIONS)
    if HERE:
        height_i = tl.load(row_height + i, is_row, 0.0)
        if not BOUNDED:
            lse_i = _lse(row_sums, i, is_row)
        if SECOND:
            mean_i = tl.load(row_mean + i, is_row, 0.0)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, column_count, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        is_column = j < column_count
        length_j = _length(column_length, j, is_column, SCALED)
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        there = _held(columns, j, column_count, d, DEPTH, DIMENSIONS)
        s = _product(s, held, there, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
        s = _exponents(s, length_i * (scale * LOG2_E), length_j, j, column_count, bound, SCALED)
        if AMONG:
            s = tl.where(itself[:, None] == j[None, :], float("-inf"), s)
        if SECOND:
            m = tl.zeros((ROWS, COLUMNS), tl.float32)
            on_there = _held(on_columns, j, column_count, d, DEPTH, DIMENSIONS)
            m = _product(m, on_held, there, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
            m = _product(m, held, on_there, i, j, row_count, column_count, d, DEPTH, DIMENSIONS, PRECISION)
            m = m * (length_i * scale)[:, None]
            if SCALED:
                m = m * length_j[None, :]
        if HERE:
            p = tl.exp2(s) if BOUNDED else tl.exp2(s - lse_i[:, None])
            w = height_i[:, None] * (p * length_j[None, :] if SCALED else p)
            if SECOND:
                b = w * (m - mean_i[:, None])
        if THERE:
            height_j = tl.load(column_height + j, is_column, 0.0)
            p = tl.exp2(s) if BOUNDED else tl.exp2(s - _lse(column_sums, j, is_column)[None, :])
            by_column = height_j[None, :] * (p * length_j[None, :] if SCALED else p)
            w = w + by_column if HERE else by_column
            if SECOND:
                mean_j = tl.load(column_mean + j, is_column, 0.0)
                by_column = by_column * (m - mean_j[None, :])
                b = b + by_column if HERE else by_column
        if SECOND:
            found = _weighed(found, b, there, j, column_count, first, d, DEPTH, DIMENSIONS, WIDTH, PRECISION)
            there = on_there
        found = _weighed(found, w, there, j, column_count, first, d, DEPTH, DIMENSIONS, WIDTH, PRECISION)
    if ATTRACTS:
        for step in range(1, views):
            j = _counterpart(i, is_row, step, images, among, shift, views)
            weight = tl.zeros((ROWS,), tl.float32)
            if HERE:
                weight += tl.load(row_c + i, is_row, 0.0)
            if THERE:
                weight += tl.load(column_c + j, j >= 0, 0.0)
            if SECOND:
                values = adjoints
            else:
                values = columns
                weight = weight * _length(column_length, j, j >= 0, SCALED)
            at = j[:, None].to(tl.int64) * d + k[None, :]
            value = tl.load(values + at, (j >= 0)[:, None] & (k < d)[None, :], 0.0).to(tl.float32)
            found -= (weight / (views - 1))[:, None] * value
    tl.store(result + i[:, None].to(tl.int64) * d + k[None, :], found * scale, is_row[:, None] & (k < d)[None, :])


@triton.jit
def _counterpart(i, is_row, step, images, among, shift, views):
    """The place of row i's image, ``step`` views on, among the columns; -1 where they lack it."""
    image = i % images + shift
    view = (i // images + step) % views
    return tl.where(is_row & (image >= 0) & (image < among), view * among + image, -1)


@triton.jit
def _itself(i, is_row, images, among, shift, views, AMONG: tl.constexpr):
    """The column that is row i; rows beyond the last are not stored."""
    if AMONG:
        return _counterpart(i, is_row, 0, images, among, shift, views)
    else:
        return i


@triton.jit
def _lse(sums, i, inside):
    return tl.load(sums + i, inside, 0.0) * LOG2_E


@triton.jit
def _length(length, i, inside, SCALED: tl.constexpr):
    if SCALED:
        return tl.load(length + i, inside, 0.0)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def _exponents(s, factor_i, length_j, j, column_count, bound, SCALED: tl.constexpr):
    """log₂ e^s_ij − bound of products s, −∞ where there is no column j."""
    s = s * factor_i[:, None]
    if SCALED:
        s = s * length_j[None, :]
    return s - tl.where(j < column_count, bound, float("inf"))[None, :]


@triton.jit
def _without_itself(s, itself, j, start, column_count, AMONG: tl.constexpr):
    """−∞ where column j is the row itself. Few tiles have such a pair, and comparing all is as dear as exponentials.

    Not before a product: older compilers do not pipeline a loop that has a branch there.
    """
    if AMONG:
        nearest = tl.min(tl.where(itself < 0, column_count, itself), 0)
        if (start + s.shape[1] > nearest) & (start <= tl.max(itself, 0)):
            s = tl.where(itself[:, None] == j[None, :], float("-inf"), s)
    return s


@triton.jit
def _tile(x, i, count, first, d, DEPTH: tl.constexpr):
    """[len(i), DEPTH] of the rows i of x, from dimension ``first`` on; 0 where there is nothing."""
    k = first + tl.arange(0, DEPTH)
    return tl.load(x + i[:, None].to(tl.int64) * d + k[None, :], (i < count)[:, None] & (k < d)[None, :], 0.0)


@triton.jit
def _held(x, i, count, d, DEPTH: tl.constexpr, DIMENSIONS: tl.constexpr):
    """The rows i of x, to be multiplied more than once; where they do not fit, x, to be read from each time."""
    if DIMENSIONS == DEPTH:
        return _tile(x, i, count, 0, d, DEPTH)
    else:
        return x


@triton.jit
def _product(
    found, rows, columns, i, j, row_count, column_count, d,
    DEPTH: tl.constexpr, DIMENSIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """found [ROWS, COLUMNS] + row_i · column_j of what is held of the two."""
    if DIMENSIONS == DEPTH:
        found = _dot(rows, tl.trans(columns), found, PRECISION)
    else:
        for first in range(0, DIMENSIONS, DEPTH):
            row = _tile(rows, i, row_count, first, d, DEPTH)
            found = _dot(row, tl.trans(_tile(columns, j, column_count, first, d, DEPTH)), found, PRECISION)
    return found


@triton.jit
def _weighed(
    found, weights, columns, j, column_count, first, d,
    DEPTH: tl.constexpr, DIMENSIONS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """found [ROWS, WIDTH] + Σ_j weights_ij column_j, from dimension ``first`` on."""
    values = columns if DIMENSIONS == DEPTH else _tile(columns, j, column_count, first, d, WIDTH)
    return _dot(_factor(weights, values.dtype, PRECISION), values, found, PRECISION)


@triton.jit
def _row_products(
    rows, columns, i, j, d, DEPTH: tl.constexpr, DIMENSIONS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """row_i · column_j of one column a row [ROWS], 0 where j is -1."""
    found = tl.zeros((ROWS,), tl.float32)
    for first in range(0, DIMENSIONS, DEPTH):
        k = first + tl.arange(0, DEPTH)
        inside = (j >= 0)[:, None] & (k < d)[None, :]
        a = tl.load(rows + i[:, None].to(tl.int64) * d + k[None, :], inside, 0.0).to(tl.float32)
        b = tl.load(columns + j[:, None].to(tl.int64) * d + k[None, :], inside, 0.0).to(tl.float32)
        found += tl.sum(a * b, 1)
    return found


@triton.jit
def _factor(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x in the dtype of what it is multiplied with; a tensor core cuts float32 to TF32, so half a digit is added."""
    if PRECISION == "tf32":
        return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _dot(a, b, found, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a, b, found)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), found, input_precision=PRECISION)
