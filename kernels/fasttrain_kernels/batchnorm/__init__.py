"""BatchNorm (+ residual) (+ ReLU), fused through the second derivative; this folder's README derives every pass."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from fasttrain_kernels.batchnorm.channels import Running, Total
from fasttrain_kernels.batchnorm.functions import BatchNorm, laid_out_like
from fasttrain_kernels.batchnorm.reference import batch_norm_reference
from fasttrain_kernels.trial import triton_passes

Implementation = Literal["auto", "reference", "native", "cpu", "triton"]


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    eps: float = 1e-5,
    running: Running | None = None,
    total: Total | None = None,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Training-mode BatchNorm with what follows it in a residual block; differentiable twice.

    With μ and σ² a channel over images and pixels, of all ranks where ``total`` is given::

        y = max(0, w (x − μ) / √(σ² + ε) + b + residual)

    without the maximum where ``relu`` is false. Statistics and sums are float32 for half-precision x, float64 for
    float64. At a kink, y = 0, the gradient is 0.

    Args:
        x: [n, C, ...]; n may differ between ranks and be 0 on some.
        weight, bias: [C] or ``None`` (1 and 0).
        residual: of the shape and dtype of x, or ``None``.
        running: statistics to be updated with this batch's, or ``None``.
        total: the sum of a tensor over the ranks; ``None``: there is one. Called on every rank once in the forward
            pass, once in the backward, once in the backward's backward, with a few numbers a channel.
        impl: "cpu" (numba; rows of channels: channels-last or [M, C]), "triton" (CUDA, the same layouts), "native"
            (PyTorch's operations, any layout), "reference" (PyTorch's derivatives, of any order). "auto" takes the
            first of these that takes x.

    Returns:
        y of x's shape, dtype and layout; the mean and the unbiased variance [C], without derivative.

    Raises:
        ValueError: a single value a channel, shapes or dtypes that do not fit, an ``impl`` that is unknown or does not
            take x.
    """
    _check(x, weight, bias, residual, total)
    if impl == "reference" or (impl == "auto" and x.device.type not in ("cpu", "cuda")):
        y, mean, unbiased = batch_norm_reference(x, weight, bias, residual, relu, eps, total)
        if running is not None:
            running.update(mean, unbiased)
        return y, mean, unbiased
    residual = None if residual is None else laid_out_like(residual, x)
    return BatchNorm.apply(x, weight, bias, residual, relu, eps, running, total, _passes(x, impl))


def _passes(x: Tensor, impl: Implementation) -> ModuleType:
    from fasttrain_kernels.batchnorm import native

    if impl == "native":
        return native
    if impl == "cpu" or (impl == "auto" and x.device.type == "cpu"):
        from fasttrain_kernels.batchnorm import cpu as kernels
    elif impl == "triton" or (
        impl == "auto"
        and x.dtype != torch.float64
        and triton_passes(f"BatchNorm of {x.dtype}", partial(_trial, dtype=x.dtype))
    ):
        from fasttrain_kernels.batchnorm import triton as kernels
    elif impl == "auto":
        return native
    else:
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(get_args(Implementation))}")
    if kernels.takes(x):
        return kernels
    if impl == "auto":
        return native
    raise ValueError(
        f"impl={impl!r} does not take x of {x.dtype}, shape {list(x.shape)}, strides {list(x.stride())} on {x.device}: "
        "make it channels-last, or use impl='auto'"
    )


def _trial(impl: Implementation, device: str = "cuda", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Of both gates, one with a sum over ranks: y, running statistics, the gradients, those of x's squared norm.

    At a size of several programs and blocks of channels.
    """
    generator = torch.Generator(device).manual_seed(0)
    x, upstream, added = torch.randn(3, 6, 72, 5, 5, device=device, generator=generator).to(dtype)
    x, upstream, added = (t.contiguous(memory_format=torch.channels_last) for t in (x, upstream, added))
    weight, bias, mean, variance = torch.randn(4, 72, device=device, generator=generator)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    found = []
    for residual, total in ((added, None), (None, torch.clone)):
        running = Running(mean.clone(), variance.clone(), torch.zeros((), dtype=torch.long, device=device), 0.1)
        y, *_ = batch_norm(*inputs, residual, relu=True, running=running, total=total, impl=impl)
        first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs[:2])
        found += [y, *(t.float() for t in running[:3]), *first, *second]
    return tuple(found)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, total: Total | None) -> None:
    if x.dim() < 2 or not x.shape[1] or not x.is_floating_point():
        raise ValueError(f"x has shape {list(x.shape)}, {x.dtype}: give a floating-point [n, C, ...]")
    if total is None and x.numel() < 2 * x.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}: statistics need more than one value a channel")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and values.shape != x.shape[1:2]:
            raise ValueError(f"{name} has shape {list(values.shape)}: give [{x.shape[1]}], one a channel of x")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual has shape {list(residual.shape)}, {residual.dtype}: give x's, {list(x.shape)}, {x.dtype}"
        )


__all__ = ["Running", "batch_norm"]
