"""The gradient before a ReLU from two gradients after it; see this folder's README."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fasttrain_kernels.trial import triton_passes

Implementation = Literal["auto", "reference", "triton"]


def before_relu(a: Tensor, b: Tensor, y: Tensor, impl: Implementation = "auto") -> Tensor:
    """(a + b) where y > 0, else 0, in y's memory format; not differentiable.

    Args:
        a, b: parts of the gradient after the ReLU, of y's shape and type.
        y: the ReLU's output.
        impl: "reference" (plain PyTorch) or "triton" (tensors that lie in memory alike, without gaps).

    Raises:
        ValueError: shapes or types that differ, an ``impl`` that is unknown or does not take these tensors.
    """
    if not (a.shape == b.shape == y.shape and a.dtype == b.dtype == y.dtype):
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (a, b, y))
        raise ValueError(f"before_relu got {found}: give three tensors of one shape and type")
    if _resolve(a, b, y, impl) == "triton":
        from fasttrain_kernels.relu.triton import before_relu_triton

        return before_relu_triton(a, b, y)
    return before_relu_reference(a, b, y)


def before_relu_reference(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """As :func:`before_relu`, by two operations."""
    return torch.ops.aten.threshold_backward.grad_input(a + b, y, 0, grad_input=torch.empty_like(y))


def _resolve(a: Tensor, b: Tensor, y: Tensor, impl: Implementation) -> Implementation:
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Implementation))}")
    alike = a.stride() == b.stride() == y.stride() and torch.empty_like(y).stride() == y.stride()
    fits = alike and y.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if impl == "auto":
        return "triton" if fits and y.is_cuda and triton_passes("gradient of a ReLU", _trial) else "reference"
    if impl == "triton" and not fits:
        strides = [list(t.stride()) for t in (a, b, y)]
        raise ValueError(f"impl='triton' does not take {y.dtype} with strides {strides}: use impl='auto'")
    return impl


def _trial(impl: Implementation, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(3, 2, 5, 7, 90, device=device, generator=generator)
    return [before_relu(*numbers.to(dtype), impl=impl) for dtype in (torch.float32, torch.bfloat16)]


__all__ = ["Implementation", "before_relu", "before_relu_reference"]
