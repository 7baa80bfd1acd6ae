"""Evaluation-mode BatchNorm folded into the convolutions before it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasttrain.models import Encoder
from fasttrain.models.frozen import FrozenChain, FrozenMaxPool
from fasttrain.models.resnet import BasicBlock, Bottleneck, FewShotBlock, ResNet

M = TypeVar("M", bound=nn.Module)


def fold_batchnorm(encoder: Encoder) -> Encoder:
    """A copy of the encoder in evaluation mode without its BatchNorms, for the many passes of an attack.

    With s = γ / √(σ² + ε) a channel, from the running statistics and whatever mode the encoder is in::

        BN(w ∗ x + b) = (s w) ∗ x + (β + s (b − μ))

    It equals the encoder to rounding and is differentiable once in the images. Its weights are constants, taken from
    the encoder at this call: call again once they have changed (the cost is a few passes over them). The encoder and
    its hooks are left alone. Residual blocks and stem are fused (:class:`FrozenChain`), which may change the memory
    format of the stages; features are float32 under autocast, too.

    Raises:
        ValueError: a BatchNorm that does not directly follow a convolution or a linear layer.
    """
    with torch.no_grad():
        return _folded(encoder)


def _folded(module: M) -> M:
    """A copy in evaluation mode, its tensors shared or folded, none of them a parameter."""
    twin = copy.copy(module)
    # hooks belong to the original: an engine's would gather weights and reduce gradients
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(twin, hooks, {})
    twin.training = False
    twin._parameters = {}
    twin._buffers = {name: p if p is None else p.detach() for name, p in module._parameters.items()} | module._buffers
    twin._modules = {}
    layer = None
    for name, child in module._modules.items():
        if isinstance(child, _BatchNorm):
            if layer is None:
                raise ValueError(f"cannot fold BatchNorm '{name}': no convolution or linear layer directly before it")
            _fold(layer, child)
            child = nn.Identity()
        twin._modules[name] = child if child is None else _fused(_folded(child))
        layer = twin._modules[name] if isinstance(child, (nn.Conv2d, nn.Linear)) else None
    return twin


def _fused(twin: nn.Module) -> nn.Module:
    """What does the work of a folded residual block or stem in fewer passes; anything else as it is."""
    rectified = type(getattr(twin, "relu", None)) in (nn.ReLU, nn.LeakyReLU)
    if isinstance(twin, (BasicBlock, Bottleneck, FewShotBlock)) and rectified:
        convolutions = [child for child in twin.children() if isinstance(child, nn.Conv2d)]
        shortcut = nn.Identity() if twin.downsample is None else twin.downsample[0]
        chain = FrozenChain(convolutions, shortcut, getattr(twin.relu, "negative_slope", 0.0))
        return nn.Sequential(chain, FrozenMaxPool(twin.maxpool)) if isinstance(twin, FewShotBlock) else chain
    if isinstance(twin, ResNet):
        twin.avgpool = _WideAverage()
        if rectified:  # it has a stem
            twin.conv1, twin.relu = FrozenChain([twin.conv1]), nn.Identity()
            if isinstance(twin.maxpool, nn.MaxPool2d):
                twin.maxpool = FrozenMaxPool(twin.maxpool)
    return twin


class _WideAverage(nn.Module):
    """The average over pixels [B, C, 1, 1], at least float32.

    An attack on embeddings raises their distance from embeddings close by: features rounded to bfloat16 lose much of
    that small difference and with it the direction to go.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def _fold(layer: nn.Module, norm: _BatchNorm) -> None:
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    bias = scale * bias
    if norm.bias is not None:
        bias = bias + norm.bias
    layer._buffers["weight"] = layer.weight * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    layer._buffers["bias"] = bias


__all__ = ["fold_batchnorm"]
