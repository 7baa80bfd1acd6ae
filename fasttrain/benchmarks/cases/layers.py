"""BatchNorm with what follows it in a residual block, and convolution: through the second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.benchmarks.cases import OURS, PYTORCH, REFERENCE, Case, Results
from fasttrain.benchmarks.ceilings import Work
from fasttrain_kernels.batchnorm import batch_norm
from fasttrain_kernels.convolution import convolution

CONTIGUOUS = f"{PYTORCH}, contiguous"
MARGIN = 0.1
"How far from ReLU's kink all inputs of a comparison stay, so that rounding puts none on its other side."
BATCHNORM_PASSES = {
    "forward": (4, ("output",)),
    "forward, backward": (11, ("output", "∂x", "∂residual", "∂w", "∂b")),
    "forward, backward, double backward": (21, ("∂x", "∂residual", "second ∂x", "second ∂w", "second ∂gradient")),
}
"""Full-size tensors read and written, and results. Forward: x for the statistics; x, residual -> y. Backward: x, y and
the gradient for the sums, ∂residual written on the way; x, ∂residual -> ∂x. Double backward, along u on ∂x and r on
∂residual: u, x, ∂residual for the sums; u, x, ∂residual, r, y -> second ∂x, second ∂gradient."""


def batchnorm_cases(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """y = max(0, BN(x) + residual) in training mode, on channels-last tensors, float32 weights."""
    x = torch.randn(shape, device=device).to(dtype)
    weight, bias = torch.rand(shape[1], device=device) + 0.5, torch.randn(shape[1], device=device)
    sums = torch.randn(shape, device=device)
    sums = sums + MARGIN * sums.sign() - F.batch_norm(x.float(), None, None, weight, bias, training=True)
    upstream, u, r = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    flat = [x, sums.to(dtype), weight, bias, upstream, u, r]
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in flat]

    def ours(impl: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, weight, bias, residual, relu=True, impl=impl)[0]

    def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, weight, bias, training=True) + residual)

    for passes, (full, results) in BATCHNORM_PASSES.items():
        run = partial(_batchnorm, passes)
        yield Case(
            "BatchNorm + residual + ReLU",
            passes,
            "x".join(map(str, shape)),
            dtype,
            Work(0, full * x.numel() * x.element_size()),
            results,
            partial(run, torchs, *(t.double() for t in flat)),
            {
                OURS: partial(run, partial(ours, "auto"), *tensors),
                REFERENCE: partial(run, partial(ours, "reference"), *tensors),
                PYTORCH: partial(run, torchs, *tensors),
                CONTIGUOUS: partial(run, torchs, *flat),
            },
        )


def _batchnorm(
    passes: str,
    function: Callable[..., Tensor],
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    upstream: Tensor,
    u: Tensor,
    r: Tensor,
) -> Results:
    *inputs, upstream = (t.detach().requires_grad_() for t in (x, residual, weight, bias, upstream))
    y = function(*inputs)
    if passes == "forward":
        return (y.detach(),)
    if passes == "forward, backward":
        return y.detach(), *torch.autograd.grad(y, inputs, upstream.detach())
    x, residual, weight, _ = inputs
    first = torch.autograd.grad(y, (x, residual), upstream, create_graph=True)
    second = torch.autograd.grad(first, (x, weight, upstream), (u, r))
    return *(t.detach() for t in first), *second


def convolution_cases(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """3 x 3 from C to C channels, channels-last; what a gradient penalty asks of it: no weight gradient inside."""
    count, channels, height, width = shape
    x, upstream, u = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight = (torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5).to(dtype)
    flat = [x, weight, upstream, u]
    tensors = [t.contiguous(memory_format=torch.channels_last) for t in flat]

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return convolution(x, weight, None, (1, 1), (1, 1), (1, 1), 1)

    torchs = partial(F.conv2d, padding=1)
    products, element = count * channels**2 * 9 * height * width, x.element_size()
    yield Case(
        "3 x 3 convolution",
        "forward, input gradient, double backward",
        "x".join(map(str, shape)),
        dtype,
        Work(4 * 2 * products, (4 * 2 * x.numel() + 4 * weight.numel()) * element),
        ("output", "∂x", "second ∂w", "second ∂gradient"),
        partial(_convolution, torchs, *(t.double() for t in flat)),
        {
            OURS: partial(_convolution, ours, *tensors),
            PYTORCH: partial(_convolution, torchs, *tensors),
            CONTIGUOUS: partial(_convolution, torchs, *flat),
        },
    )


def _convolution(function: Callable[..., Tensor], x: Tensor, weight: Tensor, upstream: Tensor, u: Tensor) -> Results:
    x, weight, upstream = (t.detach().requires_grad_() for t in (x, weight, upstream))
    y = function(x, weight)
    (gradient,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    return y.detach(), gradient.detach(), *torch.autograd.grad(gradient, (weight, upstream), u)
