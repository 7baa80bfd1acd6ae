"""Rows to unit rows, differentiable twice, keeping the unit rows and one number a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit(z: Tensor) -> Tensor:
    """z / ‖z‖ over the last dimension: as :func:`fasttrain_kernels.ntxent.reference.unit_rows`, with less memory."""
    return _Unit.apply(z)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        largest = z.abs().amax(-1, keepdim=True)
        is_zero = largest == 0
        u = z / largest.masked_fill(is_zero, torch.inf)
        inverse = _dot(u, u).add_(is_zero).rsqrt_()
        u.mul_(inverse)
        ctx.save_for_backward(z, u, inverse.div_(largest).masked_fill_(is_zero, 0))
        return u

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        z, u, inverse = ctx.saved_tensors
        return _Gradient.apply(g, z, u.detach(), inverse)


class _Gradient(torch.autograd.Function):
    """P g / ‖z‖ with P = I − u uᵀ, as a function of g and z."""

    @staticmethod
    def forward(ctx, g: Tensor, z: Tensor, u: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(g, u, inverse)
        return torch.addcmul(g, u, _dot(u, g), value=-1).mul_(inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, q: Tensor):
        g, u, inverse = ctx.saved_tensors
        on_u, on_g = _dot(u, q), _dot(u, g)
        by_g = torch.addcmul(q, u, on_u, value=-1)  # P q
        # −[(q · P g) u + (u · g) P q + (u · q) P g] / ‖z‖², with P g = g − (u · g) u put in
        by_z = u * (2 * on_u * on_g - _dot(q, g))
        by_z.addcmul_(by_g, on_g, value=-1).addcmul_(g, on_u, value=-1).mul_(inverse.square())
        return by_g.mul_(inverse), by_z, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)  # not vecdot, which autocast would round
