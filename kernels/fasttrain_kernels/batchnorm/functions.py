"""BatchNorm as an autograd function, its gradient as another, and that one's own; the README derives all three.

``passes`` is the module that goes over the full-size tensors (``native`` says what each pass is), and
``passes.channels`` the one with the numbers a channel between them (``channels``, or what does the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain_kernels.wanted import wanted_gradients


class BatchNorm(torch.autograd.Function):
    """(x, w, b, residual) -> (y, mean, unbiased variance), the last two without derivative; updates ``running``."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, relu, eps, running, total, passes):
        gated_by_y = relu and residual is not None
        found = passes.channels.statistics(
            passes.statistics(x), x, weight, bias, relu and not gated_by_y, eps, running, total
        )
        y = passes.normalise(x, residual, found.by, relu)

        ctx.gated_by_y, ctx.bias_dtype = gated_by_y, None if bias is None else bias.dtype
        ctx.count, ctx.total, ctx.passes = found.count, total, passes
        ctx.save_for_backward(x, weight, found.gate, found.inv_std, y if gated_by_y else None)
        mean = found.by[0]
        ctx.mark_non_differentiable(mean, found.unbiased)
        ctx.set_materialize_grads(False)
        return y, mean, found.unbiased

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * 9
        x, weight, gate, inv_std, y = ctx.saved_tensors
        wants_x, _, _, wants_residual = wanted_gradients(ctx)[:4]
        g_x, gated, g_weight, g_bias = BatchNormGradient.apply(
            g, x, weight, None if y is None else y.detach(), gate, inv_std, wants_x, ctx.count, ctx.total, ctx.passes
        )
        return (
            g_x,
            None if weight is None else g_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else g_bias.to(ctx.bias_dtype),
            (gated if ctx.gated_by_y else g) if wants_residual else None,
            *(None,) * 5,
        )


class BatchNormGradient(torch.autograd.Function):
    """(g, x, w) -> (∂x where it is wanted, gated g where y gates, ∂w, ∂b)."""

    @staticmethod
    def forward(ctx, g, x, weight, y, gate, inv_std, wants_x, count, total, passes):
        sums, gated = passes.gradient_sums(laid_out_like(g, x), x, y, gate)
        found = passes.channels.gradient(sums, weight, gate, inv_std, count, total)
        g_x = passes.gradient(gated, x, found.by) if wants_x else None

        ctx.count, ctx.total, ctx.passes = count, total, passes
        ctx.save_for_backward(gated, x, y, weight, gate, inv_std, found.sums, found.means)
        ctx.set_materialize_grads(False)
        return g_x, None if y is None else gated, found.sums[1], found.sums[0]

    @staticmethod
    def backward(ctx, u, q, v, t):
        g_g, g_x, g_weight = BatchNormSecond.apply(u, q, v, t, *ctx.saved_tensors, ctx.count, ctx.total, ctx.passes)
        return g_g, g_x, g_weight if ctx.needs_input_grad[2] else None, *(None,) * 7


class BatchNormSecond(torch.autograd.Function):
    """The adjoint of (g, x, w) -> (∂x, gated g, ∂w, ∂b) at (u, q, v, t), and where differentiating ends.

    A function of its own because ``once_differentiable`` leaves the inputs out of the graph: ``autograd.grad`` would
    then pass its error by and return a third derivative without this part.
    """

    @staticmethod
    def forward(ctx, u, q, v, t, g, x, y, weight, gate, inv_std, sums, means, count, total, passes):
        u = torch.zeros_like(x) if u is None else laid_out_like(u, x)
        q = None if q is None else laid_out_like(q, x)
        second_sums = passes.second_sums(u, g, x, gate)
        by, g_weight = passes.channels.second(second_sums, v, t, weight, gate, inv_std, (sums, means), count, total)
        return *passes.second(u, g, x, q, y, by), g_weight

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("BatchNorm has no third derivative: use impl='reference'")


def laid_out_like(g: Tensor, x: Tensor) -> Tensor:
    """g as it is, or a copy with the strides of x."""
    return g if g.stride() == x.stride() else torch.empty_like(x, dtype=g.dtype).copy_(g)
