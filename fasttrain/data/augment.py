"""What is drawn: crop boxes, flips, colour factors and blur widths as a pure function of (seed, epoch, sample, view).

Nothing here touches a pixel: ``fasttrain_kernels.augment`` does. A counter-based generator (Philox4x64-10) is asked
for the block ``(block, view, sample, 0)`` under the key ``(seed, epoch)``, so a draw depends on no loader state: any
batch composition, world size or resume point sees the same images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar, Protocol

import numpy as np
from pydantic import Field, model_validator

from fasttrain.config import Config, Where
from fasttrain_kernels.augment.draws import Draws
from fasttrain_kernels.augment.reference import apply_reference, blur_radius

CROP_TRIES = 10
"""Boxes tried before the central fallback, as in torchvision's RandomResizedCrop."""


class AugmentConfig(Config):
    """SimCLR's augmentation. For ImageNet the defaults; for CIFAR size=32, jitter=0.5, blur=0, eval_crop=1."""

    views: int = Field(2, ge=1)
    """views of each image in training"""
    size: int = Field(224, ge=8)
    """side of the square output, pixels"""
    scale: tuple[float, float] = (0.08, 1.0)
    """smallest and largest crop, as shares of the image's area"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """smallest and largest aspect (width / height) of a crop"""
    flip: float = Field(0.5, ge=0, le=1)
    """probability of a left-right flip"""
    jitter: float = Field(1.0, ge=0, le=1.25)
    """strength s of the colour jitter: brightness, contrast, saturation within 1 +- 0.8 s, hue within +- 0.2 s turns"""
    jitter_p: float = Field(0.8, ge=0, le=1)
    """probability of the colour jitter"""
    grey: float = Field(0.2, ge=0, le=1)
    """probability of greyscale"""
    blur: float = Field(0.5, ge=0, le=1)
    """probability of the Gaussian blur"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """smallest and largest standard deviation of the blur, output pixels"""
    solarise: float = Field(0.0, ge=0, le=1)
    """probability of inverting the values >= 0.5"""
    eval_crop: float = Field(0.875, gt=0, le=1)
    """side of the central square seen in evaluation, as a share of the image's shorter side"""

    reads: ClassVar[dict[str, Where]] = {"jitter": Where("jitter_p"), "sigma": Where("blur")}

    @model_validator(mode="after")
    def _ordered_ranges(self) -> AugmentConfig:
        for name, (low, high), most in (
            ("scale", self.scale, 1),
            ("ratio", self.ratio, 100),
            ("sigma", self.sigma, 100),
        ):
            if not 0 < low <= high <= most:
                raise ValueError(f"{name}=[{low}, {high}]: give 0 < smallest <= largest <= {most}")
        return self


class Augmentation(Protocol):
    """What a loader asks of :class:`SimCLR` and :class:`CentreCrop`."""

    @property
    def views(self) -> int: ...

    @property
    def size(self) -> int: ...

    def draw(self, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> Draws:
        """Draws of samples ``ids`` [n] with source ``sizes`` [n, 2] (height, width) in pixels."""
        ...


@dataclass(frozen=True)
class SimCLR:
    """Random resized crop, flip, colour jitter, greyscale, blur, solarise (Chen et al. 2020, appendix A)."""

    config: AugmentConfig
    seed: int

    @property
    def views(self) -> int:
        return self.config.views

    @property
    def size(self) -> int:
        return self.config.size

    def draw(self, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> Draws:
        config, (n, views) = self.config, (len(ids), self.config.views)

        sample = np.repeat(np.asarray(ids, np.uint64), views)
        view = np.tile(np.arange(views, dtype=np.uint64), n)
        sizes = np.repeat(np.asarray(sizes, np.int64).reshape(n, 2), views, axis=0)

        blocks = np.arange(4, dtype=np.uint64)[:, None]
        crop, first, second, third = _uniform(self.seed, epoch, blocks, view, sample)  # each [4, rows]
        boxes, valid = _boxes(config, sizes, crop)
        if not valid.all():
            again = np.flatnonzero(~valid)
            tries = np.arange(_RETRY, _RETRY + CROP_TRIES - 1, dtype=np.uint64)[:, None]
            boxes[again] = _retry(config, sizes[again], _uniform(self.seed, epoch, tries, view[again], sample[again]))

        jittered = first[1] < config.jitter_p
        spread = 0.8 * config.jitter * jittered
        low, high = config.sigma
        draws = Draws(
            boxes=boxes.astype(np.int32),
            flip=first[0] < config.flip,
            brightness=_factor(first[2], spread),
            contrast=_factor(first[3], spread),
            saturation=_factor(second[0], spread),
            hue=(0.2 * config.jitter * jittered * (2 * second[1] - 1)).astype(np.float32),
            order=_ORDERS[(second[2] * len(_ORDERS)).astype(np.intp)],
            grey=second[3] < config.grey,
            sigma=np.where(third[0] < config.blur, low + (high - low) * third[1], 0).astype(np.float32),
            solarise=third[2] < config.solarise,
        )
        return Draws(*(field.reshape(n, views, *field.shape[1:]) for field in draws))


@dataclass(frozen=True)
class CentreCrop:
    """Evaluation: one view, the central square of ``eval_crop`` times the shorter side, nothing drawn."""

    config: AugmentConfig
    views: int = 1

    @property
    def size(self) -> int:
        return self.config.size

    def draw(self, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> Draws:
        n = len(ids)
        sizes = np.asarray(sizes, np.int64).reshape(n, 2)
        side = np.maximum(np.rint(sizes.min(axis=1) * self.config.eval_crop), 1).astype(np.int64)
        corner = (sizes - side[:, None]) // 2
        ones, zeros = np.ones((n, 1), np.float32), np.zeros((n, 1), np.float32)
        false = np.zeros((n, 1), bool)
        return Draws(
            boxes=np.column_stack([corner, side, side]).astype(np.int32).reshape(n, 1, 4),
            flip=false,
            brightness=ones,
            contrast=ones,
            saturation=ones,
            hue=zeros,
            order=np.tile(_ORDERS[0], (n, 1, 1)),
            grey=false,
            sigma=zeros,
            solarise=false,
        )


def philox(key: tuple[int, int], *counter: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Philox4x64-10 (Salmon et al. 2011): four words from four counter words (broadcast against each other, uint64).

    ``philox(key, c, 0, 0, 0)`` is what ``np.random.Philox(key=key, counter=[c - 1, 0, 0, 0]).random_raw(4)`` gives:
    NumPy counts up before it computes.
    """
    k0, k1 = (int(word) & _MASK for word in key)
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(word, np.uint64)) for word in counter))
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2E7470EE14C6C93)
        high1, low1 = _multiply(x2, 0xCA5A826395121157)
        x0, x1, x2, x3 = high1 ^ x1 ^ np.uint64(k0), low1, high0 ^ x3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return x0, x1, x2, x3


_MASK = 2**64 - 1
_DOMAIN = 0x6175676D656E7400  # "augment": the same seed draws something else here than in the order of samples
_RETRY = (
    16  # first block of the crop's further tries; the blocks before are the first crop (0) and the colours (1 to 3)
)
_ORDERS = np.array(list(permutations(range(4))), np.int8)


def _uniform(seed: int, epoch: int, block: np.ndarray, view: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """[blocks, 4, rows] float64 in [0, 1), the upper 53 bits as NumPy's Generator.random makes them."""
    words = philox((seed, _DOMAIN + epoch), block, view, sample, np.uint64(0))
    return (np.stack(words, axis=1) >> np.uint64(11)) * 2.0**-53


def _multiply(a: np.ndarray, constant: int) -> tuple[np.ndarray, np.ndarray]:
    """High and low words of the 128-bit product, by 32-bit halves."""
    half, low_half = np.uint64(32), np.uint64(0xFFFFFFFF)
    b1, b0 = np.uint64(constant >> 32), np.uint64(constant & 0xFFFFFFFF)
    a1, a0 = a >> half, a & low_half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low_half) >> half), a * np.uint64(constant)


def _factor(u: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Uniform in [max(0, 1 - spread), 1 + spread], as torchvision's ColorJitter."""
    low = np.maximum(0, 1 - spread)
    return (low + (1 + spread - low) * u).astype(np.float32)


def _boxes(config: AugmentConfig, sizes: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One try of torchvision's RandomResizedCrop: ``sizes`` [..., 2], ``u`` [4, ...] -> boxes [..., 4], fits [...]."""
    height, width = sizes[..., 0], sizes[..., 1]
    area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * u[0])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    aspect = np.exp(low + (high - low) * u[1])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = np.floor(u[2] * (height - h + 1)), np.floor(u[3] * (width - w + 1))
    return np.stack([top, left, h, w], axis=-1), fits


def _retry(config: AugmentConfig, sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """First box that fits of the further tries ``u`` [tries, 4, rows], else the central one: [rows, 4]."""
    boxes, fits = _boxes(config, np.broadcast_to(sizes, (len(u), *sizes.shape)), u.transpose(1, 0, 2))
    first = boxes[fits.argmax(axis=0), np.arange(len(sizes))]
    height, width = sizes[:, 0], sizes[:, 1]
    h = np.where(width / height < config.ratio[0], np.rint(width / config.ratio[0]), height)
    w = np.where(width / height > config.ratio[1], np.rint(height * config.ratio[1]), width)
    central = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=-1)
    return np.where(fits.any(axis=0)[:, None], first, central)


__all__ = [
    "AugmentConfig",
    "Augmentation",
    "CentreCrop",
    "Draws",
    "SimCLR",
    "apply_reference",
    "blur_radius",
    "philox",
]
