"""cuDNN's convolution with bias, sum and ReLU in one kernel, for convolutions whose weights are constants.

PyTorch has them as ``cudnn_convolution_relu`` and ``cudnn_convolution_add_relu``, without a derivative; they add in
float32 and round once, where the composition rounds at each step. They keep to ``torch.backends.cudnn.benchmark`` and
``allow_tf32`` but know no deterministic algorithms.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasttrain_kernels.relu import before_relu

TOLERANCE = 1e-2
"Of the relative error in a trial: what is looked for is a kernel that is broken, not how it rounds."


class Constant(NamedTuple):
    """A convolution c with constant weight [K, C, h, w] and bias [K], both of one type."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def input_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """cᵀ(g); of x only shape and memory format are read."""
        options = self.stride, self.padding, (1, 1), False, (0, 0), 1
        return torch.ops.aten.convolution_backward(g, x, self.weight, None, *options, (True, False, False))[0]


def fuses(x: Tensor) -> bool:
    """Whether cuDNN's fused convolutions are to be used for x."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and torch.version.hip is None
        and torch.backends.cudnn.enabled
        and not (torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
    )


class Block(NamedTuple):
    """y = max(c_n(… max(c_1(x), 0) …) + s(x), 0)."""

    layers: list[Constant]
    shortcut: Constant | None  # s; None for the identity
    residual: bool  # whether s(x) is added at all


def blocks(x: Tensor, sequence: list[Block], seen: list[int]) -> tuple[Tensor, ...]:
    """The outputs of the blocks at the positions ``seen``, each block applied to the one before; differentiable once,
    in x."""
    return _Blocks.apply(x, sequence, seen)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sequence: list[Block], seen: list[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sequence, ctx.seen = sequence, seen
        passed = [[x]]  # of each block its input and what its layers give, the last of which is the next one's input
        for block in sequence:
            x = passed[-1][-1]
            hidden = [x]
            for layer in block.layers[:-1]:
                hidden.append(rectified(hidden[-1], layer))
            z = None if not block.residual else x if block.shortcut is None else block.shortcut(x)
            passed.append([*hidden[1:], rectified(hidden[-1], block.layers[-1], z)])
        ctx.save_for_backward(*(tensor for tensors in passed for tensor in tensors))
        return tuple(passed[position + 1][-1] for position in seen)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        saved = list(ctx.saved_tensors)
        arriving = dict(zip(ctx.seen, gradients, strict=True))
        parts: list[Tensor] = []  # of the gradient after a block's last ReLU
        for position, block in reversed(list(enumerate(ctx.sequence))):
            if arriving.get(position) is not None:
                parts.append(arriving[position])
            *hidden, y = saved[-len(block.layers) :]
            del saved[-len(block.layers) :]
            if parts:
                parts = _through(block, _before_last_relu(parts, y), [saved[-1], *hidden])
        return sum(parts[1:], start=parts[0]) if parts else None, None, None


def _through(block: Block, g: Tensor, hidden: list[Tensor]) -> list[Tensor]:
    """The parts of the gradient of a block's input, from that before its last ReLU; ``hidden`` is what layers read."""
    through = g
    for layer, x in zip(block.layers[:0:-1], hidden[:0:-1], strict=True):
        through = _before_relu(layer.input_gradient(through, x), x)
    parts = [block.layers[0].input_gradient(through, hidden[0])]
    if block.residual:
        parts.append(g if block.shortcut is None else block.shortcut.input_gradient(g, hidden[0]))
    return parts


def _before_last_relu(parts: list[Tensor], y: Tensor) -> Tensor:
    while len(parts) > 2:
        parts = [parts[0] + parts[1], *parts[2:]]
    return _before_relu(*parts, y) if len(parts) == 1 else before_relu(*parts, y)


def _before_relu(g: Tensor, y: Tensor) -> Tensor:
    """The gradient before the ReLU, in y's memory format, from that after it and the ReLU's output y."""
    return torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=torch.empty_like(y))


def rectified(x: Tensor, layer: Constant, z: Tensor | None = None) -> Tensor:
    """max(c(x) + z, 0), by cuDNN in one kernel unless a trial showed that it cannot."""
    return fused(x, layer, z) if _trusted(x, layer, z is not None) else composed(x, layer, z)


def fused(x: Tensor, layer: Constant, z: Tensor | None) -> Tensor:
    """max(c(x) + z, 0) by one launch."""
    options = layer.bias, layer.stride, layer.padding, (1, 1), 1
    if z is None:
        return torch.ops.aten.cudnn_convolution_relu(x, layer.weight, *options)
    return torch.ops.aten.cudnn_convolution_add_relu(x, layer.weight, z, 1, *options)


def composed(x: Tensor, layer: Constant, z: Tensor | None) -> Tensor:
    """max(c(x) + z, 0) by PyTorch's operations."""
    y = layer(x)
    return F.relu_(y if z is None else y.add_(z))


_verdicts: dict[tuple, bool] = {}


def _trusted(x: Tensor, layer: Constant, adds: bool) -> bool:
    """Whether cuDNN's kernel for these shapes is right; found at their first use, with a wait for its result.

    The kernel is chosen by the shapes, so one that is right for some says nothing of others.
    """
    key = x.device, x.dtype, x.shape, layer.weight.shape, layer.stride, layer.padding, adds
    if key not in _verdicts:
        complaint = _complaint(x, layer, adds)
        if complaint is not None and all(_verdicts.values()):
            warnings.warn(
                f"cuDNN's fused convolution of {list(x.shape)} with {list(layer.weight.shape)} is not used: "
                f"{complaint}; PyTorch's operations take its place, slower",
                RuntimeWarning,
                stacklevel=2,
            )
        _verdicts[key] = complaint is None
    return _verdicts[key]


@torch.no_grad()
def _complaint(x: Tensor, layer: Constant, adds: bool) -> str | None:
    """What is wrong with :func:`fused` on random numbers of these shapes."""
    generator = torch.Generator(x.device).manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=generator)

    x, layer = random(x), layer._replace(weight=random(layer.weight), bias=random(layer.bias))
    y = layer(x)
    z = random(y) if adds else None
    expected = composed(x, layer, z)
    try:
        for _ in range(2):  # the first may have tried several kernels
            y.fill_(torch.nan)
            del y  # its memory is the next result's, which PyTorch hands cuDNN as a z of weight 0, not to be read
            y = fused(x, layer, z)
    except RuntimeError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    wide = torch.promote_types(y.dtype, torch.float32)
    error, size = (float(torch.linalg.vector_norm(t, dtype=wide)) for t in (y - expected, expected))
    return None if error < TOLERANCE * size else f"its result is {error / size:.1e} from theirs"


__all__ = ["Block", "Constant", "blocks", "fuses"]
