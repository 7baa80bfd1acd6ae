"""What all attacks ask of a model: the loss of each image, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fasttrain.errors import UsageError
from fasttrain.models import frozen_statistics

PerImageLoss = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] -> the loss of each [B], to be raised."""


class Attack(Protocol):
    """``attack(loss_of_images, images, keys)``: images in [0, 1] -> images that raise their losses.

    Every call makes the same number of evaluations on every rank, waits for no result on the host, touches no running
    statistics and asks for gradients of the images alone. What comes back is detached.

    Args:
        loss_of_images: images [B, 3, H, W] -> one loss an image [B].
        images: [B, 3, H, W] in [0, 1].
        keys: [B] int64, what an image's random numbers depend on (:func:`fasttrain.attacks.image_keys`); ``None``
            counts from 0, so that each call draws the same. An attack without a random start does not read them.

    Raises:
        UsageError: a loss that is not one number an image.
    """

    def __call__(self, loss_of_images: PerImageLoss, images: Tensor, keys: Tensor | None = None) -> Tensor: ...


def loss_and_gradient(loss_of_images: PerImageLoss, x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B], at least float32, and the gradient [B, 3, H, W] of their sum, both detached."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = _checked(loss_of_images, x)
        with torch.autocast(x.device.type, enabled=False):  # each operation's gradient is in the operation's type
            # autograd visits nothing that only weights need
            (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    return loss.detach(), gradient


@torch.no_grad()
def loss_only(loss_of_images: PerImageLoss, x: Tensor) -> Tensor:
    """Losses [B], at least float32."""
    return _checked(loss_of_images, x)


class Watched:
    """A ``loss_of_images`` that notes whether a loss, or its gradient by the images, was ever not finite.

    The attack itself would lose it: the sign of NaN is 0, and an iterate whose loss is NaN is never the best.
    """

    def __init__(self, loss_of_images: PerImageLoss) -> None:
        self._loss_of_images = loss_of_images
        self._seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        loss = self._loss_of_images(x)
        self._seen.append(loss.detach())
        if x.requires_grad:
            x.register_hook(lambda gradient: self._seen.append(gradient.sum().view(1)))
        return loss

    def or_nan(self, images: Tensor) -> Tensor:
        """``images`` if all was finite, else NaN, which the step's loss then is too; nothing is read on the host."""
        return torch.where(torch.cat(self._seen).isfinite().all(), images, torch.nan) if self._seen else images


def _checked(loss_of_images: PerImageLoss, x: Tensor) -> Tensor:
    with frozen_statistics():
        loss = loss_of_images(x)
    if loss.shape != x.shape[:1]:
        raise UsageError(
            f"an attack on {len(x)} images got a loss of shape {list(loss.shape)}: give one loss an image, [{len(x)}]"
        )
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


__all__ = ["Attack", "PerImageLoss", "Watched", "loss_and_gradient", "loss_only"]
