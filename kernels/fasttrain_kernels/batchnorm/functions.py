"""BatchNorm as an autograd function, its gradient as another, and that one's own; the README derives all three.

``passes`` is the module that goes over the full-size tensors (``native`` says what each pass is). Here are the numbers
a channel between the passes, and the sums over ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasttrain_kernels.wanted import wanted_gradients

Total = Callable[[Tensor], Tensor]
"Sum over the ranks."


class BatchNorm(torch.autograd.Function):
    """(x, w, b, residual) -> (y, mean, unbiased variance), the last two without derivative."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, relu, eps, total, passes):
        mean, squares = passes.statistics(x)
        count = x.numel() // x.shape[1]
        if total is not None:
            mean, squares, count = _over_ranks(mean, squares, count, total)
        inv_std = (squares / count + eps).rsqrt()
        scale = inv_std if weight is None else inv_std * weight
        shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
        y = passes.normalise(x, residual, torch.stack([mean, scale, shift]), relu)

        ctx.total, ctx.passes, ctx.count = total, passes, count
        ctx.relu, ctx.gated_by_y = relu, relu and residual is not None
        ctx.save_for_backward(x, weight, bias, mean, inv_std, scale, shift, y if ctx.gated_by_y else None)
        unbiased = squares / (count - 1 if total is None else (count - 1).clamp(min=1))
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.set_materialize_grads(False)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * 8
        x, weight, bias, mean, inv_std, scale, shift, y = ctx.saved_tensors
        if not ctx.relu or ctx.gated_by_y:
            scale, shift = torch.zeros_like(scale), torch.ones_like(shift)  # x closes no gate
        gate = torch.stack([mean, scale, shift])
        wants_x, _, _, wants_residual = wanted_gradients(ctx)[:4]
        g_x, gated, g_weight, g_bias = BatchNormGradient.apply(
            g, x, weight, None if y is None else y.detach(), gate, inv_std, wants_x, ctx.count, ctx.total, ctx.passes
        )
        return (
            g_x,
            None if weight is None else g_weight.to(weight.dtype),
            None if bias is None else g_bias.to(bias.dtype),
            (gated if ctx.gated_by_y else g) if wants_residual else None,
            *(None,) * 4,
        )


class BatchNormGradient(torch.autograd.Function):
    """(g, x, w) -> (∂x where it is wanted, gated g where y gates, ∂w, ∂b)."""

    @staticmethod
    def forward(ctx, g, x, weight, y, gate, inv_std, wants_x, count, total, passes):
        g = laid_out_like(g, x)
        sum_h, sum_hx, gated = passes.gradient_sums(g, x, y, gate)
        sum_hx = inv_std * sum_hx
        w = torch.ones_like(inv_std) if weight is None else weight.to(inv_std.dtype)
        mean_h, mean_hx = _means([w * sum_h, w * sum_hx], count, total)
        g_x = None
        if wants_x:
            on_h, on_x, constant = w * inv_std, -inv_std.square() * mean_hx, -inv_std * mean_h
            g_x = passes.gradient(gated, x, torch.stack([*gate, on_h, on_x, constant]))

        ctx.count, ctx.total, ctx.passes, ctx.has_weight = count, total, passes, weight is not None
        ctx.save_for_backward(gated, x, y, gate, inv_std, w, sum_h, sum_hx, mean_h, mean_hx)
        ctx.set_materialize_grads(False)
        return g_x, None if y is None else gated, sum_hx, sum_h

    @staticmethod
    def backward(ctx, u, q, v, t):
        of = ctx.count, ctx.total, ctx.passes
        g_g, g_x, g_weight = BatchNormSecond.apply(u, q, v, t, *ctx.saved_tensors, *of)
        return g_g, g_x, g_weight if ctx.has_weight else None, *(None,) * 7


class BatchNormSecond(torch.autograd.Function):
    """The adjoint of (g, x, w) -> (∂x, gated g, ∂w, ∂b) at (u, q, v, t), and where differentiating ends.

    A function of its own because ``once_differentiable`` leaves the inputs out of the graph: ``autograd.grad`` would
    then pass its error by and return a third derivative without this part.
    """

    @staticmethod
    def forward(ctx, u, q, v, t, g, x, y, gate, r, w, sum_h, sum_hx, mean_h, mean_hx, count, total, passes):
        u = torch.zeros_like(x) if u is None else laid_out_like(u, x)
        q = None if q is None else laid_out_like(q, x)
        v = torch.zeros_like(r) if v is None else v
        t = torch.zeros_like(r) if t is None else t
        sum_u, sum_ux, sum_uh = passes.second_sums(u, g, x, gate)
        sum_ux = r * sum_ux
        terms = [sum_u, sum_ux, w * sum_uh, v * sum_h, v * sum_hx]
        mean_u, mean_ux, mean_uh, mean_vh, mean_vhx = _means(terms, count, total)
        u_ph = mean_uh - mean_u * mean_h - mean_ux * mean_hx
        mean_e = mean_vh - r * (mean_hx * mean_u + mean_ux * mean_h)
        mean_ex = mean_vhx - 2 * r * mean_hx * mean_ux
        on_g = [w * r, r * (v - w * r * mean_ux), t - w * r * mean_u]
        on_x = [
            -r.square() * mean_hx,
            r * v - r.square() * mean_ux * w,
            -r.square() * (mean_ex + r * u_ph),
            -r * mean_e,
        ]
        g_g, g_x = passes.second(u, g, x, q, y, torch.stack([*gate, *on_g, *on_x]))
        return g_g, g_x, r * (sum_uh - mean_u * sum_h - mean_ux * sum_hx)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("BatchNorm has no third derivative: use impl='reference'")


def _over_ranks(mean: Tensor, squares: Tensor, count: int, total: Total) -> tuple[Tensor, Tensor, Tensor]:
    """Joined μ, Σ (x − μ)² and number of values a channel, from one sum in float64, where Σ x² − n μ² loses nothing."""
    wide = mean.double()
    sums = total(torch.stack([wide * count, squares.double() + wide.square() * count, torch.full_like(wide, count)]))
    count = sums[2, 0]
    joined = sums[0] / count
    squares = (sums[1] - sums[0] * joined).clamp(min=0)
    return joined.to(mean.dtype), squares.to(mean.dtype), count


def _means(sums: list[Tensor], count: int | Tensor, total: Total | None) -> Tensor:
    sums = torch.stack(sums)
    return (sums if total is None else total(sums)) / count


def laid_out_like(g: Tensor, x: Tensor) -> Tensor:
    """g as it is, or a copy with the strides of x."""
    return g if g.stride() == x.stride() else torch.empty_like(x, dtype=g.dtype).copy_(g)
