"""What is drawn for a view, and the table in which the kernels read it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Draws(NamedTuple):
    """What happens to n samples in V views; every field is indexed [n, V]. The colour operations come in this order:
    the four jitter operations as ``order`` says, greyscale, blur, solarise."""

    boxes: np.ndarray  # [n, V, 4] int32 (top, left, height, width), source pixels
    flip: np.ndarray  # [n, V] bool, left-right
    brightness: np.ndarray  # [n, V] float32 factor, 1 = none
    contrast: np.ndarray  # [n, V] float32 factor, 1 = none
    saturation: np.ndarray  # [n, V] float32 factor, 1 = none
    hue: np.ndarray  # [n, V] float32 turns, 0 = none
    order: np.ndarray  # [n, V, 4] int8 permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    grey: np.ndarray  # [n, V] bool
    sigma: np.ndarray  # [n, V] float32 blur in output pixels, 0 = none
    solarise: np.ndarray  # [n, V] bool, values >= 0.5 are inverted

    def take(self, index) -> Draws:
        """Every field indexed alike: ``take((slice(None), 1))`` is view 1 of all, ``take((3, 1))`` of one sample."""
        return Draws(*(field[index] for field in self))


class Column(IntEnum):
    """Where :func:`packed` puts what a view was drawn: 32-bit words, of which the last five are float32's bits."""

    TOP = 0
    LEFT = 1
    HEIGHT = 2
    WIDTH = 3
    FLAGS = 4  # bit 0 flip, 1 grey, 2 solarise; bits 8 to 15 the order, two bits an operation, the first lowest
    BRIGHTNESS = 5
    CONTRAST = 6
    SATURATION = 7
    HUE = 8
    SIGMA = 9


def packed(draws: Draws) -> np.ndarray:
    """``draws`` [n, V] -> int32 [V, n, 10], columns as :class:`Column` says."""
    n, views = draws.flip.shape
    table = np.empty((views, n, len(Column)), np.int32)
    numbers = table.view(np.float32)
    table[..., :4] = draws.boxes.swapaxes(0, 1)
    order = (draws.order.astype(np.int32) << np.array([8, 10, 12, 14])).sum(axis=2, dtype=np.int32)
    flags = draws.flip.astype(np.int32) | draws.grey.astype(np.int32) << 1 | draws.solarise.astype(np.int32) << 2
    table[..., Column.FLAGS] = (flags | order).T
    for column, field in enumerate((draws.brightness, draws.contrast, draws.saturation, draws.hue, draws.sigma), 5):
        numbers[..., column] = field.T
    return table


def unpacked(table: np.ndarray) -> Draws:
    """What :func:`packed` packed."""
    words = table.swapaxes(0, 1)
    numbers, flags = words.view(np.float32), words[..., Column.FLAGS]
    flip, grey, solarise = ((flags >> bit & 1).astype(bool) for bit in range(3))
    brightness, contrast, saturation, hue, sigma = (numbers[..., column] for column in range(Column.BRIGHTNESS, 10))
    order = (flags[..., None] >> np.array([8, 10, 12, 14]) & 3).astype(np.int8)
    fields = words[..., :4], flip, brightness, contrast, saturation, hue, order, grey, sigma, solarise
    return Draws(*map(np.ascontiguousarray, fields))


__all__ = ["Column", "Draws", "packed", "unpacked"]
