"""BatchNorm in plain, differentiable PyTorch: what the faster versions are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def batch_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    total: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, unbiased variance); derivatives of any order, across ranks those that ``total`` has."""
    total = total or (lambda sums: sums)
    over = [d for d in range(x.dim()) if d != 1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))

    def channel(values: Tensor) -> Tensor:
        return values.to(wide.dtype).view(-1, *[1] * (x.dim() - 2))

    count = total(wide.new_full((), x.numel() // x.shape[1]))
    mean = total(wide.sum(over)) / count
    squares = total((wide - channel(mean)).square().sum(over))
    y = (wide - channel(mean)) * channel((squares / count + eps).rsqrt())
    if weight is not None:
        y = y * channel(weight)
    if bias is not None:
        y = y + channel(bias)
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).to(x.dtype), mean.detach(), (squares / (count - 1).clamp(min=1)).detach()
