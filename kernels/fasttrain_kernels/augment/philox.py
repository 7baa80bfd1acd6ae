"""The draws themselves, compiled: Philox4x64-10 and what is made of its words, without Python's lock.

No fast mathematics here: every float64 operation is the one that NumPy does, in its order.
"""

from __future__ import annotations

import math
from itertools import permutations

import numba
import numpy as np

from fasttrain_kernels.augment.draws import Draws

CROP_TRIES = 10
"""Boxes tried before the central fallback, as in torchvision's RandomResizedCrop."""

ORDERS = np.array(list(permutations(range(4))), np.int8)
_RETRY = 16  # first block of the crop's further tries; those before are the first crop (0) and the colours (1 to 3)

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")


def draw(
    key: tuple[int, int],
    ids: np.ndarray,
    sizes: np.ndarray,
    views: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    jitter: float,
    jitter_p: float,
    grey: float,
    blur: float,
    sigma: tuple[float, float],
    solarise: float,
) -> Draws:
    """What SimCLR's augmentation does to samples ``ids`` [n] of ``sizes`` [n, 2] (height, width).

    Word w of sample i in view v is that of Philox's block ``(block, v, i, 0)`` under ``key``; its upper 53 bits are a
    number in [0, 1), as NumPy's ``Generator.random`` makes them.
    """
    n = len(ids)
    draws = Draws(
        boxes=np.empty((n, views, 4), np.int32),
        flip=np.empty((n, views), np.bool_),
        brightness=np.empty((n, views), np.float32),
        contrast=np.empty((n, views), np.float32),
        saturation=np.empty((n, views), np.float32),
        hue=np.empty((n, views), np.float32),
        order=np.empty((n, views, 4), np.int8),
        grey=np.empty((n, views), np.bool_),
        sigma=np.empty((n, views), np.float32),
        solarise=np.empty((n, views), np.bool_),
    )
    words = np.array([word & _MASK for word in key], np.uint64)
    crop = np.array([scale[0], scale[1], ratio[0], ratio[1], math.log(ratio[0]), math.log(ratio[1])])
    chances = np.array([flip, jitter_p, grey, blur, solarise])
    strength = np.array([0.8 * jitter, 0.2 * jitter, sigma[0], sigma[1]])
    ids, sizes = np.ascontiguousarray(ids, np.uint64), np.ascontiguousarray(sizes, np.int64).reshape(n, 2)
    _draw(words, ids, sizes, crop, chances, strength, *draws)
    return draws


def philox(key: tuple[int, int], *counter: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Philox4x64-10 (Salmon et al. 2011): four words from four counter words (broadcast against each other, uint64).

    ``philox(key, c, 0, 0, 0)`` is what ``np.random.Philox(key=key, counter=[c - 1, 0, 0, 0]).random_raw(4)`` gives:
    NumPy counts up before it computes.
    """
    counters = np.broadcast_arrays(*(np.atleast_1d(np.asarray(word, np.uint64)) for word in counter))
    words = np.empty((4, counters[0].size), np.uint64)
    _philox_words(np.array([word & _MASK for word in key], np.uint64), np.stack([c.ravel() for c in counters]), words)
    return tuple(words.reshape(4, *counters[0].shape))


_MASK = 2**64 - 1
_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_SHIFT, _UNIT = np.uint64(11), 2.0**-53


@_jit
def _high(a, b):
    """High word of the 128-bit product, by 32-bit halves."""
    a1, a0, b1, b0 = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    middle = a1 * b0 + (a0 * b0 >> _HALF)
    return a1 * b1 + (middle >> _HALF) + ((a0 * b1 + (middle & _LOW)) >> _HALF)


@_jit
def _philox(k0, k1, x0, x1, x2, x3):
    for _ in range(10):
        high0, low0 = _high(x0, _M0), x0 * _M0
        high1, low1 = _high(x2, _M1), x2 * _M1
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return x0, x1, x2, x3


@_jit
def _philox_words(key, counters, words):
    for i in range(words.shape[1]):
        c = counters[:, i]
        words[0, i], words[1, i], words[2, i], words[3, i] = _philox(key[0], key[1], c[0], c[1], c[2], c[3])


@_jit
def _uniform(key, block, view, sample):
    a, b, c, d = _philox(key[0], key[1], np.uint64(block), np.uint64(view), sample, np.uint64(0))
    return (a >> _SHIFT) * _UNIT, (b >> _SHIFT) * _UNIT, (c >> _SHIFT) * _UNIT, (d >> _SHIFT) * _UNIT


@_jit
def _draw(
    key, ids, sizes, crop, chances, strength, boxes, flip, brightness, contrast, saturation, hue, order, grey, sigma,
    solarise,
):  # fmt: skip
    for i in range(len(ids)):
        height, width = sizes[i]
        for v in range(boxes.shape[1]):
            sample = ids[i]
            if not _box(crop, height, width, _uniform(key, 0, v, sample), boxes[i, v]):
                _retry(key, v, sample, crop, height, width, boxes[i, v])
            u0, u1, u2, u3 = _uniform(key, 1, v, sample)
            jittered = u1 < chances[1]
            spread = strength[0] if jittered else 0.0
            flip[i, v] = u0 < chances[0]
            brightness[i, v], contrast[i, v] = _factor(u2, spread), _factor(u3, spread)
            u0, u1, u2, u3 = _uniform(key, 2, v, sample)
            saturation[i, v] = _factor(u0, spread)
            hue[i, v] = (strength[1] if jittered else 0.0) * (2 * u1 - 1)
            place = int(u2 * len(ORDERS))
            for k in range(4):
                order[i, v, k] = ORDERS[place, k]
            grey[i, v] = u3 < chances[2]
            u0, u1, u2, u3 = _uniform(key, 3, v, sample)
            sigma[i, v] = strength[2] + (strength[3] - strength[2]) * u1 if u0 < chances[3] else 0.0
            solarise[i, v] = u2 < chances[4]


@_jit
def _factor(u, spread):
    """Uniform in [max(0, 1 - spread), 1 + spread], as torchvision's ColorJitter."""
    low = max(0.0, 1 - spread)
    return low + (1 + spread - low) * u


@_jit
def _box(crop, height, width, u, box):
    """One try of torchvision's RandomResizedCrop into ``box``; returns whether it fits."""
    area = height * width * (crop[0] + (crop[1] - crop[0]) * u[0])
    aspect = math.exp(crop[4] + (crop[5] - crop[4]) * u[1])
    w, h = np.rint(math.sqrt(area * aspect)), np.rint(math.sqrt(area / aspect))
    box[0], box[1] = math.floor(u[2] * (height - h + 1)), math.floor(u[3] * (width - w + 1))
    box[2], box[3] = int(h), int(w)
    return w > 0 and w <= width and h > 0 and h <= height


@_jit
def _retry(key, view, sample, crop, height, width, box):
    """First box that fits of the further tries, else the central one."""
    for block in range(_RETRY, _RETRY + CROP_TRIES - 1):
        if _box(crop, height, width, _uniform(key, block, view, sample), box):
            return
    h = np.rint(width / crop[2]) if width / height < crop[2] else float(height)
    w = np.rint(height * crop[3]) if width / height > crop[3] else float(width)
    box[0], box[1] = int((height - h) // 2), int((width - w) // 2)
    box[2], box[3] = int(h), int(w)


__all__ = ["CROP_TRIES", "ORDERS", "draw", "philox"]
