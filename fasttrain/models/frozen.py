"""Convolutions whose weights are constants: forward, and the gradient of their input alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fasttrain.models import cudnn
from fasttrain.models.cudnn import Block, Constant
from fasttrain.models.resnet import ResNet
from fasttrain_kernels.convolution import convolution

FEWEST_IMAGES = 8
"With fewer the layout of the fused path is too short where it should be long."


class FrozenChain(nn.Module):
    """y = a(c_n(… a(c_1(x)) …) + s(x)) for convolutions c and s with constant weights and biases.

    It computes in the weights' type, under autocast in autocast's, and is differentiable once, in x. There are three
    forms, the same but for rounding:

    - On a CPU with AVX-512, in float32 or bfloat16 and from 8 images on, oneDNN's convolutions with bias, sum and
      activation fused, weights reordered once, over the dimensions (height, width, image) instead of (image, height,
      width): nothing is then computed for zero padding, which on a 4x4 map is a third of a 3x3 convolution.
    - On a GPU cuDNN's, fused likewise, where they fit (:mod:`fasttrain.models.cudnn`).
    - Elsewhere the composition of PyTorch's operations.

    Args:
        layers: c_1, …, c_n, without dilation or groups, padded by less than their kernels.
        shortcut: s, a convolution or ``nn.Identity``; ``None`` for no sum.
        slope: of the (leaky) ReLU a below zero.
        sees_images: x are images, which may come in two terms (:func:`in_two_terms`).
    """

    def __init__(
        self,
        layers: list[nn.Conv2d],
        shortcut: nn.Module | None = None,
        slope: float = 0.0,
        sees_images: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.shortcut, self.slope = nn.ModuleList(layers), shortcut, slope
        self.sees_images = sees_images
        self._blocks: dict[tuple[torch.dtype, int], Block] = {}
        self._packed: dict[tuple, tuple[list[_Convolution], _Convolution | None]] = {}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.computes_in(x)
        layers, shortcut, residual = block = self.block(dtype, x.shape[1])
        x = x.to(dtype)
        if x.device.type == "cpu" and len(x) >= FEWEST_IMAGES and _fuses(dtype):
            key = dtype, *x.shape[1:]
            if key not in self._packed:
                self._packed[key] = _pack(layers, shortcut, _images_inside(x).shape)
            return _Fused.apply(x, *self._packed[key], residual, self.slope)
        if self.slope == 0 and cudnn.fuses(x):
            return cudnn.blocks(x, [block], [0])[0]
        return self._composed(x, layers, shortcut)

    def computes_in(self, x: Tensor) -> torch.dtype:
        weights = self.layers[0].weight.dtype
        if weights != torch.float64 and torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return weights

    @property
    def of_images(self) -> list[nn.Conv2d]:
        """The convolutions of images; none where the identity sees them too."""
        if not self.sees_images or isinstance(self.shortcut, nn.Identity):
            return []
        return [self.layers[0], *([] if self.shortcut is None else [self.shortcut])]

    def block(self, dtype: torch.dtype, channels: int | None = None) -> Block:
        """The convolutions in ``dtype``, for an input of ``channels`` (None: as many as the weights have)."""
        channels = self.layers[0].weight.shape[1] if channels is None else channels
        if (dtype, channels) not in self._blocks:
            self._blocks[dtype, channels] = self._in(dtype, channels)
        return self._blocks[dtype, channels]

    def _in(self, dtype: torch.dtype, channels: int) -> Block:
        """Weights are rounded to ``dtype`` here; the last bias is that of the shortcut too."""
        shortcut = self.shortcut if isinstance(self.shortcut, nn.Conv2d) else None
        in_terms = bool(self.of_images) and channels == IMAGE_CHANNELS

        def constant(layer: nn.Conv2d, bias: Tensor | None) -> Constant:
            terms = in_terms and layer in self.of_images
            weight = weight_of_two_terms(layer.weight, dtype) if terms else layer.weight.to(dtype)
            return Constant(weight, None if bias is None else bias.to(dtype), layer.stride, layer.padding)

        with torch.no_grad():
            biases = [layer.bias for layer in self.layers]
            if shortcut is not None:
                biases[-1] = biases[-1] + shortcut.bias
            layers = [constant(layer, bias) for layer, bias in zip(self.layers, biases, strict=True)]
            return Block(layers, None if shortcut is None else constant(shortcut, None), self.shortcut is not None)

    def _composed(self, x: Tensor, layers: list[Constant], shortcut: Constant | None) -> Tensor:
        def convolved(layer: Constant, x: Tensor) -> Tensor:
            return convolution(x, *layer, (1, 1), 1)

        *first, last = layers
        y = x
        for layer in first:
            y = F.leaky_relu_(convolved(layer, y), self.slope)
        y = convolved(last, y)
        if self.shortcut is not None:
            y = y + (x if shortcut is None else convolved(shortcut, x))
        return F.leaky_relu_(y, self.slope)


class FrozenResNet(ResNet):
    """A folded ResNet, its stem and blocks :class:`FrozenChain`; on a GPU they are one function to autograd."""

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        stem = [self.conv1] if hasattr(self, "conv1") else []
        stages = [list(stage) for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]
        chains = [*stem, *(block for stage in stages for block in stage)]
        if not (cudnn.fuses(x) and all(isinstance(chain, FrozenChain) and chain.slope == 0 for chain in chains)):
            return super().forward(x)
        dtype = chains[0].computes_in(x)
        if stem and not isinstance(self.maxpool, nn.Identity):
            x, chains = self.maxpool(self.conv1(x)), chains[1:]
        first, *others = chains
        sequence = [first.block(dtype, x.shape[1]), *(chain.block(dtype) for chain in others)]
        ends = list(accumulate(map(len, stages), initial=len(chains) - sum(map(len, stages)) - 1))[1:]
        maps = cudnn.blocks(x.to(dtype), sequence, ends)
        return maps, self.avgpool(maps[-1]).flatten(1)


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


IMAGE_CHANNELS = 16
"Of images in two terms: kernels read eight channels at once."


def in_two_terms(images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """x = scale · images + shift [N, 3, H, W] in a type of 16 bits, as x_h, x_l, x_h and fill: :data:`IMAGE_CHANNELS`.

    x_h is x rounded, x_l what it lacks, rounded. With weights w_h, w_h, w_l and 0 over the same channels a convolution
    is w x but for w_l x_l. The whole of an attack's change to an image is a few hundredths, and bfloat16 numbers near
    1 lie 1/256 apart. The gradient is that of the first x_h.
    """
    return _TwoTerms.apply(images, scale, shift, dtype)


def weight_of_two_terms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [K, 3, h, w] -> [K, :data:`IMAGE_CHANNELS`, h, w] for images in two terms."""
    high = weight.to(dtype)
    low = (weight - high).to(dtype)
    fill = high.new_zeros((len(high), IMAGE_CHANNELS - 9, *high.shape[2:]))
    return torch.cat([high, high, low, fill], 1).contiguous(memory_format=torch.channels_last)


class _TwoTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        x = torch.addcmul(shift, images, scale)
        high = x.to(dtype)
        low = torch.sub(x, high, out=torch.empty_like(high))
        return torch.cat([high, low, high, high, high, high[:, :1]], 1)  # any numbers fill: their weights are 0

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        (scale,) = ctx.saved_tensors
        return g[:, :3] * scale, None, None, None


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

    def __init__(self, layer: Constant, inputs: torch.Size) -> None:
        self.weight, self.bias = layer.weight[..., None], layer.bias
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


def _pack(
    layers: list[Constant], shortcut: Constant | None, shape: torch.Size
) -> tuple[list[_Convolution], _Convolution | None]:
    packed: list[_Convolution] = []
    for layer in layers:
        packed.append(_Convolution(layer, packed[-1].outputs if packed else shape))
    return packed, None if shortcut is None else _Convolution(shortcut, shape)


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
