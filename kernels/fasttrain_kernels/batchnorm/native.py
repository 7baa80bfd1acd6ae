"""The passes of BatchNorm in PyTorch's operations: any device, layout and dtype that they take.

Of a tensor [n, C, ...], over its n images and pixels, in the statistics' precision (float32, float64 for float64 x):

- ``statistics(x)``: mean μ and Σ (x − μ)² [C].
- ``normalise(x, residual, (μ, a, b), relu)``: y = a (x − μ) + b (+ residual), at least 0 with ``relu``.
- ``gradient_sums(g, x, y, (μ, a, b))``: Σ h and Σ h (x − μ) [2, C], and h, with the gated gradient h = g where y > 0,
  else 0; without y the gate is a (x − μ) + b > 0 and the second value is g as it came.
- ``gradient(g, x, (μ, a, b, c₁, c₂, c₃))``: c₁ h + c₂ (x − μ) + c₃, gated by a and b.
- ``second_sums(u, g, x, (μ, a, b))``: Σ u, Σ u (x − μ), Σ u h, gated by a and b.
- ``second(u, g, x, q, y, (μ, a, b, c₁, …, c₇))``: c₁ u + c₂ (x − μ) + c₃ + q, gated, and c₄ u + c₅ h + c₆ (x − μ) + c₇;
  gated by y where there is one.

A gate of a = 0, b = 1 is always open. Sums go to ``channels``, which makes of them the numbers of the next pass; what
a pass sums may come in another form where the module names another ``channels``, as ``triton`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain_kernels.batchnorm import channels as channels


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _wide(x)
    over = [d for d in range(x.dim()) if d != 1]
    if not x.numel():
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    mean = x.mean(over)
    return mean, (x - _channel(mean, x)).square_().sum(over)


def normalise(x: Tensor, residual: Tensor | None, by: Tensor, relu: bool) -> Tensor:
    mean, scale, shift = _channels(by, x)
    y = torch.addcmul(shift, x - mean, scale)
    if residual is not None:
        y += residual
    return (y.relu_() if relu else y).to(x.dtype)


def gradient_sums(g: Tensor, x: Tensor, y: Tensor | None, by: Tensor) -> tuple[Tensor, Tensor]:
    centred, closed = _gate(x, y, by)
    h = _wide(g).masked_fill(closed, 0)
    return torch.stack([_sum(h), _sum(h * centred)]), g if y is None else h.to(g.dtype)


def gradient(g: Tensor, x: Tensor, by: Tensor) -> Tensor:
    centred, closed = _gate(x, None, by)
    on_g, on_x, constant = _channels(by[3:], x)
    h = _wide(g).masked_fill(closed, 0)
    return torch.addcmul(constant, h, on_g).addcmul_(centred, on_x).to(x.dtype)


def second_sums(u: Tensor, g: Tensor, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centred, closed = _gate(x, None, by)
    u = _wide(u)
    return _sum(u), _sum(u * centred), _sum(u * g.masked_fill(closed, 0))


def second(u: Tensor, g: Tensor, x: Tensor, q: Tensor | None, y: Tensor | None, by: Tensor) -> tuple[Tensor, Tensor]:
    centred, closed = _gate(x, y, by)
    c = _channels(by[3:], x)
    u = _wide(u)
    g_g = torch.addcmul(c[2], u, c[0]).addcmul_(centred, c[1])
    if q is not None:
        g_g += q
    g_x = torch.addcmul(c[6], u, c[3]).addcmul_(g.masked_fill(closed, 0), c[4]).addcmul_(centred, c[5])
    return g_g.masked_fill_(closed, 0).to(g.dtype), g_x.to(x.dtype)


def _gate(x: Tensor, y: Tensor | None, by: Tensor) -> tuple[Tensor, Tensor]:
    """x − μ, and where the gradient is 0."""
    mean, scale, shift = _channels(by[:3], x)
    centred = x - mean
    return centred, torch.addcmul(shift, centred, scale) <= 0 if y is None else y <= 0


def _channels(by: Tensor, x: Tensor) -> list[Tensor]:
    return [_channel(row, x) for row in by]


def _channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
