"""Crop, antialiased bilinear resize and flip: compiled, without Python's lock.

A box of uint8 [H, 3 W] -> float32 grey levels, a few output rows [3 S] at a time. Where the box is the
output's size its pixels are taken as they are; where it is no larger, each of its rows is stretched once, and two of
them blended; else every output row blends input rows first, then columns of that. In float32, rounded once at the end,
half up (Pillow's fixed point rounds after each direction).
"""

from __future__ import annotations

import numba
import numpy as np

jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})

HALF = np.float32(0.5)
_STRIP = 2048  # pixels
# unsigned: numba need not ask whether an index counts from the end
_ONE, _TWO, _THREE = np.uintp(1), np.uintp(2), np.uintp(3)


@jit
def strip_rows(size):
    """Output rows that are worked on together: their planes and what is written fit the first-level cache."""
    return max(1, _STRIP // size)


@jit
def crop_memory(size, longest):
    """What the cropping of images whose sides are at most ``longest`` works in, for an output of ``size``."""
    taps = 2 * max(longest, size) // size + 1
    starts, weights = np.zeros((3, size), np.uintp), np.zeros((2, size, taps), np.float32)
    # Zeros, not whatever memory holds: behind a crop's last column there is weight 0, and 0 times NaN is NaN.
    rows = np.zeros((2, 3 * (max(longest, size) + taps)), np.float32)
    return starts, weights, rows, np.empty(3 * size * strip_rows(size), np.float32)


@jit
def crop_view(pixels, box, flip, memory, view):
    """A view whole, rounded: ``pixels`` uint8 [H, 3 W] -> ``view`` uint8 [size, size, 3]."""
    size, strip = len(view), memory[3]
    rows, out = len(strip) // (3 * size), view.reshape(3 * size * size)
    taps = begin_crop(box, flip, size, memory)
    for first in range(0, size, rows):
        last = min(first + rows, size)
        crop_rows(pixels, box, flip, taps, first, last, memory)
        part = out[3 * size * first : 3 * size * last]
        for x in range(len(part)):
            part[x] = np.int32(strip[x] + HALF)


@jit
def begin_crop(box, flip, size, memory):
    """Make the weights of a box; returns how many columns blend to one."""
    starts, weights, _, _ = memory
    _triangle(box[2], size, False, starts[0], weights[0])
    return _triangle(box[3], size, flip, starts[1], weights[1])


@jit
def crop_rows(pixels, box, flip, taps, first, last, memory):
    """Output rows ``first`` to ``last`` of ``pixels`` uint8 [H, 3 W], unrounded, into the memory's strip: float32."""
    size, height, width = memory[0].shape[1], box[2], box[3]
    if height == size and width == size:
        _take_rows(pixels, box, flip, size, first, last, memory)
    elif height <= size and width <= size:
        _stretch_rows(pixels, box, size, first, last, memory)
    else:
        _blend_rows(pixels, box, size, taps, first, last, memory)


@jit
def _take_rows(pixels, box, flip, size, first, last, memory):
    strip = memory[3]
    for y in range(first, last):
        row = pixels[box[0] + y, 3 * box[1] : 3 * (box[1] + size)]
        line = strip[3 * size * (y - first) :]
        if flip:
            for x in range(size):
                to = 3 * (size - 1 - x)
                line[to], line[to + 1], line[to + 2] = row[3 * x], row[3 * x + 1], row[3 * x + 2]
        else:
            for x in range(3 * size):
                line[x] = row[x]


@jit
def _stretch_rows(pixels, box, size, first, last, memory):
    """Of a box that is enlarged. ``rows`` keeps the last two of its rows, stretched: a row's parity is its place."""
    starts, weights, rows, strip = memory
    top, left, height, width = box
    here, there = starts[1], starts[2]
    for x in range(size):
        there[x] = 3 * min(here[x] + 1, np.uintp(width - 1))
    even, odd = -1, -1
    for y in range(first, last):
        above = np.int64(starts[0, y])
        below = min(above + 1, height - 1)
        for row in (above, below):
            if (odd if row & 1 else even) != row:
                even, odd = (even, row) if row & 1 else (row, odd)
                source, out = pixels[top + row, 3 * left : 3 * (left + width)], rows[row & 1]
                for x in range(size):
                    a, b = _THREE * here[x], there[x]
                    weight, next_weight = weights[1, x, 0], weights[1, x, 1]
                    out[3 * x] = weight * np.float32(source[a]) + next_weight * np.float32(source[b])
                    out[3 * x + 1] = weight * np.float32(source[a + _ONE]) + next_weight * np.float32(source[b + _ONE])
                    out[3 * x + 2] = weight * np.float32(source[a + _TWO]) + next_weight * np.float32(source[b + _TWO])
        upper, lower, line = rows[above & 1], rows[below & 1], strip[3 * size * (y - first) :]
        weight, next_weight = weights[0, y, 0], weights[0, y, 1]
        for x in range(3 * size):
            line[x] = weight * upper[x] + next_weight * lower[x]


@jit
def _blend_rows(pixels, box, size, taps, first, last, memory):
    """Of a box that shrinks in a direction: input rows into ``row``, which vectorises, then its columns."""
    starts, weights, rows, strip = memory
    top, left, _, width = box
    row, begin, end = rows[0], 3 * left, 3 * (left + width)
    second, third, fourth, fifth, sixth = row[1:], row[2:], row[3:], row[4:], row[5:]
    for y in range(first, last):
        start = top + np.int64(starts[0, y])
        weight, next_weight = weights[0, y, 0], weights[0, y, 1]
        above, below = pixels[start, begin:end], pixels[min(start + 1, len(pixels) - 1), begin:end]
        for i in range(3 * width):
            row[i] = weight * above[i] + next_weight * below[i]
        for k in range(2, weights.shape[2]):
            if weights[0, y, k] > 0:
                weight, below = weights[0, y, k], pixels[start + k, begin:end]
                for i in range(3 * width):
                    row[i] += weight * below[i]
        line = strip[3 * size * (y - first) :]
        for x in range(size):
            at = _THREE * starts[1, x]
            weight, next_weight = weights[1, x, 0], weights[1, x, 1]
            red = weight * row[at] + next_weight * fourth[at]
            green = weight * second[at] + next_weight * fifth[at]
            blue = weight * third[at] + next_weight * sixth[at]
            for k in range(2, taps):
                weight, at_k = weights[1, x, k], at + _THREE * np.uintp(k)
                red += weight * row[at_k]
                green += weight * second[at_k]
                blue += weight * third[at_k]
            line[3 * x], line[3 * x + 1], line[3 * x + 2] = red, green, blue


@jit
def _triangle(length, size, reverse, starts, weights):
    """Taps of the triangle filter, widened by the scale where it shrinks (antialiasing); returns how many are in use.

    Output i is sum_k weights[i, k] * input[starts[i] + k]; its weights sum to 1, those not in use are 0.
    """
    scale = length / size
    support = max(scale, 1.0)
    most = 0
    for i in range(size):
        centre = scale * (i + 0.5)
        start = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), length) - start
        to = size - 1 - i if reverse else i
        total = 0.0
        for k in range(count):
            weight = max(0.0, 1.0 - abs(start + k + 0.5 - centre) / support)
            weights[to, k] = weight
            total += weight
        for k in range(count):
            weights[to, k] /= total
        for k in range(count, weights.shape[1]):
            weights[to, k] = 0
        starts[to] = start
        most = max(most, count)
    return most
