"""Colours of one image on one core: short loops over planes that stay in the first-level cache, for any drawn order.

An image is three planes [height * width] of float32 in [0, 1], gone through a strip of rows at a time: every operation
is a loop that the compiler turns into vector code. Two things need the whole image and split the work into up to three
passes over its strips: contrast's mean, and the blur's vertical half.
"""

from __future__ import annotations

import numpy as np

from fasttrain_kernels.augment.crop import jit
from fasttrain_kernels.augment.reference import LUMA

RED, GREEN, BLUE = map(np.float32, LUMA)  # torchvision's, which sum to 0.9999
GROUP = 4  # taps to a side that one sweep of the blur adds: more would not fit the registers

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_TWO, _THREE, _FOUR, _FIVE, _SIX = (np.float32(x) for x in (2, 3, 4, 5, 6))
_SIXTH = np.float32(1 / 6)


@jit
def jitter(red, green, blue, order, factors, mean):
    """The jitter operations ``order`` in turn; ``mean`` is the image's luma for contrast."""
    for operation in order:
        factor = factors[operation]
        rest = _ONE - factor
        if operation == 0 and factor != _ONE:
            for plane in (red, green, blue):
                for x in range(len(plane)):
                    plane[x] = min(plane[x] * factor, _ONE)
        elif operation == 1 and factor != _ONE:
            for plane in (red, green, blue):
                for x in range(len(plane)):
                    plane[x] = min(max(plane[x] * factor + rest * mean, _ZERO), _ONE)
        elif operation == 2 and factor != _ONE:
            for x in range(len(red)):
                other = rest * (RED * red[x] + GREEN * green[x] + BLUE * blue[x])
                red[x] = min(max(red[x] * factor + other, _ZERO), _ONE)
                green[x] = min(max(green[x] * factor + other, _ZERO), _ONE)
                blue[x] = min(max(blue[x] * factor + other, _ZERO), _ONE)
        elif operation == 3 and factor != _ZERO:
            turn = _SIX * factor
            for x in range(len(red)):  # RGB -> HSV, the hue turned, -> RGB
                r, g, b = red[x], green[x], blue[x]
                value = max(r, max(g, b))
                chroma = value - min(r, min(g, b))
                scale = _ONE / (chroma if chroma > _ZERO else _ONE)
                sixths = (
                    (g - b) * scale if value == r else _TWO + (b - r) * scale if value == g else _FOUR + (r - g) * scale
                )
                sixths += turn
                red[x] = value - chroma * _wave(sixths + _FIVE)
                green[x] = value - chroma * _wave(sixths + _THREE)
                blue[x] = value - chroma * _wave(sixths + _ONE)


@jit
def _wave(k):
    k -= _SIX * np.floor(k * _SIXTH)
    return min(max(min(k, _FOUR - k), _ZERO), _ONE)


@jit
def sum_luma(red, green, blue):
    """Of a strip."""
    total = _ZERO
    for x in range(len(red)):
        total += RED * red[x] + GREEN * green[x] + BLUE * blue[x]
    return total


@jit
def greyscale(red, green, blue):
    """All three planes become the luma."""
    for x in range(len(red)):
        luma = RED * red[x] + GREEN * green[x] + BLUE * blue[x]
        red[x] = luma
        green[x] = luma
        blue[x] = luma


@jit
def store(red, green, blue, solarise, pixels):
    """A strip, solarised or not, into ``pixels`` [positions, 3]."""
    if solarise:
        for plane in (red, green, blue):
            for x in range(len(plane)):
                plane[x] = _ONE - plane[x] if plane[x] >= _HALF else plane[x]
    for x in range(len(red)):
        pixels[x, 0] = red[x]
        pixels[x, 1] = green[x]
        pixels[x, 2] = blue[x]


@jit
def _reflect(position, size):
    """Index that a position beyond the border mirrors to; those that only weight 0 reaches stay in bounds."""
    if position < 0:
        position = -position
    if position >= size:
        position = 2 * size - 2 - position
    return max(position, 0)


@jit
def blur_horizontally(plane, padded, weights, radius, halo):
    width = len(plane)
    for x in range(width):
        padded[halo + x] = plane[x]
    for k in range(1, halo + 1):
        padded[halo - k] = plane[_reflect(-k, width)]
        padded[halo + width - 1 + k] = plane[_reflect(width - 1 + k, width)]
    centre = weights[0]
    for x in range(width):
        plane[x] = centre * padded[halo + x]
    for k in range(1, radius + 1, GROUP):
        w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        left, right = padded[halo - k - 3 :], padded[halo + k :]
        for x in range(width):
            plane[x] += (
                w0 * (left[x + 3] + right[x])
                + w1 * (left[x + 2] + right[x + 1])
                + w2 * (left[x + 1] + right[x + 2])
                + w3 * (left[x] + right[x + 3])
            )


@jit
def blur_vertically(rows, y, weights, radius, line):
    height = len(rows)
    middle, centre = rows[y], weights[0]
    for j in range(len(line)):
        line[j] = centre * middle[j]
    for k in range(1, radius + 1, GROUP):
        w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        up0, down0 = rows[_reflect(y - k, height)], rows[_reflect(y + k, height)]
        up1, down1 = rows[_reflect(y - k - 1, height)], rows[_reflect(y + k + 1, height)]
        up2, down2 = rows[_reflect(y - k - 2, height)], rows[_reflect(y + k + 2, height)]
        up3, down3 = rows[_reflect(y - k - 3, height)], rows[_reflect(y + k + 3, height)]
        for j in range(len(line)):
            line[j] += (
                w0 * (up0[j] + down0[j])
                + w1 * (up1[j] + down1[j])
                + w2 * (up2[j] + down2[j])
                + w3 * (up3[j] + down3[j])
            )
