"""The views of a batch on a GPU: one launch, a program a view, which goes through that view's part of ``out`` alone.

::

    crop, resize, flip -> bytes        the last quarter of the view's part (of uint8 views: the part itself)
    (contrast) mean luma of those bytes
    bytes -> colours -> float32        a block of rows at a time, which never reaches the bytes that are not read yet
             `- blur along the rows
    (blur) along the columns           a strip of columns at a time

A blur's values replace those that it is made of: a block of them is summed whole before it is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttrain_kernels.augment.draws import Column
from fasttrain_kernels.augment.reference import LUMA, blur_radius

TILE = 512
"Pixels of a block of rows."
WARPS = 8
FLIP, GREY, SOLARISE, ORDER = (tl.constexpr(shift) for shift in (0, 1, 2, 8))
"Where a view's flags begin in their word."
TOP, LEFT, HEIGHT, WIDTH, FLAGS, BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA = (tl.constexpr(int(c)) for c in Column)
RED, GREEN, BLUE = (tl.constexpr(share) for share in LUMA)


def augment_triton(pixels: Tensor, starts: Tensor | None, sizes: Tensor | None, table: Tensor, out: Tensor) -> None:
    """As :func:`fasttrain_kernels.augment.gpu.augment_gpu`."""
    views, images, words = table.shape
    size = out.shape[2]
    side, row = triton.next_power_of_2(size), triton.next_power_of_2(3 * size)
    options = {
        "SIZE": size,
        "RADIUS": blur_radius(size),
        "WORDS": words,
        "SIDE": side,
        "ROWS": min(max(TILE // side, 1), side),
        "ROW": row,
        "STRIP": min(max(4 * TILE // side, 1), row),
    }
    # products and sums are rounded apart, so that a crop is that of ``batched`` to the bit
    kernel = _augment[(views * images,)]
    kernel(pixels, starts, sizes, table, table.view(torch.float32), out, images, **options,
           num_warps=WARPS, enable_fp_fusion=False)  # fmt: skip


@triton.jit
def _augment(
    pixels, starts, sizes, table, numbers, out, images,
    SIZE: tl.constexpr, RADIUS: tl.constexpr, WORDS: tl.constexpr,
    SIDE: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0)
    drawn, factors = table + view * WORDS, numbers + view * WORDS
    values: tl.constexpr = 3 * SIZE * SIZE
    begin = view.to(tl.int64) * values
    target = out + begin
    colours: tl.constexpr = out.dtype.element_ty == tl.float32
    if starts is None:
        levels = pixels + begin
    else:
        i = view % images
        levels = (target.to(tl.pointer_type(tl.uint8)) + 3 * values) if colours else target
        _crop(pixels + tl.load(starts + i), tl.load(sizes + 2 * i + 1), drawn, levels, SIZE, SIDE, ROWS)
        tl.debug_barrier()
    if colours:
        _colour(levels, target, tl.load(drawn + FLAGS), factors, SIZE, RADIUS, SIDE, ROWS, ROW, STRIP)


# Crop, resize, flip ------------------------------------------------------------------------------------------------
#
# Output pixel i of SIZE looks at (i + 1/2) L / SIZE of a side of L pixels, through a triangle of half-width
# max(L / SIZE, 1). In units of 1 / (2 SIZE) pixels all of that is whole: a pixel is a sum of whole numbers (exact up to
# 2^24) over the sum of their weights, one division. ``batched`` computes the same to the bit.


@triton.jit
def _crop(source, across, drawn, levels, SIZE: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """``source`` uint8 [., across, 3] -> ``levels`` uint8 [SIZE, SIZE, 3]."""
    top, left = tl.load(drawn + TOP), tl.load(drawn + LEFT)
    height, width = tl.load(drawn + HEIGHT), tl.load(drawn + WIDTH)
    reach_y, reach_x = 2 * tl.maximum(height, SIZE), 2 * tl.maximum(width, SIZE)
    source += 3 * (top * across + left)
    x = tl.arange(0, SIDE)
    seen = tl.minimum(x, SIZE - 1)[None, :]
    flips = (tl.load(drawn + FLAGS) >> FLIP) & 1
    centre_x, first_x, sum_x = _triangle(tl.where(flips != 0, SIZE - 1 - seen, seen), width, reach_x, SIZE)
    for begin in range(0, SIZE, ROWS):
        y = begin + tl.arange(0, ROWS)
        centre_y, first_y, sum_y = _triangle(tl.minimum(y, SIZE - 1)[:, None], height, reach_y, SIZE)
        red = tl.zeros((ROWS, SIDE), tl.float32)
        green, blue = red, red
        for j in range(tl.cdiv(reach_x, SIZE)):
            at_x = 3 * tl.minimum(first_x + j, width - 1)
            r = tl.zeros((ROWS, SIDE), tl.float32)
            g, b = r, r
            for k in range(tl.cdiv(reach_y, SIZE)):
                at = source + (3 * across * tl.minimum(first_y + k, height - 1) + at_x)
                weight = _weight(first_y + k, centre_y, height, reach_y, SIZE).to(tl.float32)
                r += weight * tl.load(at).to(tl.float32)
                g += weight * tl.load(at + 1).to(tl.float32)
                b += weight * tl.load(at + 2).to(tl.float32)
            weight = _weight(first_x + j, centre_x, width, reach_x, SIZE).to(tl.float32)
            red += weight * r
            green += weight * g
            blue += weight * b
        at, inside = _places(y, x, SIZE)
        total = sum_y.to(tl.float32) * sum_x.to(tl.float32)
        tl.store(levels + at, _level(red, total), inside)
        tl.store(levels + at + 1, _level(green, total), inside)
        tl.store(levels + at + 2, _level(blue, total), inside)


@triton.jit
def _triangle(i, length, reach, SIZE: tl.constexpr):
    """Of output pixel i: the middle of its triangle of half-width ``reach``, from that of input pixel 0; the first
    input pixel under it; and the sum of the weights there."""
    centre = length * (2 * i + 1) - SIZE
    first = tl.maximum(centre + 2 * SIZE - reach, 0) // (2 * SIZE)
    total = tl.zeros_like(first)
    for k in range(tl.cdiv(reach, SIZE)):
        total += _weight(first + k, centre, length, reach, SIZE)
    return centre, first, total


@triton.jit
def _weight(tap, centre, length, reach, SIZE: tl.constexpr):
    """Of input pixel ``tap``, 0 where there is none."""
    return tl.where(tap < length, tl.maximum(reach - tl.abs(2 * SIZE * tap - centre), 0), 0)


@triton.jit
def _level(total, weights):
    return (tl.div_rn(total, weights) + 0.5).to(tl.int32).to(tl.uint8)


# Colours -----------------------------------------------------------------------------------------------------------


@triton.jit
def _colour(
    levels, target, flags, factors,
    SIZE: tl.constexpr, RADIUS: tl.constexpr,
    SIDE: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """``levels`` uint8 [SIZE, SIZE, 3] -> ``target`` float32 [SIZE, SIZE, 3]."""
    x = tl.arange(0, SIDE)
    sigma, solarise = tl.load(factors + SIGMA), (flags >> SOLARISE) & 1
    mean = 0.0
    if tl.load(factors + CONTRAST) != 1:
        before = 0  # operations that come before contrast; they leave 0 what is 0
        for slot in tl.static_range(1, 4):
            before = tl.where((flags >> (ORDER + 2 * slot)) & 3 == CONTRAST - BRIGHTNESS, slot, before)
        total = tl.zeros((ROWS, SIDE), tl.float32)
        for begin in range(0, SIZE, ROWS):
            at, inside = _places(begin + tl.arange(0, ROWS), x, SIZE)
            red, green, blue = _read(levels + at, inside)
            red, green, blue = _jitter(red, green, blue, factors, flags, before, mean)
            total += _luma(red, green, blue)
        mean = tl.sum(total) / (SIZE * SIZE)

    for begin in range(0, SIZE, ROWS):
        y = begin + tl.arange(0, ROWS)
        at, inside = _places(y, x, SIZE)
        red, green, blue = _read(levels + at, inside)
        red, green, blue = _jitter(red, green, blue, factors, flags, 4, mean)
        if (flags >> GREY) & 1:
            luma = _luma(red, green, blue)
            red, green, blue = luma, luma, luma
        inverts = solarise if sigma <= 0 else 0
        tl.debug_barrier()  # the last bytes that are read lie where the last values are written
        tl.store(target + at, _solarised(red, inverts), inside)
        tl.store(target + at + 1, _solarised(green, inverts), inside)
        tl.store(target + at + 2, _solarised(blue, inverts), inside)
        if sigma > 0:
            tl.debug_barrier()
            _blur_rows(target, y, sigma, SIZE, RADIUS, ROW)
    if sigma > 0:
        tl.debug_barrier()
        for begin in range(0, 3 * SIZE, STRIP):
            _blur_columns(target, begin + tl.arange(0, STRIP), sigma, solarise, SIZE, RADIUS, SIDE)


@triton.jit
def _jitter(red, green, blue, factors, flags, count, mean):
    """The first ``count`` operations in the drawn order; ``mean`` luma for contrast."""
    for slot in range(count):
        operation = (flags >> (ORDER + 2 * slot)) & 3
        factor = tl.load(factors + BRIGHTNESS + operation)
        if operation == HUE - BRIGHTNESS:
            if factor != 0:
                red, green, blue = _rotated(red, green, blue, factor)
        else:
            luma = tl.where(operation == SATURATION - BRIGHTNESS, _luma(red, green, blue), mean)
            other = (1 - factor) * tl.where(operation == 0, 0.0, luma)
            red = _clamped(factor * red + other)
            green = _clamped(factor * green + other)
            blue = _clamped(factor * blue + other)
    return red, green, blue


@triton.jit
def _rotated(red, green, blue, turns):
    """HSV's hue turned, without its six sectors: see ``batched.rotate_hue``."""
    value = tl.maximum(red, tl.maximum(green, blue))
    chroma = value - tl.minimum(red, tl.minimum(green, blue))
    scale = 1 / tl.where(chroma > 0, chroma, 1.0)
    sixths = tl.where(
        value == red,
        (green - blue) * scale,
        tl.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    sixths += 6 * turns
    return value - chroma * _wave(sixths + 5), value - chroma * _wave(sixths + 3), value - chroma * _wave(sixths + 1)


@triton.jit
def _wave(k):
    k -= 6 * tl.floor(k * (1 / 6))
    return _clamped(tl.minimum(k, 4 - k))


@triton.jit
def _luma(red, green, blue):
    return RED * red + GREEN * green + BLUE * blue


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _solarised(x, inverts):
    return tl.where((inverts != 0) & (x >= 0.5), 1 - x, x)


# Blur --------------------------------------------------------------------------------------------------------------


@triton.jit
def _blur_rows(target, y, sigma, SIZE: tl.constexpr, RADIUS: tl.constexpr, ROW: tl.constexpr):
    column = tl.arange(0, ROW)
    base, place = 3 * SIZE * y[:, None] + (column % 3)[None, :], (column // 3)[None, :]
    inside = (y < SIZE)[:, None] & (column < 3 * SIZE)[None, :]
    _blur(target, base, place, inside, 3, sigma, 0, SIZE, RADIUS)


@triton.jit
def _blur_columns(target, column, sigma, inverts, SIZE: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr):
    y = tl.arange(0, SIDE)
    inside = (y < SIZE)[:, None] & (column < 3 * SIZE)[None, :]
    _blur(target, column[None, :], y[:, None], inside, 3 * SIZE, sigma, inverts, SIZE, RADIUS)


@triton.jit
def _blur(target, base, place, inside, STRIDE: tl.constexpr, sigma, inverts, SIZE: tl.constexpr, RADIUS: tl.constexpr):
    """Along the lines of SIZE values that lie STRIDE apart: ``base`` is where a line begins, ``place`` is on it.

    Lines are reflected at both ends. Taps beyond 6 σ weigh less than float32 shows.
    """
    at = target + base
    x, total = tl.load(at + STRIDE * place, inside, 0.0), 1.0
    for k in range(1, tl.minimum(RADIUS, (6 * sigma).to(tl.int32) + 1) + 1):
        weight = tl.exp(-0.5 * (k / sigma) * (k / sigma))
        before, behind = tl.abs(place - k), SIZE - 1 - tl.abs(SIZE - 1 - place - k)
        x += weight * (tl.load(at + STRIDE * before, inside, 0.0) + tl.load(at + STRIDE * behind, inside, 0.0))
        total += 2 * weight
    tl.debug_barrier()
    tl.store(at + STRIDE * place, _solarised(x / total, inverts), inside)


# Blocks ------------------------------------------------------------------------------------------------------------


@triton.jit
def _places(y, x, SIZE: tl.constexpr):
    """Of the red values of pixels (y, x), and which of them there are."""
    return 3 * (SIZE * y[:, None] + x[None, :]), (y < SIZE)[:, None] & (x < SIZE)[None, :]


@triton.jit
def _read(at, inside):
    """Bytes as red, green, blue in [0, 1]; 0 where there is no pixel."""
    red = tl.load(at, inside, 0).to(tl.float32) * (1 / 255)
    green = tl.load(at + 1, inside, 0).to(tl.float32) * (1 / 255)
    blue = tl.load(at + 2, inside, 0).to(tl.float32) * (1 / 255)
    return red, green, blue


__all__ = ["augment_triton"]
