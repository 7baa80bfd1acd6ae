"""Convolution whose second derivative costs what it has to; the mathematics is in this folder's README."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain_kernels.wanted import wanted_gradients


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``F.conv2d`` (1d, 3d by the weight's dimensions), autocast included, with derivatives of any order.

    The kernels are PyTorch's own. What differs is the derivative of the derivative: PyTorch's finds the weight's
    gradient by a convolution with batch and channels exchanged, which takes three times a weight gradient's time, and
    in float32 with narrow channels-last layers has overrun memory; here it is a weight gradient like any other. And no
    pass computes a gradient that nobody asked for. On a GPU the weight is laid out as x is, once: cuDNN would do it
    again in every pass.

    Args:
        x: [N, C_in, ...].
        weight: [C_out, C_in / groups, ...].
    """
    kind, dtype = x.device.type, weight.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.to(dtype, memory_format=torch.channels_last if _is_to_be_last(weight, x) else torch.preserve_format)
    if kind == "cpu" and max(weight.shape[2:]) == 1 < max(stride) and not any(padding):
        # oneDNN's weight gradient of a strided 1x1 convolution overruns memory, or is wrong by half, where channels are
        # few and last (float32, AVX2); every stride-th pixel at stride 1 is the same convolution
        x = x[(..., *(slice(None, None, step) for step in stride))].clone()
        stride = (1,) * len(stride)
    return _Convolution.apply(x, weight, bias, _Geometry(stride, padding, dilation, groups))


def _is_to_be_last(weight: Tensor, x: Tensor) -> bool:
    last = {"memory_format": torch.channels_last}
    return _is_cudnns(x) and x.dim() == 4 and x.is_contiguous(**last) and not weight.is_contiguous(**last)


def _is_cudnns(x: Tensor) -> bool:
    return x.is_cuda


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def options(self) -> tuple:
        """As PyTorch's convolutions take them: not transposed."""
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups


class _Convolution(torch.autograd.Function):
    """(x, w, b) -> y = w ∗ x + b."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution(x, weight, bias, *geometry.options())

    @staticmethod
    def backward(ctx, g: Tensor | None):
        if g is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        return *_ConvolutionBackward.apply(g, x, weight, ctx.geometry, wanted_gradients(ctx)[:3]), None


class _ConvolutionBackward(torch.autograd.Function):
    """(g, x, w) -> (∂x, ∂w, ∂b), those of them that are wanted, the others ``None``."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, wanted: tuple[bool, bool, bool]):
        ctx.save_for_backward(g, x if wanted[1] else None, weight if wanted[0] else None)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution_backward(g, x, weight, (len(weight),), *geometry.options(), wanted)

    @staticmethod
    def backward(ctx, u: Tensor | None, v: Tensor | None, t: Tensor | None):
        g, x, weight = ctx.saved_tensors
        geometry, wanted = ctx.geometry, wanted_gradients(ctx)
        on_g = on_x = on_weight = None
        if wanted[0]:
            on_g = _sum(
                None if u is None else _Convolution.apply(u, weight, t, geometry),
                None if v is None else _Convolution.apply(x, v, None if u is not None else t, geometry),
            )
            if on_g is None and t is not None:
                on_g = t.view(1, -1, *[1] * len(geometry.stride)).expand_as(g)
        if wanted[1] and v is not None:
            on_x, *_ = _ConvolutionBackward.apply(g, x, v, geometry, (True, False, False))
        if wanted[2] and u is not None:
            _, on_weight, _ = _ConvolutionBackward.apply(g, u, weight, geometry, (False, True, False))
        return on_g, on_x, on_weight, None, None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


__all__ = ["convolution"]
