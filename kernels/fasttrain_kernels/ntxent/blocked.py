"""The three passes on a CPU, a tile of similarities at a time: products by BLAS, all else compiled, in cache, threaded.

Where the columns are the rows the similarities are symmetric, and half of the tiles serve for all. Notation as in the
README: p is the softmax of a row, c the gradient on its log-sum-exp, m the derivative of what is differentiated by c·p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic, overload
from torch import Tensor

from fasttrain_kernels.ntxent.log_sum_exp import Pairs
from fasttrain_kernels.threads import in_slices

TILE = 1024  # a tile of float32 is 4 MiB: it stays in the last cache on its way from product to exponential and back
SECOND_TILE = 768  # there are two at once: of 8 MiB free at a time glibc would return the pages, to fault them in again


def log_sum_exp(pairs: Pairs) -> tuple[Tensor, Tensor]:
    rows = pairs.rows
    # top starts low and finite: the difference of two infinities is none
    top, total = rows.new_full((len(rows),), -1e30), rows.new_zeros(len(rows))
    for i in _slices(rows, TILE):
        scaled = rows[i] * pairs.scale
        for j, mirrored in _partners(pairs, i, TILE):
            s = _similarities(pairs, scaled, i, j)
            _raise(top[i], total[i], s.amax(1))
            _threaded(_add_row_sums, len(s), s, top[i], total[i])
            if mirrored:
                _raise(top[j], total[j], s.amax(0))
                _threaded(_add_column_sums, s.shape[1], s, top[j], total[j])
    lse = total.log_().add_(top)
    return lse, lse.masked_fill(lse.isneginf(), 0)  # a row without others: its p = exp(−∞ − 0) is 0


def gradient(pairs: Pairs, lse: Tensor, c: Tensor, with_columns: bool) -> tuple[Tensor, Tensor | None]:
    by_rows, by_columns = _results(pairs, with_columns)
    row_side, column_side = _sides(pairs, lse, c)
    for i in _slices(pairs.rows, TILE):
        scaled = pairs.rows[i] * pairs.scale
        turned = scaled.T.contiguous()
        for j, mirrored in _partners(pairs, i, TILE, with_columns):
            w = _similarities(pairs, scaled, i, j)
            _threaded(_weigh, len(w), w, *_part(row_side, i), *_part(column_side, j))
            by_rows[i].add_(_product(w, pairs.columns[j].T), alpha=pairs.scale)
            if mirrored:
                by_columns[j] += _product(turned, w.T).T
    return by_rows, None if pairs.symmetric else by_columns


def second(
    pairs: Pairs, lse: Tensor, c: Tensor, on_rows: Tensor, on_columns: Tensor | None, with_columns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, columns = pairs.rows, pairs.columns
    if pairs.symmetric:
        on_columns = on_rows

    def adjoints(left: Tensor, j: slice) -> Tensor:
        """m_ij = scale (on_rows_i · columns_j + rows_i · on_columns_j) of left_i, by one product of twice the depth."""
        return _product(left, columns[j] if on_columns is None else torch.cat([columns[j], on_columns[j]], dim=1))

    def factors(i: slice) -> tuple[Tensor, Tensor]:
        scaled, on_scaled = rows[i] * pairs.scale, on_rows[i] * pairs.scale
        return scaled, on_scaled if on_columns is None else torch.cat([on_scaled, scaled], dim=1)

    mean = torch.zeros_like(lse)  # μ_i = Σ_j p_ij m_ij
    for i in _slices(rows, SECOND_TILE):
        scaled, left = factors(i)
        for j, mirrored in _partners(pairs, i, SECOND_TILE):
            s, m = _similarities(pairs, scaled, i, j), adjoints(left, j)
            _threaded(_add_row_means, len(s), s, m, lse[i], mean[i])
            if mirrored:
                _threaded(_add_column_means, s.shape[1], s, m, lse[j], mean[j])

    by_rows, by_columns = _results(pairs, with_columns)
    row_side, column_side = _sides(pairs, lse, c, mean)
    for i in _slices(rows, SECOND_TILE):
        scaled, left = factors(i)
        turned, on_turned = scaled.T.contiguous(), (on_rows[i] * pairs.scale).T.contiguous()
        for j, mirrored in _partners(pairs, i, SECOND_TILE, with_columns):
            w, b = _similarities(pairs, scaled, i, j), adjoints(left, j)
            _threaded(_weigh_second, len(w), w, b, *_part(row_side, i), *_part(column_side, j))
            by_rows[i].add_(_product(b, columns[j].T), alpha=pairs.scale)
            if on_columns is not None:
                by_rows[i].add_(_product(w, on_columns[j].T), alpha=pairs.scale)
            if mirrored:
                by_columns[j] += _product(turned, b.T).T
                by_columns[j] += _product(on_turned, w.T).T
    return mean, by_rows, None if pairs.symmetric else by_columns


def _slices(rows: Tensor, size: int, first: int = 0) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(first, len(rows), size))


def _partners(pairs: Pairs, i: slice, size: int, with_columns: bool = False) -> Iterator[tuple[slice, bool]]:
    """The columns for the rows i, and whether the tile's transpose counts too: a symmetric one comes once for both."""
    if pairs.symmetric:
        return ((j, j != i) for j in _slices(pairs.rows, size, i.start))
    return ((j, with_columns) for j in _slices(pairs.columns, size))


def _results(pairs: Pairs, with_columns: bool) -> tuple[Tensor, Tensor | None]:
    by_rows = torch.zeros_like(pairs.rows)
    if pairs.symmetric:
        return by_rows, by_rows
    return by_rows, torch.zeros_like(pairs.columns) if with_columns else None


def _sides(pairs: Pairs, lse: Tensor, *values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What tiles need of a row and of a column: (lse, values). A column that is no row has p = exp(−∞) = 0."""
    if pairs.symmetric:
        return (lse, *values), (lse, *values)
    zeros = lse.new_zeros(len(pairs.columns))
    return (lse, *values), (zeros + torch.inf, *(zeros for _ in values))


def _part(side: tuple[Tensor, ...], where: slice) -> tuple[Tensor, ...]:
    return tuple(vector[where] for vector in side)


def _raise(top: Tensor, total: Tensor, candidates: Tensor) -> None:
    """Take the new maxima into ``top``, in place, and ``total``, the sum of exp(s − top), along."""
    largest = torch.maximum(top, candidates)
    total.mul_((top - largest).exp_())
    top.copy_(largest)


def _similarities(pairs: Pairs, scaled: Tensor, i: slice, j: slice) -> Tensor:
    """The tile of scale · rows_i · columns_j, with rows_i scaled already; −∞ where the column is the row itself."""
    s = _product(scaled, pairs.columns[j])
    images, among, offset = pairs.setting.place
    if offset is not None:
        _exclude(s.numpy(), i.start, j.start, images, among, offset)
    return s


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of [k, d] and [l, d], each whole or, b alone, the transpose of a whole: oneDNN crawls over other strides.

    PyTorch's own float32 product (MKL) runs at half of oneDNN's speed on AMD's CPUs.
    """
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def _threaded(function: Callable, count: int, *arrays: Tensor) -> None:
    """``function(start, stop, *arrays)`` over slices of ``range(count)``, one a thread."""
    arrays = tuple(array.numpy() for array in arrays)
    in_slices(count, lambda start, stop: function(start, stop, *arrays))


_LOWEST, _ZERO, _HALF, _ONE, _LOG2_E = (np.float32(x) for x in (-87, 0, 0.5, 1, 1.4426950408889634))
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Cephes' minimax polynomial of e^r - 1 - r - r²/2 on [-ln 2 / 2, ln 2 / 2]
_C7, _C6, _C5 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C4, _C3 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1)

_TERMS = 32  # added up before they are added to the rest: small terms would be lost beside a large sum

# Sums may be reordered, so that they vectorise; NaN and infinities keep their meaning.
_compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


@_compiled
def _exclude(s, first_row, first_column, images, among, offset):
    for i in range(s.shape[0]):
        row = first_row + i
        own = row // images * among + offset + row % images - first_column
        if 0 <= own < s.shape[1]:
            s[i, own] = -np.inf


@_compiled
def _add_row_sums(start, stop, s, shift, total):
    for i in range(start, stop):
        row, row_shift, added = s[i], shift[i], total[i]
        for j in range(len(row)):
            added += _exp(row[j] - row_shift)
        total[i] = added


@_compiled
def _add_column_sums(start, stop, s, shift, total):
    total, shift = total[start:stop], shift[start:stop]
    part = np.empty_like(total)
    for first in range(0, len(s), _TERMS):
        part[:] = 0
        for i in range(first, min(first + _TERMS, len(s))):
            row = s[i, start:stop]
            for j in range(len(row)):
                part[j] += _exp(row[j] - shift[j])
        total += part


@_compiled
def _weigh(start, stop, s, lse, c, column_lse, column_c):
    """w_ij = c_i p_ij + c_j p_ji in the place of s_ij."""
    for i in range(start, stop):
        row, row_lse, row_c = s[i], lse[i], c[i]
        for j in range(len(row)):
            row[j] = row_c * _exp(row[j] - row_lse) + column_c[j] * _exp(row[j] - column_lse[j])


@_compiled
def _add_row_means(start, stop, s, m, lse, mean):
    for i in range(start, stop):
        row, of_m, row_lse, added = s[i], m[i], lse[i], mean[i]
        for j in range(len(row)):
            added += _exp(row[j] - row_lse) * of_m[j]
        mean[i] = added


@_compiled
def _add_column_means(start, stop, s, m, lse, mean):
    mean, lse = mean[start:stop], lse[start:stop]
    part = np.empty_like(mean)
    for first in range(0, len(s), _TERMS):
        part[:] = 0
        for i in range(first, min(first + _TERMS, len(s))):
            row, of_m = s[i, start:stop], m[i, start:stop]
            for j in range(len(row)):
                part[j] += _exp(row[j] - lse[j]) * of_m[j]
        mean += part


@_compiled
def _weigh_second(start, stop, s, m, lse, c, mean, column_lse, column_c, column_mean):
    """w_ij as in _weigh in the place of s_ij, c_i p_ij (m_ij − μ_i) + c_j p_ji (m_ij − μ_j) in that of m_ij."""
    for i in range(start, stop):
        row, of_m, row_lse, row_c, row_mean = s[i], m[i], lse[i], c[i], mean[i]
        for j in range(len(row)):
            by_row = row_c * _exp(row[j] - row_lse)
            by_column = column_c[j] * _exp(row[j] - column_lse[j])
            row[j] = by_row + by_column
            of_m[j] = by_row * (of_m[j] - row_mean) + by_column * (of_m[j] - column_mean[j])


def _exp(x):
    """e^x. In float32 a polynomial that vectorises, within 1e-7 of it, and exactly 0 for x < -87."""


@overload(_exp, jit_options={"fastmath": {"contract", "nsz"}})
def _exp_overload(x):
    if x == numba.float64:
        return lambda x: np.exp(x)

    def exp(x):
        within = _LOWEST if x < _LOWEST else x
        k = np.floor(within * _LOG2_E + _HALF)
        r = within - k * _LN_2_HIGH - k * _LN_2_LOW  # in two parts, so that the difference is exact
        series = _C7 * r + _C6
        series = series * r + _C5
        series = series * r + _C4
        series = series * r + _C3
        series = series * r + _HALF
        series = series * r * r + r + _ONE
        return _ZERO if x < _LOWEST else series * _power_of_two(np.int32(k))

    return exp


@intrinsic
def _power_of_two(typing_context, k):
    def generate(context, builder, signature, arguments):
        exponent = builder.add(arguments[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return numba.float32(numba.int32), generate
