"""BatchNorm whose statistics span all ranks and that can be differentiated twice."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.distributed import all_reduce
from fasttrain_kernels.batchnorm import Running, batch_norm


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

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """BN(x), plus ``residual`` where there is one, at least 0 with ``relu``."""
        self._check_input_dim(x)
        use_batch = self.training or self.running_mean is None
        update = self.training and self.running_mean is not None and not _frozen.depth
        across = self.training and self.sync and dist.is_initialized() and dist.get_world_size() > 1
        if across or (use_batch and x.dtype != torch.float64 and not x.is_meta):
            total = all_reduce if across else None
            state = self.running_mean, self.running_var, self.num_batches_tracked
            running = Running(*state, self.momentum) if update else None
            options = {"relu": relu, "eps": self.eps, "running": running, "total": total}
            return batch_norm(x, self.weight, self.bias, residual, **options)[0]
        momentum = self.momentum or 0.0
        if update:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # torch's convention: a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        running = self.running_mean, self.running_var
        if use_batch and not update and self.running_mean is not None:
            running = self.running_mean.clone(), self.running_var.clone()  # to be written to and thrown away
        y = F.batch_norm(x, *running, self.weight, self.bias, use_batch, momentum, self.eps)
        if residual is not None:
            y = y.add_(residual)
        return F.relu(y, inplace=True) if relu else y


class BatchNorm1d(_CrossRank, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the batches of all ranks; see :class:`BatchNorm2d`."""


class BatchNorm2d(_CrossRank, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose batch is that of all ranks together, with first and second derivatives right.

    y = w (x − μ) / √(σ² + ε) + b, with μ and σ² over images and pixels of *all* ranks' x [n, C, H, W]; n may differ
    between ranks. Statistics are float32 whatever the autocast dtype (float64 for float64 x); y has x's dtype. The
    passes are those of ``fasttrain_kernels.batchnorm``, which adds a residual and applies ReLU on the way. In
    evaluation mode it is torch's own kernel, and for float64 x on one rank or with ``sync=False`` too, to the last bit.
    State and its names are torch's: either loads the other's ``state_dict``. ``bias=False`` leaves b out.

    Why not ``nn.SyncBatchNorm``: it refuses the CPU and has no second derivative.
    """


def normalised(norm: nn.Module, activation: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """activation(norm(x) + residual): in one go where they are our BatchNorm and ReLU and nobody watches in between."""
    if isinstance(norm, _CrossRank) and type(activation) is nn.ReLU and not (_hooked(norm) or _hooked(activation)):
        return norm(x, residual, relu=True)
    y = norm(x)
    return activation(y if residual is None else y + residual)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
