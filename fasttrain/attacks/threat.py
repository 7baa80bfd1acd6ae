"""Threat models: the images an attacker may show in place of one, and how to walk among them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fasttrain.attacks.noise import normal, uniform
from fasttrain.errors import UsageError
from fasttrain_kernels.apgd import Norm, ascend, project


class Threat(Protocol):
    """A ball around each image [B, 3, H, W], cut with [0, 1]."""

    @property
    def eps(self) -> float:
        """Radius, in units of the images: 8/255, say."""
        ...

    @property
    def norm(self) -> Norm: ...

    def start(self, images: Tensor, keys: Tensor) -> Tensor:
        """A random point for each image, a function of its key [B] alone."""
        ...

    def step(self, x: Tensor, gradient: Tensor, size: Tensor | float) -> Tensor:
        """x moved by ``size`` in the direction of unit norm that raises the loss most."""
        ...

    def project(self, x: Tensor, images: Tensor) -> Tensor:
        """x brought into the ball around ``images``, then into [0, 1]."""
        ...


@dataclass(frozen=True)
class Linf:
    """No value changes by more than eps: ‖x − image‖∞ ≤ eps, x in [0, 1].

    Raises:
        UsageError: eps outside [0, 1].
    """

    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise UsageError(f"L-inf radius eps={self.eps}: give it in units of the images, from 0 to 1 (8/255, say)")

    @property
    def norm(self) -> Norm:
        return "linf"

    def start(self, images: Tensor, keys: Tensor) -> Tensor:
        """Uniform in the cube, scaled until it touches the surface (APGD's start), then clamped to [0, 1]."""
        noise = 2 * uniform(keys, images) - 1
        noise = noise / noise.abs().amax((1, 2, 3), keepdim=True)
        return (images + self.eps * noise).clamp(0, 1)

    def step(self, x: Tensor, gradient: Tensor, size: Tensor | float) -> Tensor:
        return ascend(x, gradient, size, "linf")

    def project(self, x: Tensor, images: Tensor) -> Tensor:
        return project(x, images, self.eps, "linf")


@dataclass(frozen=True)
class L2:
    """The change has Euclidean norm at most eps: ‖x − image‖₂ ≤ eps, x in [0, 1].

    Raises:
        UsageError: eps negative or not finite.
    """

    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps < math.inf:
            raise UsageError(f"L2 radius eps={self.eps}: give a finite norm of the change, from 0 on (0.5, say)")

    @property
    def norm(self) -> Norm:
        return "l2"

    def start(self, images: Tensor, keys: Tensor) -> Tensor:
        """Uniform on the sphere (APGD's start; of a ball of 3,072 dimensions nearly all lies there), then clamped."""
        noise = normal(keys, images)
        noise = noise / torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True)
        return (images + self.eps * noise).clamp(0, 1)

    def step(self, x: Tensor, gradient: Tensor, size: Tensor | float) -> Tensor:
        return ascend(x, gradient, size, "l2")

    def project(self, x: Tensor, images: Tensor) -> Tensor:
        return project(x, images, self.eps, "l2")


__all__ = ["L2", "Linf", "Threat"]
