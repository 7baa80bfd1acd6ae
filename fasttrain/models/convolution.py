"""The convolution of the encoders, quick to differentiate twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttrain_kernels.convolution import convolution


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with zero padding, whose derivatives are :func:`fasttrain_kernels.convolution.convolution`'s.

    State, its names and initialisation are torch's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0, bias: bool
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return convolution(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


__all__ = ["Conv2d"]
