"""Structured perturbations: differentiable changes of an image, few enough numbers an image to be learned.

Each is a pure function of images [B, 3, H, W] in [0, 1] and of its numbers [B, …], and stays in [0, 1]. Rotation and
translation are Kornia's (bilinear, zeros from outside), the jitter's parts torchvision's; they are written here
because Kornia asks for Python 3.11 and a second copy of 31 MB for what is a page of code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.config import Config
from fasttrain_kernels.augment.batched import rotate_hue
from fasttrain_kernels.augment.reference import LUMA

_LUMA = torch.tensor(LUMA).tolist()  # as float32 has them
Name = Literal["colour_space", "rotation", "translation", "colour_jitter"]


class Transformation(NamedTuple):
    """A family of changes, of which ``bound`` and ``apply`` choose one an image from unbounded numbers."""

    constants: tuple[str, ...]  # their names; each is 0 or more, or the amount and sign of a change
    start: tuple[float, ...]  # unbounded numbers that leave images as they are, or nearly so
    bound: Callable[[Tensor], Tensor]  # unbounded numbers [B, n] -> constants [B, n], in their ranges
    apply: Callable[[Tensor, Tensor], Tensor]  # images [B, 3, H, W], constants [B, n] -> images


class StructuredConfig(Config):
    """A learned, structured change of one view; see :func:`fasttrain.views.structured`."""

    transformations: tuple[Name, ...] = pydantic.Field(default=("colour_space",), min_length=1)
    """colour_space, rotation, translation, colour_jitter: one or several, done in this order."""
    degrees: float = pydantic.Field(default=30.0, gt=0, le=180)
    """rotation: largest angle, to either side."""
    shift: float = pydantic.Field(default=0.125, gt=0, le=1)
    """translation: largest shift along either axis, as a share of the image's side."""
    jitter: float = pydantic.Field(default=0.5, gt=0, le=1)
    """colour_jitter: largest change, in augment.jitter's scale: brightness, contrast, saturation 0.8 of it, hue 0.2."""
    lr_factor: float = pydantic.Field(default=1.0, gt=0)
    """The adversary's learning rate over the encoder's."""

    @pydantic.model_validator(mode="after")
    def _nothing_unused(self) -> StructuredConfig:
        users = {"degrees": "rotation", "shift": "translation", "jitter": "colour_jitter"}
        for field, name in users.items():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default and name not in self.transformations:
                raise ValueError(f"{field}={value}: only {name} uses it; leave it out or add it to transformations")
        if len(set(self.transformations)) < len(self.transformations):
            raise ValueError(f"transformations={list(self.transformations)}: give each once")
        return self


def make_transformation(config: StructuredConfig, name: Name) -> Transformation:
    """The family ``name`` with the ranges of ``config``; outside the start, tanh keeps a constant in its range."""
    match name:
        case "colour_space":
            names = tuple(f"c{i}_{channel}" for i in (1, 2, 3) for channel in ("red", "green", "blue"))
            return Transformation(names, _OWN_CHANNEL, _simplex_rows, _in_colour_space)
        case "rotation":
            return Transformation(("degrees",), (0.0,), _within(config.degrees), lambda x, c: rotate(x, c[:, 0]))
        case "translation":
            return Transformation(("right", "down"), (0.0, 0.0), _within(config.shift, config.shift), translate)
        case "colour_jitter":
            most = [0.8 * config.jitter] * 3 + [0.2 * config.jitter]
            return Transformation(("brightness", "contrast", "saturation", "hue"), (0.0,) * 4, _within(*most), jitter)


def colour_space(images: Tensor, alpha: Tensor) -> Tensor:
    """C_i = α_i1 R + α_i2 G + α_i3 B at every pixel, α [B, 3, 3] with rows on the simplex (Lubana & Aldeeb, eq. 6)."""
    alpha = alpha[..., None, None]  # no matrix product, which TF32 would round to three digits
    return sum(alpha[:, :, j] * images[:, j : j + 1] for j in range(3))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Each image turned about its centre by ``degrees`` [B], counter-clockwise; black comes in at the corners."""
    angle = torch.deg2rad(degrees).view(-1, 1, 1)
    x, y = _centred(images)
    return _sampled(images, angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y)


def translate(images: Tensor, shift: Tensor) -> Tensor:
    """Each image moved right and down by ``shift`` [B, 2], in shares of its width and height; black comes in."""
    right, down = shift.view(-1, 2, 1, 1).unbind(1)
    x, y = _centred(images)
    return _sampled(images, x - right * images.shape[3], y - down * images.shape[2])


def jitter(images: Tensor, change: Tensor) -> Tensor:
    """Brightness, contrast, saturation by factors 1 + c, then hue by c turns, c = ``change`` [B, 4]; 0 is no change.

    The README of ``fasttrain_kernels.augment`` has the formulas; there the order is drawn, here it is this one.
    """
    x = images.movedim(1, -1)
    brightness, contrast, saturation, hue = change.view(-1, 4, 1, 1, 1).unbind(1)
    x = ((1 + brightness) * x).clamp(0, 1)
    x = _away_from(_luma(x).mean((1, 2), keepdim=True), x, contrast)
    x = _away_from(_luma(x), x, saturation)
    return rotate_hue(x, hue).movedim(-1, 1)


_OWN_CHANNEL = tuple(math.log(18.0) if i == j else 0.0 for i in range(3) for j in range(3))  # 0.9 own, 0.05 each other


def _simplex_rows(numbers: Tensor) -> Tensor:
    return numbers.unflatten(1, (3, 3)).softmax(-1).flatten(1)


def _in_colour_space(images: Tensor, constants: Tensor) -> Tensor:
    return colour_space(images, constants.unflatten(1, (3, 3)))


def _within(*largest: float) -> Callable[[Tensor], Tensor]:
    def bounded(numbers: Tensor) -> Tensor:
        columns = numbers.tanh().unbind(1)  # one by one: the host would wait for a copy of their bounds to a GPU
        return torch.stack([most * column for most, column in zip(largest, columns, strict=True)], dim=1)

    return bounded


def _luma(x: Tensor) -> Tensor:
    red, green, blue = (share * part for share, part in zip(_LUMA, x.split(1, dim=-1), strict=True))
    return red + green + blue


def _away_from(other: Tensor, x: Tensor, change: Tensor) -> Tensor:
    return (x + change * (x - other)).clamp(0, 1)


def _centred(images: Tensor) -> tuple[Tensor, Tensor]:
    """x [1, 1, W] and y [1, H, 1] of the pixels, counted from the image's centre."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device, dtype=images.dtype) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=images.dtype) - (height - 1) / 2
    return x.view(1, 1, -1), y.view(1, -1, 1)


def _sampled(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Images [B, 3, H, W] read at the positions (x, y), each broadcast to [B, H, W], in pixels from the centre."""
    height, width = images.shape[2:]
    x, y = torch.broadcast_tensors(2 * x / width, 2 * y / height)
    grid = torch.stack([x, y], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


__all__ = [
    "StructuredConfig",
    "Transformation",
    "colour_space",
    "jitter",
    "make_transformation",
    "rotate",
    "translate",
]
