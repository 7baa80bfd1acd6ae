"""Convolutions whose weights are constants: forward, and the gradient of their input alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEWEST_IMAGES = 8
"With fewer the layout of the fused path is too short where it should be long."


class FrozenChain(nn.Module):
    """y = a(c_n(… a(c_1(x)) …) + s(x)) for convolutions c and s with constant weights and biases.

    On a CPU with AVX-512, in float32 or bfloat16 (by autocast, too) and from 8 images on, it runs as oneDNN's
    convolutions with bias, sum and activation fused, weights reordered once, over the dimensions (height, width, image)
    instead of (image, height, width): nothing is then computed for zero padding, which on a 4x4 map is a third of a
    3x3 convolution. There it is differentiable once, in x. Elsewhere it is the composition of PyTorch's operations.

    Args:
        layers: c_1, …, c_n, without dilation or groups, padded by less than their kernels.
        shortcut: s, a convolution or ``nn.Identity``; ``None`` for no sum.
        slope: of the (leaky) ReLU a below zero.
    """

    def __init__(self, layers: list[nn.Conv2d], shortcut: nn.Module | None = None, slope: float = 0.0) -> None:
        super().__init__()
        self.layers, self.shortcut, self.slope = nn.ModuleList(layers), shortcut, slope
        self._packed: dict[tuple, tuple[list[_Convolution], _Convolution | None]] = {}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        known = self.layers[0].weight.dtype == (torch.float32 if autocast else dtype)
        if x.device.type != "cpu" or len(x) < FEWEST_IMAGES or not known or not _fuses(dtype):
            return self._composed(x)
        key = dtype, *x.shape[2:]
        if key not in self._packed:
            self._packed[key] = self._pack(_images_inside(x).shape, dtype)
        return _Fused.apply(x.to(dtype), *self._packed[key], self.shortcut is not None, self.slope)

    def _composed(self, x: Tensor) -> Tensor:
        *first, last = self.layers
        y = x
        for layer in first:
            y = F.leaky_relu_(layer(y), self.slope)
        y = last(y)
        return F.leaky_relu_(y if self.shortcut is None else y + self.shortcut(x), self.slope)

    def _pack(self, shape: torch.Size, dtype: torch.dtype) -> tuple[list[_Convolution], _Convolution | None]:
        shortcut = _Convolution(self.shortcut, shape, dtype) if isinstance(self.shortcut, nn.Conv2d) else None
        layers: list[_Convolution] = []
        for layer in self.layers:
            layers.append(_Convolution(layer, layers[-1].outputs if layers else shape, dtype))
        return layers, shortcut


class FrozenMaxPool(nn.Module):
    """``nn.MaxPool2d`` that keeps the memory format of a fused :class:`FrozenChain`."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not x.permute(2, 3, 0, 1).is_contiguous():
            return self.pool(x)
        size, stride, padding = ((n, n) for n in (self.pool.kernel_size, self.pool.stride, self.pool.padding))
        return _images_outside(F.max_pool3d(_images_inside(x), (*size, 1), (*stride, 1), (*padding, 0)))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, shortcut, residual, slope):
        x = _images_inside(x)
        hidden = [x]
        for layer in layers[:-1]:
            hidden.append(layer(hidden[-1], slope))
        if residual:
            y = layers[-1].added(x.clone() if shortcut is None else shortcut(x), hidden[-1], slope)
        else:
            y = layers[-1](hidden[-1], slope)
        ctx.save_for_backward(*hidden[1:], y)
        ctx.chain = layers, shortcut, residual, slope
        return _images_outside(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        layers, shortcut, residual, slope = ctx.chain
        *hidden, y = ctx.saved_tensors
        g = through = _before_activation(_images_inside(g), y, slope)
        for layer, y in zip(layers[:0:-1], hidden[::-1], strict=True):
            through = layer.transposed(through)
            through = _before_activation(through, y, slope, out=through)
        # g has been read for the last time: the identity's share of the gradient receives the convolutions'
        g_x = layers[0].transposed(through, onto=g if residual and shortcut is None else None)
        if shortcut is not None:
            g_x = shortcut.transposed(g, onto=g_x)
        return _images_outside(g_x), None, None, None, None


class _Convolution:
    """A convolution [1, C, H, W, B] -> [1, K, H', W', B], and its transpose, the weights in oneDNN's own order.

    The transpose of a convolution of stride s is s² convolutions of stride 1, one for each phase of the positions it
    writes to: along one axis, output o reads input s o + t − p with weight w_t, so that::

        g_x[s a + r] = Σ_t w_t g[a + (r + p − t) / s]        over the taps t for which that is a whole number
    """

    def __init__(self, layer: nn.Conv2d, inputs: torch.Size, dtype: torch.dtype) -> None:
        self.weight = layer.weight.to(dtype)[..., None]
        self.bias = layer.bias.to(dtype)
        self.stride, self.padding = (*layer.stride, 1), (*layer.padding, 0)
        sizes = zip(inputs[2:], self.weight.shape[2:], self.stride, self.padding, strict=True)
        self.inputs = inputs
        self.outputs = torch.Size([1, len(self.weight), *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)])
        self.packed = _reordered(self.weight, inputs, self.stride, self.padding)
        self._phases: list[_Phase] | None = None

    def __call__(self, x: Tensor, slope: float | None = None) -> Tensor:
        """a(c(x)), without a where ``slope`` is ``None``."""
        return _convolved(x, self.packed, self.bias, self.stride, self.padding, slope)

    def added(self, y: Tensor, x: Tensor, slope: float) -> Tensor:
        """a(y + c(x)), written over y."""
        return _convolved_onto(y, x, self.packed, self.bias, self.stride, self.padding, slope)

    def transposed(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """cᵀ(g), or ``onto`` + cᵀ(g) written over ``onto``."""
        if self._phases is None:  # many convolutions are never asked for their transpose
            self._phases = list(self._all_phases())
        if max(self.stride) == 1:
            (phase,) = self._phases
            return phase(g) if onto is None else phase.added(onto, g)
        if onto is None:
            shape = *self.inputs[:-1], g.shape[-1]
            onto = torch.empty(shape, dtype=g.dtype, memory_format=torch.channels_last_3d)
            if len(self._phases) < self.stride[0] * self.stride[1]:
                onto.zero_()
            for phase in self._phases:
                onto[phase.written] = phase(g)
        else:
            for phase in self._phases:
                onto[phase.written] += phase(g)
        return onto

    def _all_phases(self) -> Iterator[_Phase]:
        """One for each pair of remainders of row and column by the stride, but for those that no tap reaches."""
        axes = zip(self.inputs[2:4], self.outputs[2:4], self.weight.shape[2:4], self.stride, self.padding, strict=False)
        for rows, columns in product(*(list(_axis_phases(*axis)) for axis in axes)):
            yield _Phase(self.weight, self.outputs, rows, columns)


class _Phase:
    """The values of a transposed convolution at every s-th row and column, a convolution of stride 1 of g."""

    def __init__(self, weight: Tensor, g_shape: torch.Size, rows: _AxisPhase, columns: _AxisPhase) -> None:
        (row_written, row_taps, row_padding, row_kept), (written, taps, padding, kept) = rows, columns
        everything = slice(None), slice(None)
        self.written, self.kept = (*everything, row_written, written), (*everything, row_kept, kept)
        self.padding = row_padding, padding, 0
        self.packed = _reordered(
            weight[:, :, row_taps][:, :, :, taps].transpose(0, 1), g_shape, (1, 1, 1), self.padding
        )

    def __call__(self, g: Tensor) -> Tensor:
        return _convolved(g, self.packed, None, (1, 1, 1), self.padding, None)[self.kept]

    def added(self, y: Tensor, g: Tensor) -> Tensor:
        return _convolved_onto(y, g, self.packed, None, (1, 1, 1), self.padding, None)


_AxisPhase = tuple[slice, list[int], int, slice]


def _axis_phases(size: int, out_size: int, kernel: int, stride: int, padding: int) -> Iterator[_AxisPhase]:
    """Positions written, taps in the order in which g is read, zeros around g, and what to keep of the convolution."""
    for phase in range(stride):
        taps = [tap for tap in reversed(range(kernel)) if (phase + padding - tap) % stride == 0]
        if taps:
            count = len(range(phase, size, stride))
            first, last = ((phase + padding - tap) // stride for tap in (taps[0], taps[-1]))
            around = max(-first, last + count - out_size, 0)
            yield slice(phase, None, stride), taps, around, slice(first + around, first + around + count)


def _convolved(x, weight, bias, stride, padding, slope: float | None) -> Tensor:
    activation, scalars = ("none", []) if slope is None else ("leaky_relu", [slope]) if slope else ("relu", [])
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, (1, 1, 1), 1, activation, scalars, ""
    )


def _convolved_onto(y, x, weight, bias, stride, padding, slope: float | None) -> Tensor:
    relu = "relu" if slope == 0 else None
    torch.ops.mkldnn._convolution_pointwise_.binary(
        y, x, weight, bias, padding, stride, (1, 1, 1), 1, "add", 1.0, relu, [], None
    )
    return F.leaky_relu_(y, slope) if slope else y


def _before_activation(g: Tensor, y: Tensor, slope: float, out: Tensor | None = None) -> Tensor:
    """The gradient before the activation, from that after it and the activation's output."""
    out = torch.empty_like(g) if out is None else out
    if slope:
        return torch.ops.aten.leaky_relu_backward.grad_input(g, y, slope, True, grad_input=out)
    return torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=out)


def _reordered(weight: Tensor, shape: torch.Size, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    weight = weight.contiguous(memory_format=torch.channels_last_3d)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1, 1), 1, list(shape))


def _images_inside(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [1, C, H, W, B], channels-last: in memory (H, W, B, C)."""
    return x.permute(2, 3, 0, 1).contiguous()[None].permute(0, 4, 1, 2, 3)


def _images_outside(x: Tensor) -> Tensor:
    """[1, C, H, W, B] -> [B, C, H, W], a view."""
    return x.squeeze(0).permute(3, 0, 1, 2)


def _fuses(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.enabled and _has_fused_convolutions()


@cache
def _has_fused_convolutions() -> bool:
    """oneDNN on x86; with less than AVX-512 its convolutions over three dimensions have not been measured."""
    wanted = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and all(hasattr(torch.ops.mkldnn, op) for op in wanted)


__all__ = ["FrozenChain", "FrozenMaxPool"]
