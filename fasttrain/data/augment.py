"""What is drawn: crop boxes, flips, colour factors and blur widths as a pure function of (seed, epoch, sample, view).

Nothing here touches a pixel: ``fasttrain_kernels.augment`` does. A counter-based generator (Philox4x64-10) is asked
for the block ``(block, view, sample, 0)`` under the key ``(seed, epoch)``, so a draw depends on no loader state: any
batch composition, world size or resume point sees the same images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from pydantic import Field, model_validator

from fasttrain.config import Config, Where
from fasttrain_kernels.augment.draws import Draws
from fasttrain_kernels.augment.philox import draw, philox
from fasttrain_kernels.augment.reference import apply_reference, blur_radius


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


def coloured(augment: Augmentation) -> bool:
    """Whether it ever changes colours; one that does not say (``coloured``) is taken to."""
    return getattr(augment, "coloured", True)


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

    @property
    def coloured(self) -> bool:
        config = self.config
        return any((config.jitter_p and config.jitter, config.grey, config.blur, config.solarise))

    def draw(self, epoch: int, ids: np.ndarray, sizes: np.ndarray) -> Draws:
        drawn = {name: getattr(self.config, name) for name in _DRAWN}
        return draw((self.seed, _DOMAIN + epoch), ids, sizes, self.views, **drawn)


@dataclass(frozen=True)
class CentreCrop:
    """Evaluation: one view, the central square of ``eval_crop`` times the shorter side, nothing drawn."""

    config: AugmentConfig
    views: int = 1
    coloured: bool = False

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
            order=np.tile(np.arange(4, dtype=np.int8), (n, 1, 1)),
            grey=false,
            sigma=zeros,
            solarise=false,
        )


_DOMAIN = 0x6175676D656E7400  # "augment": the same seed draws something else here than in the order of samples
_DRAWN = ("scale", "ratio", "flip", "jitter", "jitter_p", "grey", "blur", "sigma", "solarise")


__all__ = [
    "AugmentConfig",
    "Augmentation",
    "CentreCrop",
    "Draws",
    "SimCLR",
    "apply_reference",
    "blur_radius",
    "coloured",
    "philox",
]
