"""BatchNorm whose statistics span all ranks and that can be differentiated twice."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fasttrain.distributed import all_gather, all_reduce


class _Frozen(threading.local):
    depth = 0


_frozen = _Frozen()


class frozen_statistics:
    """``with frozen_statistics():`` no BatchNorm here updates its running statistics; what it computes is unchanged.

    May be nested and entered again, as activation checkpointing does at each pass of a double backward.
    """

    def __enter__(self) -> None:
        _frozen.depth += 1

    def __exit__(self, *_) -> None:
        _frozen.depth -= 1


class _CrossRank:
    """The part that :class:`BatchNorm1d` and :class:`BatchNorm2d` share; the rest, state included, is torch's."""

    def __init__(self, num_features: int, *, sync: bool = True, bias: bool = True, **options) -> None:
        super().__init__(num_features, **options)
        self.sync = sync
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        use_batch = self.training or self.running_mean is None
        update = self.training and self.running_mean is not None and not _frozen.depth
        momentum = self.momentum or 0.0
        if update:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # torch's convention: a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        if self.training and self.sync and dist.is_initialized() and dist.get_world_size() > 1:
            y, mean, var, count = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps)
            if update:
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
            return y
        running = self.running_mean, self.running_var
        if use_batch and not update and self.running_mean is not None:
            running = self.running_mean.clone(), self.running_var.clone()  # to be written to and thrown away
        if use_batch and x.device.type == "cpu" and torch.is_grad_enabled():
            return _LocalBatchNorm.apply(x, self.weight, self.bias, *running, momentum, self.eps)
        return F.batch_norm(x, *running, self.weight, self.bias, use_batch, momentum, self.eps)


class BatchNorm1d(_CrossRank, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the batches of all ranks; see :class:`BatchNorm2d`."""


class BatchNorm2d(_CrossRank, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose batch is that of all ranks together, with first and second derivatives right.

    y = w (x − μ) / √(σ² + ε) + b, with μ and σ² over images and pixels of *all* ranks' x [n, C, H, W]; n may differ
    between ranks. Statistics are float32 whatever the autocast dtype (float64 for float64 x); y has x's dtype. With one
    rank, in evaluation mode, or with ``sync=False`` it is torch's own kernel; on a CPU only its second derivative is
    ours, which torch composes of dozens of full-size operations. State and its names are torch's:
    either loads the other's ``state_dict``. ``bias=False`` leaves b out.

    Why not ``nn.SyncBatchNorm``: it refuses the CPU and has no second derivative.
    """


class _LocalBatchNorm(torch.autograd.Function):
    """(x, w, b, running μ, running σ²) -> y of this rank's batch: torch's kernels but for the backward's backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, inv_std = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, mean, inv_std = ctx.saved_tensors
        count = torch.full_like(mean, x.numel() // x.shape[1])
        g_x, g_weight, g_bias = _BatchNormBackward.apply(g, x, weight, mean, inv_std, count, False)
        return g_x, g_weight if weight is not None else None, g_bias if ctx.has_bias else None, None, None, None, None


class _SyncBatchNorm(torch.autograd.Function):
    """(x, w, b) -> (y, μ, σ², count). One gather forward, one sum backward, one sum in the backward's backward.

    The full-size passes are torch's native BatchNorm kernels, which take half-precision x with float32 statistics.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        mean, var, count = _global_statistics(x)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    def backward(ctx, g: Tensor, *_):
        x, weight, mean, inv_std, count = ctx.saved_tensors
        g_x, g_weight, g_bias = _BatchNormBackward.apply(g, x, weight, mean, inv_std, count, True)
        return g_x, g_weight if weight is not None else None, g_bias if ctx.has_bias else None, None


class _BatchNormBackward(torch.autograd.Function):
    """The gradient of BatchNorm, as a function of (g, x, w) that has a gradient of its own.

    With x̂ = (x − μ) r, r = 1/√(σ² + ε), h = w g and ⟨·⟩ the mean over all ranks' images and pixels (over this rank's
    where ``across`` is false)::

        P h = h − ⟨h⟩ − x̂ ⟨h x̂⟩        (self-adjoint; the derivative of x̂ is r P)
        ∂x = r P h        ∂w = Σ g x̂        ∂b = Σ g        (the last two over this rank's x alone)

    Its adjoint, for u on ∂x, v on ∂w and t on ∂b::

        g:  w r P u + v x̂ + t
        w:  r Σ g (P u)                                                              (over this rank)
        x:  r P e − x̂ r² ⟨u P h⟩        with e = v g − r (⟨h x̂⟩ u + ⟨u x̂⟩ h)
    """

    @staticmethod
    def forward(ctx, g, x, weight, mean, inv_std, count, across):
        ctx.reduce = all_reduce if across else _unchanged
        w = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        if across:
            sum_gx, sum_g = _local_sums(g, x, mean, inv_std)
        else:
            g_x, sum_gx, sum_g = _native_backward(g, x, w, mean, inv_std, [True, True, True])
        mean_h, mean_hx = ctx.reduce(torch.stack([w * sum_g, w * sum_gx])) / count
        if across:  # r (w g − ⟨h⟩ − x̂ ⟨h x̂⟩) is affine in g and x, channel by channel
            on_g, on_x = w * inv_std, -inv_std.square() * mean_hx
            g_x = _affine(x, (g, on_g), (x, on_x), constant=-inv_std * mean_h - on_x * mean)
        ctx.save_for_backward(g, x, w, mean, inv_std, count, sum_g, sum_gx, mean_h, mean_hx)
        ctx.has_weight = weight is not None
        return g_x, sum_gx, sum_g

    @staticmethod
    @once_differentiable
    def backward(ctx, u, v, t):
        g, x, w, mean, inv_std, count, sum_g, sum_gx, mean_h, mean_hx = ctx.saved_tensors
        sum_ux, sum_u = _local_sums(u, x, mean, inv_std)
        sum_ug, _ = _local_sums(u, g, torch.zeros_like(mean), torch.ones_like(mean))
        mean_u, mean_ux, mean_uh, mean_vg, mean_vgx = (
            ctx.reduce(torch.stack([sum_u, sum_ux, w * sum_ug, v * sum_g, v * sum_gx])) / count
        )
        u_Ph = mean_uh - mean_u * mean_h - mean_ux * mean_hx

        on_u, on_x = w * inv_std, v * inv_std - w * inv_std.square() * mean_ux
        g_g = _affine(x, (u, on_u), (x, on_x), constant=t - on_u * mean_u - on_x * mean)

        g_w = inv_std * (sum_ug - mean_u * sum_g - mean_ux * sum_gx)

        mean_e = mean_vg - inv_std * (mean_hx * mean_u + mean_ux * mean_h)
        mean_ex = mean_vgx - 2 * inv_std * mean_hx * mean_ux
        on_u = -inv_std.square() * mean_hx
        on_g = inv_std * v - inv_std.square() * mean_ux * w
        on_x = -inv_std.square() * (mean_ex + inv_std * u_Ph)
        g_x = _affine(x, (u, on_u), (g, on_g), (x, on_x), constant=-inv_std * mean_e - on_x * mean)
        return g_g, g_x, g_w if ctx.has_weight else None, None, None, None, None


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C] and biased variance [C] of all ranks' x, and their number of values a channel [C]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = x.new_zeros(2, x.shape[1], dtype=dtype)
    count = x.numel() // x.shape[1]
    if count:  # the buffers, overwritten with momentum 1, make the statistics of half-precision x float32
        mean, var = torch.batch_norm_update_stats(x.detach(), mean, var.clone(), 1.0)
    means, squares, counts = all_gather(torch.stack([mean, var * count, torch.full_like(mean, count)])).unbind(1)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    squares = squares + counts * (means - mean).square()
    return mean, squares.sum(0) / count, count


def _local_sums(g: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor) -> tuple[Tensor, Tensor]:
    """Σ g x̂ and Σ g over this rank's images and pixels [C], accumulated in the statistics' precision."""
    if not x.numel():
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, sum_gx, sum_g = _native_backward(g, x, torch.ones_like(mean), mean, inv_std, [False, True, True])
    return sum_gx, sum_g


def _native_backward(g: Tensor, x: Tensor, w: Tensor, mean: Tensor, inv_std: Tensor, wanted: list[bool]):
    """torch's own (∂x, Σ g x̂, Σ g) over this rank's images and pixels, those of them that are wanted."""
    return torch.ops.aten.native_batch_norm_backward(g.to(x.dtype), x, w, None, None, mean, inv_std, True, 0.0, wanted)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _affine(like: Tensor, *terms: tuple[Tensor, Tensor], constant: Tensor) -> Tensor:
    """constant + Σ tensor · factor, with factors and constant one number a channel [C]."""
    shape = [1, -1] + [1] * (like.dim() - 2)
    total = constant.view(shape)
    for tensor, factor in terms:
        total = torch.addcmul(total, tensor, factor.view(shape))
    return total.to(like.dtype)
