"""The CPU's fused kernel: crop, resize, flip and colours of one view while it is in the first cache, on one core.

Both functions hold no lock of Python's: run them over slices of a batch in several threads. What they are given and
what they write is described at :func:`fasttrain_kernels.augment.gpu.augment_gpu`.
"""

from __future__ import annotations

import numpy as np

from fasttrain_kernels.augment import colours
from fasttrain_kernels.augment.crop import HALF, begin_crop, crop_memory, crop_rows, crop_view, jit, strip_rows
from fasttrain_kernels.augment.draws import Draws
from fasttrain_kernels.augment.reference import blur_radius


def augment_cpu(
    pixels: np.ndarray, starts: np.ndarray, sizes: np.ndarray, draws: Draws, out: np.ndarray, first: int = 0
) -> None:
    """Views of n images.

    Args:
        pixels: uint8 [bytes], in which image i is [H, W, 3] from ``starts[i]`` on.
        starts: [n] int64.
        sizes: [n, 2] int32 (height, width).
        draws: [n, V].
        out: [V, B, S, S, 3], contiguous: float32 in [0, 1], or uint8, into which nothing but the crops is written.
        first: where in ``out`` the n images begin.
    """
    if out.dtype == np.uint8:
        _crop_views(pixels, starts, sizes, draws.boxes, draws.flip, out, first)
    else:
        _augment(pixels, starts, sizes, draws.boxes, draws.flip, *_colours(draws, out.shape[2]), out, first)


def colour_cpu(images: np.ndarray, draws: Draws, out: np.ndarray) -> None:
    """The colours alone of views that are cropped already: ``images`` uint8 [n, S, S, 3] -> ``out`` float32, likewise,
    both contiguous; ``draws`` [n]."""
    n, size = images.shape[:2]
    whole = Draws(*(field[:, None] for field in draws))
    boxes = np.broadcast_to(np.array([0, 0, size, size], np.int32), (n, 1, 4))
    starts, sizes = np.arange(n) * images[:1].size, np.full((n, 2), size, np.int32)
    none = np.zeros((n, 1), np.bool_)
    _augment(images.reshape(-1), starts, sizes, boxes.copy(), none, *_colours(whole, size), out[None], 0)


def _colours(draws: Draws, size: int) -> tuple[np.ndarray, ...]:
    """What the kernel reads of the colours: factors [n, V, 4], order, grey, taps [n, V, radius + 1], solarise."""
    factors = np.stack([draws.brightness, draws.contrast, draws.saturation, draws.hue], axis=-1)
    return factors, draws.order, draws.grey, blur_taps(draws.sigma, blur_radius(size)), draws.solarise


def blur_taps(sigma: np.ndarray, radius: int) -> np.ndarray:
    """Gaussian weights at distance 0 ... radius, [..., radius + 1] float32; both sides together sum to 1."""
    distance = np.arange(radius + 1)
    if not sigma.any():  # a copy, as below: a compiled function takes another kind of array for another signature
        return np.broadcast_to((distance == 0).astype(np.float32), (*sigma.shape, radius + 1)).copy()
    taps = np.exp(-0.5 * (distance / np.maximum(sigma, 1e-6).astype(np.float64)[..., None]) ** 2)
    return (taps / (2 * taps.sum(axis=-1, keepdims=True) - taps[..., :1])).astype(np.float32)


_ONE, _ZERO, _BYTE = (np.float32(x) for x in (1, 0, 1 / 255))
_NEGLIGIBLE = 1e-7  # weight of a blur tap that no float32 in [0, 1] shows


@jit
def _crop_views(pixels, starts, sizes, boxes, flip, out, base):
    views, n, size = len(out), len(starts), out.shape[2]
    memory = crop_memory(size, sizes.max() if n else 1)
    for i in range(n):
        height, width = sizes[i]
        image = pixels[starts[i] : starts[i] + 3 * height * width].reshape(height, 3 * width)
        for v in range(views):
            crop_view(image, boxes[i, v], flip[i, v], memory, out[v, base + i])


@jit
def _augment(pixels, starts, sizes, boxes, flip, factors, order, grey, taps, solarise, out, base):
    views, n, size = len(out), len(starts), out.shape[2]
    memory = crop_memory(size, sizes.max() if n else 1)
    planes, line = np.empty((3, size * size), np.float32), np.empty(3 * size, np.float32)
    rows = strip_rows(size)
    halo = taps.shape[2] - 1 + colours.GROUP
    padded, weights = np.empty(size + 2 * halo, np.float32), np.empty(halo + 1, np.float32)
    for i in range(n):
        height, width = sizes[i]
        image = pixels[starts[i] : starts[i] + 3 * height * width].reshape(height, 3 * width)
        for v in range(views):
            factor, operations = factors[i, v], order[i, v]
            target = out[v, base + i].reshape(size * size, 3)
            box, flipped = boxes[i, v], flip[i, v]
            columns = begin_crop(box, flipped, size, memory)
            radius = _blur_weights(taps[i, v], weights)
            split = 0  # jitter operations before contrast, if that does anything
            mean = _ZERO
            contrasted = factor[1] != _ONE
            if contrasted:
                while operations[split] != 1:
                    split += 1
                total = 0.0
                for first in range(0, size, rows):
                    last = min(first + rows, size)
                    red, green, blue = _slices(planes, first * size, last * size)
                    crop_rows(image, box, flipped, columns, first, last, memory)
                    _round(memory[3], red, green, blue)
                    colours.jitter(red, green, blue, operations[:split], factor, mean)
                    total += colours.sum_luma(red, green, blue)
                mean = np.float32(total / (size * size))
            for first in range(0, size, rows):
                last = min(first + rows, size)
                red, green, blue = _slices(planes, first * size, last * size)
                if not contrasted:
                    crop_rows(image, box, flipped, columns, first, last, memory)
                    _round(memory[3], red, green, blue)
                colours.jitter(red, green, blue, operations[split:], factor, mean)
                if grey[i, v]:
                    colours.greyscale(red, green, blue)
                if radius > 0:
                    for plane in (red, green, blue):
                        for y in range(last - first):
                            row = plane[y * size : (y + 1) * size]
                            colours.blur_horizontally(row, padded, weights, radius, halo)
                else:
                    colours.store(red, green, blue, solarise[i, v], target[first * size : last * size])
            if radius > 0:
                for y in range(size):
                    for channel in range(3):
                        part = line[channel * size : (channel + 1) * size]
                        colours.blur_vertically(planes[channel].reshape(size, size), y, weights, radius, part)
                    red, green, blue = line[:size], line[size : 2 * size], line[2 * size :]
                    colours.store(red, green, blue, solarise[i, v], target[y * size : (y + 1) * size])


@jit
def _slices(planes, start, stop):
    return planes[0, start:stop], planes[1, start:stop], planes[2, start:stop]


@jit
def _round(strip, red, green, blue):
    """To grey levels, in [0, 1], a plane a colour."""
    for x in range(3 * len(red)):
        strip[x] = np.float32(np.int32(strip[x] + HALF)) * _BYTE
    for x in range(len(red)):
        red[x] = strip[3 * x]
        green[x] = strip[3 * x + 1]
        blue[x] = strip[3 * x + 2]


@jit
def _blur_weights(taps, weights):
    """``taps`` that matter, then zeros; returns the greatest distance that matters."""
    radius = 0
    for k in range(len(taps)):
        weights[k] = taps[k]
        if taps[k] > _NEGLIGIBLE:
            radius = k
    weights[radius + 1 :] = _ZERO
    return radius


__all__ = ["augment_cpu", "blur_taps", "colour_cpu"]
