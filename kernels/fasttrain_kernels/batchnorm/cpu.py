"""The passes of BatchNorm on a CPU where a row's channels lie together, compiled by numba, a slice of rows a thread.

Terms are computed in float32 (float64 for float64 x), summed over eight rows in that precision and from there in
float64. What each pass computes is stated in ``native``, why in this folder's README.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fasttrain_kernels.batchnorm import channels as channels
from fasttrain_kernels.threads import in_slices

BLOCK = 32
"Rows summed in the precision of the terms, before the sum goes into float64."
AHEAD, LINE = 512, 16
"Values that a prefetch is ahead, and that it fetches in float32."
ZERO = np.float32(0)
"An integer would make numba compare in float64."
SMALL = 1 << 15
"Values below which a second thread costs more than it saves."

compiled = njit(nogil=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")


def takes(x: Tensor) -> bool:
    """Whether x is on the CPU, channels-last or [M, C], and of a dtype that these passes read."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return False
    return x.movedim(1, -1).is_contiguous()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    # about a row of x, so that no digit is lost where the mean is far larger than the deviation
    origin = x.movedim(1, -1).reshape(rows.shape)[:1].to(torch.promote_types(x.dtype, torch.float32))
    by = origin.numpy()
    sums = _summed(2, rows, lambda *into: _powers(rows, by, *into))
    offset = sums[0] / max(len(rows), 1)
    squares = (sums[1] - sums[0] * offset).clamp(min=0)
    mean = offset + origin[0].double() if len(rows) else offset
    return mean.to(origin.dtype), squares.to(origin.dtype)


def normalise(x: Tensor, residual: Tensor | None, by: Tensor, relu: bool) -> Tensor:
    y = torch.empty_like(x)
    rows, added, out, by = _rows(x), _rows(residual), _rows(y), by.numpy()
    least = by.dtype.type(0 if relu else -np.inf)
    _in_slices(rows, lambda start, stop: _normalise(rows, added, by, least, out, start, stop))
    return y


def gradient_sums(g: Tensor, x: Tensor, y: Tensor | None, by: Tensor) -> tuple[Tensor, Tensor]:
    gated = g if y is None else torch.empty_like(g)
    g_rows, rows, y_rows, coefficients = _rows(g), _rows(x), _rows(y), by.numpy()
    out_rows = None if y is None else _rows(gated)
    sums = _summed(2, rows, lambda *into: _gradient_sums(g_rows, rows, y_rows, out_rows, coefficients, *into))
    return sums.to(by.dtype), gated


def gradient(g: Tensor, x: Tensor, by: Tensor) -> Tensor:
    g_x = torch.empty_like(x)
    g_rows, rows, out, by = _rows(g), _rows(x), _rows(g_x), by.numpy()
    _in_slices(rows, lambda start, stop: _gradient(g_rows, rows, by, out, start, stop))
    return g_x


def second_sums(u: Tensor, g: Tensor, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u_rows, g_rows, rows, coefficients = _rows(u), _rows(g), _rows(x), by.numpy()
    sums = _summed(3, rows, lambda *into: _second_sums(u_rows, g_rows, rows, coefficients, *into))
    return tuple(sums.to(by.dtype))


def second(u: Tensor, g: Tensor, x: Tensor, q: Tensor | None, y: Tensor | None, by: Tensor) -> tuple[Tensor, Tensor]:
    g_g, g_x = torch.empty_like(x), torch.empty_like(x)
    u, g, rows, q, y, on_g, on_x, by = (*map(_rows, (u, g, x, q, y, g_g, g_x)), by.numpy())
    _in_slices(rows, lambda start, stop: _second(u, g, rows, q, y, by, on_g, on_x, start, stop))
    return g_g, g_x


def _rows(x: Tensor | None) -> np.ndarray | None:
    """x's own memory as [M, C]; NumPy has no bfloat16, whose bits come as uint16."""
    if x is None:
        return None
    rows = x.detach().movedim(1, -1).view(x.numel() // x.shape[1], x.shape[1])
    return rows.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else rows.numpy()


def _in_slices(rows: np.ndarray, work: Callable[[int, int], None]) -> None:
    if rows.size < SMALL:
        work(0, len(rows))
    else:
        in_slices(len(rows), work)


def _summed(terms: int, rows: np.ndarray, work: Callable[[np.ndarray, np.ndarray, int, int], None]) -> Tensor:
    """Sums [terms, C] over the slices, always added in the same order."""
    precision = np.float64 if rows.dtype == np.float64 else np.float32
    parts = {}

    def part(start: int, stop: int) -> None:
        parts[start] = np.zeros((terms, rows.shape[1]))
        work(np.zeros((terms, rows.shape[1]), precision), parts[start], start, stop)

    _in_slices(rows, part)
    return torch.from_numpy(sum(parts[start] for start in sorted(parts)))


@intrinsic
def _get(typing, array, row, column):
    """array[row, column] in the precision of the arithmetic.

    Loads and stores tell LLVM that nothing written here is read here; it would otherwise compare every two arrays in
    every row, or, with as many as these passes have, not vectorise at all.
    """
    half = array.dtype == types.uint16

    def code(context, builder, signature, arguments):
        value = builder.load(_pointer(context, builder, signature, arguments))
        value.set_metadata("noalias", _written(builder.module))
        if half:
            bits = builder.shl(builder.zext(value, _i32), _i32(16))
            value = builder.bitcast(bits, ir.FloatType())
        return value

    return (types.float32 if half else array.dtype)(array, types.intp, types.intp), code


@intrinsic
def _put(typing, array, row, column, value):
    """array[row, column] = value, rounded to nearest even where the array holds bfloat16."""
    half = array.dtype == types.uint16

    def code(context, builder, signature, arguments):
        value = arguments[3]
        if half:
            bits = builder.bitcast(value, _i32)
            odd = builder.and_(builder.lshr(bits, _i32(16)), _i32(1))
            rounded = builder.lshr(builder.add(bits, builder.add(odd, _i32(0x7FFF))), _i32(16))
            is_nan = builder.fcmp_unordered("uno", value, value)
            value = builder.trunc(builder.select(is_nan, _i32(0x7FC0), rounded), ir.IntType(16))
        store = builder.store(value, _pointer(context, builder, signature, arguments))
        store.set_metadata("alias.scope", _written(builder.module))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.float32 if half else array.dtype), code


_i32 = ir.IntType(32)


def _pointer(context, builder, signature, arguments):
    kind = signature.args[0]
    array = context.make_array(kind)(context, builder, arguments[0])
    return cgutils.get_item_pointer(context, builder, kind, array, arguments[1:3], wraparound=False)


def _written(module: ir.Module):
    domain = module.add_metadata(["fasttrain_kernels.batchnorm"])
    return module.add_metadata([module.add_metadata(["written", domain])])


@intrinsic
def _prefetch(typing, array, row, column):
    """Ask for the memory of array[row, column], which may lie past the array's end."""

    def code(context, builder, signature, arguments):
        pointer = builder.bitcast(_pointer(context, builder, signature, arguments), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _i32, _i32, _i32])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(ask, [pointer, _i32(0), _i32(3), _i32(1)])  # to read, into the nearest cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), code


@compiled
def _fetch(array, m):
    """Ask for the memory AHEAD of a row's; several streams at once are more than the hardware foresees."""
    for c in range(0, array.shape[1], LINE):
        _prefetch(array, m, c + AHEAD)


@compiled
def _move(part, out):
    for k in range(part.shape[0]):
        for c in range(part.shape[1]):
            out[k, c] += part[k, c]
            part[k, c] = 0


@compiled
def _powers(x, by, part, out, start, stop):
    for first in range(start, stop, BLOCK):
        for m in range(first, min(first + BLOCK, stop)):
            _fetch(x, m)
            for c in range(x.shape[1]):
                centred = _get(x, m, c) - _get(by, 0, c)
                _put(part, 0, c, part[0, c] + centred)
                _put(part, 1, c, part[1, c] + centred * centred)
        _move(part, out)


@compiled
def _normalise(x, residual, by, least, out, start, stop):
    for m in range(start, stop):
        _fetch(x, m)
        if residual is not None:
            _fetch(residual, m)
        for c in range(x.shape[1]):
            y = _get(by, 1, c) * (_get(x, m, c) - _get(by, 0, c)) + _get(by, 2, c)
            if residual is not None:
                y += _get(residual, m, c)
            _put(out, m, c, least if y < least else y)


@compiled
def _gradient_sums(g, x, y, gated, by, part, out, start, stop):
    for first in range(start, stop, BLOCK):
        for m in range(first, min(first + BLOCK, stop)):
            _fetch(g, m)
            _fetch(x, m)
            if y is not None:
                _fetch(y, m)
            for c in range(x.shape[1]):
                h, centred = _get(g, m, c), _get(x, m, c) - _get(by, 0, c)
                if y is None:
                    h = ZERO if _get(by, 1, c) * centred + _get(by, 2, c) <= ZERO else h
                else:
                    h = ZERO if _get(y, m, c) <= ZERO else h
                    _put(gated, m, c, h)
                _put(part, 0, c, part[0, c] + h)
                _put(part, 1, c, part[1, c] + h * centred)
        _move(part, out)


@compiled
def _gradient(g, x, by, out, start, stop):
    for m in range(start, stop):
        _fetch(g, m)
        _fetch(x, m)
        for c in range(x.shape[1]):
            centred = _get(x, m, c) - _get(by, 0, c)
            h = _get(g, m, c)
            h = ZERO if _get(by, 1, c) * centred + _get(by, 2, c) <= ZERO else h
            _put(out, m, c, _get(by, 3, c) * h + _get(by, 4, c) * centred + _get(by, 5, c))


@compiled
def _second_sums(u, g, x, by, part, out, start, stop):
    for first in range(start, stop, BLOCK):
        for m in range(first, min(first + BLOCK, stop)):
            _fetch(u, m)
            _fetch(g, m)
            _fetch(x, m)
            for c in range(x.shape[1]):
                v, h, centred = _get(u, m, c), _get(g, m, c), _get(x, m, c) - _get(by, 0, c)
                h = ZERO if _get(by, 1, c) * centred + _get(by, 2, c) <= ZERO else h
                _put(part, 0, c, part[0, c] + v)
                _put(part, 1, c, part[1, c] + v * centred)
                _put(part, 2, c, part[2, c] + v * h)
        _move(part, out)


@compiled
def _second(u, g, x, q, y, by, on_g, on_x, start, stop):
    for m in range(start, stop):
        _fetch(u, m)
        _fetch(g, m)
        _fetch(x, m)
        if y is not None:
            _fetch(y, m)
        if q is not None:
            _fetch(q, m)
        for c in range(x.shape[1]):
            centred = _get(x, m, c) - _get(by, 0, c)
            closed = _get(by, 1, c) * centred + _get(by, 2, c) <= ZERO if y is None else _get(y, m, c) <= ZERO
            v, h = _get(u, m, c), _get(g, m, c)
            h = ZERO if closed else h
            upstream = _get(by, 3, c) * v + _get(by, 4, c) * centred + _get(by, 5, c)
            if q is not None:
                upstream += _get(q, m, c)
            _put(on_g, m, c, ZERO if closed else upstream)
            _put(on_x, m, c, _get(by, 6, c) * v + _get(by, 7, c) * h + _get(by, 8, c) * centred + _get(by, 9, c))
