"""How a GPU changes colours by batched torch operations, and the hue of HSV.

torchvision's float semantics, which are described in ``kernels/fasttrain_kernels/augment/README.md``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.augment import Draws, blur_radius
from fasttrain_kernels.augment.colours import BLUE, GREEN, RED
from fasttrain_kernels.augment.cpu import blur_taps


def apply_torch(images: Tensor, draws: Draws) -> Tensor:
    """``images`` uint8 [n, H, W, 3] -> float32 [n, H, W, 3] in [0, 1] on the same device; ``draws`` [n].

    What was drawn goes there in one copy, which the host does not wait for.
    """
    weights = _luma_weights(images.device)

    def luma(x: Tensor) -> Tensor:  # no matrix product, which TF32 would round to three digits
        return (x * weights).sum(-1, keepdim=True)

    blurred = np.flatnonzero(draws.sigma > 0)
    taps = blur_taps(draws.sigma[blurred], blur_radius(images.shape[1]))
    table = np.zeros((len(images), 11 + taps.shape[1]), np.float32)
    table[:, :4] = np.stack(draws[2:6], axis=1)
    table[:, 4:8], table[:, 8], table[:, 9] = draws.order, draws.grey, draws.solarise
    table[: len(blurred), 10], table[: len(blurred), 11:] = blurred, taps
    drawn = torch.from_numpy(table)
    drawn = (drawn.pin_memory() if images.is_cuda else drawn).to(images.device, non_blocking=True)
    brightness, contrast, saturation, hue, *operations, grey, solarise = drawn[:, :10, None, None, None].unbind(1)
    x = images.float() / 255
    for operation in operations:
        shade = luma(x)
        other = torch.where(operation == 1, shade.mean(dim=(1, 2), keepdim=True), shade)
        other = torch.where(operation == 0, torch.zeros_like(other), other)
        factor = torch.where(operation == 0, brightness, torch.where(operation == 1, contrast, saturation))
        blended = (factor * x + (1 - factor) * other).clamp_(0, 1)
        x = torch.where(operation == 3, rotate_hue(x, hue), blended)
    if draws.grey.any():
        x = torch.where(grey > 0, luma(x), x)
    if len(blurred):
        rows = drawn[: len(blurred), 10].long()
        x[rows] = _blur(x[rows], drawn[: len(blurred), 11:])
    if draws.solarise.any():
        x = torch.where((solarise > 0) & (x >= 0.5), 1 - x, x)
    return x


@cache
def _luma_weights(device: torch.device) -> Tensor:
    """On ``device`` once for all views."""
    return torch.tensor([RED, GREEN, BLUE], device=device)


def rotate_hue(x: Tensor, turns: Tensor) -> Tensor:
    """HSV's hue h turned, without its six sectors: RGB = V - C clamp(min(k, 4 - k), 0, 1), k = (5, 3, 1) + 6 h modulo
    6, V the largest channel, and C what the smallest lacks of it."""
    red, green, blue = x.unbind(-1)
    value = x.amax(-1)
    chroma = value - x.amin(-1)
    scale = 1 / torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    offset = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)  # made there: the host waits for a copy
    k = torch.remainder((sixths + 6 * turns.squeeze(-1)).unsqueeze(-1) + offset, 6)
    return value.unsqueeze(-1) - chroma.unsqueeze(-1) * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blur(x: Tensor, taps: Tensor) -> Tensor:
    """Separable blur of [n, H, W, 3], each image with taps of its own [n, radius + 1]."""
    radius = taps.shape[1] - 1
    for axis in (1, 2):
        size = x.shape[axis]
        position = torch.arange(-radius, size + radius, device=x.device).abs()
        padded = x.index_select(axis, size - 1 - (size - 1 - position).abs())  # reflected at both borders
        x = padded.narrow(axis, radius, size) * taps[:, 0].reshape(-1, 1, 1, 1)
        for k in range(1, radius + 1):
            both = padded.narrow(axis, radius - k, size) + padded.narrow(axis, radius + k, size)
            x.addcmul_(both, taps[:, k].reshape(-1, 1, 1, 1))
    return x


__all__ = ["BLUE", "GREEN", "RED", "apply_torch", "rotate_hue"]
