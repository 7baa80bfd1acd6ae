"""Evaluation-mode BatchNorm folded into the convolutions before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fasttrain.models import Encoder
from fasttrain.models.frozen import FrozenChain, FrozenMaxPool, FrozenResNet, in_two_terms
from fasttrain.models.resnet import BasicBlock, Bottleneck, FewShotBlock, ResNet

M = TypeVar("M", bound=nn.Module)
Pair = tuple[nn.Module, _BatchNorm]  # a convolution or linear layer, and the BatchNorm after it


class Folded(Encoder):
    """What :func:`fold_batchnorm` makes of an encoder; under autocast its first convolutions see images unrounded."""

    exact_images: bool

    def normalised(self, images: Tensor) -> Tensor:
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
        if self.exact_images and dtype.itemsize == 2 and images.dtype == torch.float32:
            return in_two_terms(images, self.scale, self.shift, dtype)
        return super().normalised(images)


def fold_batchnorm(encoder: M) -> M:
    """A copy of the encoder in evaluation mode without its BatchNorms, for the many passes of an attack.

    With s = γ / √(σ² + ε) a channel, from the running statistics and whatever mode the encoder is in::

        BN(w ∗ x + b) = (s w) ∗ x + (β + s (b − μ))

    It equals the encoder to rounding and is differentiable once in the images. Its weights are constants, taken from
    the encoder at this call: call again once they have changed (the cost is a few passes over them). Under autocast
    they are rounded to its type here, once; what is folded there is for use there. The encoder and its hooks are left
    alone. Residual blocks and stem are fused (:class:`FrozenChain`), which may change the memory format of the stages;
    features are float32 under autocast, too. Of a module that is no :class:`Encoder` only BatchNorms are folded.

    Raises:
        ValueError: a BatchNorm that does not directly follow a convolution or a linear layer.
    """
    with torch.no_grad():
        pairs: list[Pair] = []
        twin = _folded(encoder, pairs)
        if pairs:
            _fold(pairs, _of_images(twin))
        if not isinstance(encoder, Encoder):
            return twin
        twin.__class__, twin.exact_images = Folded, bool(_of_images(twin))
        for holder, name in ((twin, "head"), (twin, "predictor"), (twin.backbone, "fc")):
            if getattr(holder, name, None) is not None:
                setattr(holder, name, _Wide(getattr(holder, name)))
        return twin


def _folded(module: M, pairs: list[Pair]) -> M:
    """A copy in evaluation mode, its tensors shared, none of them a parameter; ``pairs`` receives what is to fold."""
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
            pairs.append((layer, child))
            child = nn.Identity()
        twin._modules[name] = child if child is None else _fused(_folded(child, pairs))
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
        first = twin.conv1 if hasattr(twin, "conv1") else twin.layer1[0]
        first = first[0] if isinstance(first, nn.Sequential) else first
        if isinstance(first, FrozenChain):
            first.sees_images = True
        twin.__class__ = FrozenResNet
    return twin


class _WideAverage(nn.Module):
    """The average over pixels [B, C, 1, 1], at least float32.

    An attack on embeddings raises their distance from embeddings close by: features rounded to bfloat16 lose much of
    that small difference and with it the direction to go.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _Average.apply(x)


class _Average(torch.autograd.Function):
    """PyTorch's gradient of an average into another type writes one number a pixel, twice; here it is one an image."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.mean((2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        share = torch.empty_like(g, dtype=ctx.dtype)
        return torch.div(g, ctx.shape[2:].numel(), out=share).expand(ctx.shape)


class _Wide(nn.Module):
    """A head outside autocast, on features that are float32: their rounding, and its casts, cost more than it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)


def _fold(pairs: Sequence[Pair], of_images: set[nn.Module]) -> None:
    """Write what ``pairs`` fold to into their layers, in a few operations for all of them together."""
    layers, norms = zip(*pairs, strict=True)
    deviations = torch._foreach_sqrt(torch._foreach_add([n.running_var for n in norms], [n.eps for n in norms]))
    scales = torch._foreach_div([_or(n.weight, n.running_var, 1.0) for n in norms], deviations)
    means = [n.running_mean if x.bias is None else n.running_mean - x.bias for x, n in pairs]
    biases = torch._foreach_addcmul([_or(n.bias, n.running_mean, 0.0) for n in norms], scales, means, value=-1)
    types = _types(layers, of_images)
    for layer, scale, bias in zip(layers, scales, biases, strict=True):
        scale = scale.view(-1, *[1] * (layer.weight.dim() - 1))
        weight = torch.empty_like(layer.weight, dtype=types[layer])
        layer._buffers |= {"weight": torch.mul(layer.weight, scale, out=weight), "bias": bias}
    wide = [x for x in layers if x.bias.dtype != types[x]]
    if wide:
        rounded = [torch.empty_like(x.bias, dtype=types[x]) for x in wide]
        torch._foreach_copy_(rounded, [x.bias for x in wide])
        for layer, bias in zip(wide, rounded, strict=True):
            layer._buffers["bias"] = bias


def _types(layers: Sequence[nn.Module], of_images: set[nn.Module]) -> dict[nn.Module, torch.dtype]:
    """The type for each of ``layers``: autocast's, where it is on, for convolutions but those of images."""
    kind = layers[0].weight.device.type
    types = {layer: layer.weight.dtype for layer in layers}
    if torch.is_autocast_enabled(kind):
        for layer, dtype in types.items():
            if isinstance(layer, nn.Conv2d) and dtype == torch.float32 and layer not in of_images:
                types[layer] = torch.get_autocast_dtype(kind)
    return types


def _of_images(twin: nn.Module) -> set[nn.Module]:
    """The convolutions of images in the folded network, as far as they are fused."""
    return {layer for chain in twin.modules() if isinstance(chain, FrozenChain) for layer in chain.of_images}


def _or(values: Tensor | None, like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value) if values is None else values


__all__ = ["fold_batchnorm"]
