"""The views of a batch by PyTorch's operations on whole batches: some hundreds of launches, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain_kernels.augment.draws import Column
from fasttrain_kernels.augment.reference import LUMA, blur_radius


def augment_batched(pixels: Tensor, starts: Tensor | None, sizes: Tensor | None, table: Tensor, out: Tensor) -> None:
    """As :func:`fasttrain_kernels.augment.gpu.augment_gpu`; float64 where ``out`` is. A view at a time.

    The host waits for nothing but, where it crops, the number of taps.
    """
    for view, drawn in enumerate(table):
        if starts is None:
            levels = pixels.reshape(out.shape)[view]
        else:
            levels = _cropped(pixels, starts, sizes, drawn, out.shape[2])
        out[view] = _coloured(levels, drawn, out.dtype) if out.is_floating_point() else levels


# Crop, resize, flip ------------------------------------------------------------------------------------------------


def _cropped(pixels: Tensor, starts: Tensor, sizes: Tensor, drawn: Tensor, size: int) -> Tensor:
    """uint8 [n, size, size, 3]: ``triton`` says how a pixel is a quotient of whole numbers."""
    across = sizes[:, 1].long()
    top, left, height, width, flags = drawn[:, : Column.FLAGS + 1].long().unbind(1)
    i = torch.arange(size, device=pixels.device)
    rows = _Triangles(i, height, size)
    columns = _Triangles(torch.where(flags[:, None] & 1 == 1, size - 1 - i, i), width, size)
    corner = (starts + 3 * (top * across + left))[:, None] + 3 * across[:, None] * rows.first
    channel = torch.arange(3, device=pixels.device)
    total = pixels.new_zeros((len(drawn), size, size, 3), dtype=torch.float32)
    for j in range(columns.most):
        column = torch.zeros_like(total)
        for k in range(rows.most):
            below = corner + 3 * across[:, None] * rows.offset(k)
            beside = 3 * (columns.first + columns.offset(j))
            at = below[:, :, None, None] + beside[:, None, :, None] + channel
            column += rows.weight(k)[:, :, None, None] * pixels.take(at)
        total += columns.weight(j)[:, None, :, None] * column
    weights = rows.total[:, :, None, None] * columns.total[:, None, :, None]
    return (total / weights + 0.5).to(torch.uint8)


class _Triangles:
    """Of output pixels ``i``, sides of ``length`` [n] input pixels; in units of 1 / (2 size) input pixels."""

    def __init__(self, i: Tensor, length: Tensor, size: int) -> None:
        self._length, self._unit = length[:, None], 2 * size
        self._reach = 2 * self._length.clamp(min=size)
        self._centre = self._length * (2 * i + 1) - size
        self.first = (self._centre + 2 * size - self._reach).clamp(min=0) // self._unit
        self.most = -(-int(self._reach.max()) // size)
        self.total = sum(self.weight(k) for k in range(self.most))

    def weight(self, k: int) -> Tensor:
        """Of each pixel's k-th tap, 0 where there is none; float32 [n, size]."""
        tap = self.first + k
        weight = (self._reach - (self._unit * tap - self._centre).abs()).clamp(min=0)
        return torch.where(tap < self._length, weight, 0).float()

    def offset(self, k: int) -> Tensor:
        """Of that tap from the first, not beyond the box."""
        return (self.first + k).clamp(max=self._length - 1) - self.first


# Colours -----------------------------------------------------------------------------------------------------------


def _coloured(levels: Tensor, drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [n, size, size, 3] -> [0, 1]."""
    flags, numbers = drawn[:, Column.FLAGS], drawn.view(torch.float32).to(dtype)
    *factors, sigma = numbers[:, Column.BRIGHTNESS :].unbind(1)
    brightness, contrast, saturation, hue = (_of_pixels(factor) for factor in factors)
    x = levels.to(dtype) / 255
    for slot in range(4):
        operation = _of_pixels(flags >> (8 + 2 * slot) & 3)
        shade = _luma(x)
        other = torch.where(operation == 1, shade.mean(dim=(1, 2), keepdim=True), shade)
        other = torch.where(operation == 0, 0, other)
        factor = torch.where(operation == 0, brightness, torch.where(operation == 1, contrast, saturation))
        blended = (factor * x + (1 - factor) * other).clamp_(0, 1)
        x = torch.where(operation == 3, rotate_hue(x, hue), blended)
    x = torch.where(_of_pixels(flags >> 1 & 1) == 1, _luma(x), x)
    x = _blurred(x, sigma)
    return torch.where((_of_pixels(flags >> 2 & 1) == 1) & (x >= 0.5), 1 - x, x)


def _of_pixels(drawn: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1]."""
    return drawn[:, None, None, None]


def _luma(x: Tensor) -> Tensor:
    """By no matrix product, which TF32 would round to three digits."""
    red, green, blue = x.split(1, dim=-1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


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


def _blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable, with weights of each image's own; where σ is 0 the middle one is 1 and the others 0."""
    radius = blur_radius(x.shape[1])
    distance = torch.arange(radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (distance / sigma.double().clamp(min=1e-6)[:, None]) ** 2)
    weights = (weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])).to(x.dtype)
    size = x.shape[1]
    position = torch.arange(-radius, size + radius, device=x.device).abs()
    position = size - 1 - (size - 1 - position).abs()  # reflected at both borders
    for axis in (1, 2):
        padded = x.index_select(axis, position)
        x = padded.narrow(axis, radius, size) * _of_pixels(weights[:, 0])
        for k in range(1, radius + 1):
            both = padded.narrow(axis, radius - k, size) + padded.narrow(axis, radius + k, size)
            x.addcmul_(both, _of_pixels(weights[:, k]))
    return x


__all__ = ["augment_batched", "rotate_hue"]
