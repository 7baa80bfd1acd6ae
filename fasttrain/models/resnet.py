"""ResNets with torchvision's key names and shapes, at any width, for ImageNet-sized and CIFAR-sized images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fasttrain.models.batchnorm import BatchNorm2d, frozen_statistics, normalised
from fasttrain.models.convolution import Conv2d

Architecture = Literal["resnet12", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Stem = Literal["imagenet", "cifar", "none"]


class ResNet(nn.Module):
    """Images [N, 3, H, W], normalised -> four stage maps and pooled features [N, F].

    Sources: He et al. 2015, with the stride of a bottleneck on its 3x3 (torchvision's "v1.5"). ``resnet12`` is the
    few-shot literature's (Oreshkin et al. 2018, Lee et al. 2019): no stem, one block of three 3x3 convolutions a stage
    with 64, 160, 320, 640 channels, leaky ReLU 0.1, a 2x2 max-pool ending each block; its usual DropBlock is left out.

    Args:
        stem: "imagenet" (7x7, stride 2, max-pool), "cifar" (3x3, stride 1, no max-pool; Chen et al. 2020, B.9), or
            "none" (resnet12 alone).
        width: factor on every stage's channels, the stem's included (SimCLR's "2x").
        classes: outputs of the classifier ``fc``; 0 leaves it out.
        zero_init_residual: each block starts as the identity (its last BatchNorm gain is 0).
        sync: BatchNorm statistics over all ranks.
        checkpoint_activations: keep each block's input alone and compute the block again in the backward pass.

    Raises:
        ValueError: a stem that the architecture cannot have.
    """

    def __init__(
        self,
        architecture: Architecture,
        stem: Stem = "imagenet",
        *,
        width: float = 1.0,
        classes: int = 0,
        zero_init_residual: bool = False,
        sync: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        check_stem(architecture, stem)
        block, depths, channels = _PLANS[architecture]
        channels = [max(1, round(width * c)) for c in channels]
        self.checkpoint_activations = checkpoint_activations
        if stem == "none":
            self.inplanes = 3
        else:
            self.inplanes = channels[0]
            self.conv1 = (
                Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
                if stem == "imagenet"
                else Conv2d(3, self.inplanes, 3, padding=1, bias=False)
            )
            self.bn1 = BatchNorm2d(self.inplanes, sync=sync)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        for stage, (depth, planes) in enumerate(zip(depths, channels, strict=True), start=1):
            self.add_module(f"layer{stage}", self._stage(block, planes, depth, 1 if stage == 1 else 2, sync))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.num_features = self.inplanes
        if classes:
            self.fc = nn.Linear(self.num_features, classes)
        self._initialise(zero_init_residual)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        if hasattr(self, "conv1"):
            x = self.maxpool(normalised(self.bn1, self.relu, self.conv1(x)))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = self._recomputed(block, x) if self.checkpoint_activations and torch.is_grad_enabled() else block(x)
            stages.append(x)
        return tuple(stages), self.avgpool(x).flatten(1)

    def _stage(self, block: type[nn.Module], planes: int, depth: int, stride: int, sync: bool) -> nn.Sequential:
        blocks = []
        for position in range(depth):
            blocks.append(block(self.inplanes, planes, stride if position == 0 else 1, sync))
            self.inplanes = planes * block.expansion
        return nn.Sequential(*blocks)

    @staticmethod
    def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
        # the second pass over the block must not count its batch into the running statistics again
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics()))

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck, FewShotBlock)):
                nn.init.zeros_(module.last_norm.weight)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, sync: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(planes, sync=sync)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes, sync=sync)
        self.downsample = _shortcut(inplanes, planes, stride, sync)

    @property
    def last_norm(self) -> BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = normalised(self.bn1, self.relu, self.conv1(x))
        y = self.conv2(y)
        return normalised(self.bn2, self.relu, y, x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, sync: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = BatchNorm2d(planes, sync=sync)
        self.conv2 = Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes, sync=sync)
        self.conv3 = Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = BatchNorm2d(planes * self.expansion, sync=sync)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inplanes, planes * self.expansion, stride, sync)

    @property
    def last_norm(self) -> BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = normalised(self.bn1, self.relu, self.conv1(x))
        y = normalised(self.bn2, self.relu, self.conv2(y))
        y = self.conv3(y)
        return normalised(self.bn3, self.relu, y, x if self.downsample is None else self.downsample(x))


class FewShotBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, sync: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(planes, sync=sync)
        self.conv2 = Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes, sync=sync)
        self.conv3 = Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn3 = BatchNorm2d(planes, sync=sync)
        self.relu = nn.LeakyReLU(0.1, inplace=True)
        self.downsample = _shortcut(inplanes, planes, 1, sync)
        self.maxpool = nn.MaxPool2d(2)

    @property
    def last_norm(self) -> BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = normalised(self.bn1, self.relu, self.conv1(x))
        y = normalised(self.bn2, self.relu, self.conv2(y))
        y = self.conv3(y)
        return self.maxpool(normalised(self.bn3, self.relu, y, x if self.downsample is None else self.downsample(x)))


def check_stem(architecture: str, stem: str) -> None:
    """Raise ``ValueError`` where ``architecture`` cannot have ``stem``."""
    if architecture == "resnet12" and stem != "none":
        raise ValueError(f"stem={stem}: resnet12 has no stem, its first block sees the pixels; set stem=none")
    if architecture != "resnet12" and stem == "none":
        raise ValueError(f"stem=none: {architecture} needs a stem; set stem=imagenet, or stem=cifar for small images")


class Shape(NamedTuple):
    """What the names and shapes of a ResNet's weights say of it."""

    arch: Architecture
    stem: Stem
    width: float


def recognised(weights: Mapping[str, Tensor]) -> Shape | None:
    """The ResNet whose weights these look like, under torchvision's names; None where it is none of ours."""
    first = {name: weights.get(name) for name in ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv3.weight")}
    stem, first, third = first.values()
    depths = tuple(len({k.split(".")[1] for k in weights if k.startswith(f"layer{stage}.")}) for stage in range(1, 5))
    block = BasicBlock if third is None else Bottleneck if third.shape[-1] == 1 else FewShotBlock
    kernel = stem.shape[-1] if stem is not None and stem.ndim == 4 else None
    found = next((a for a, plan in _PLANS.items() if (plan.block, plan.depths) == (block, depths)), None)
    kind = {7: "imagenet", 3: "cifar", None: "none"}.get(kernel)
    if found is None or kind is None or (kind == "none") != (found == "resnet12"):
        return None
    return Shape(found, kind, first.shape[0] / _PLANS[found].channels[0])


def _shortcut(inplanes: int, planes: int, stride: int, sync: bool) -> nn.Sequential | None:
    if stride == 1 and inplanes == planes:
        return None
    return nn.Sequential(Conv2d(inplanes, planes, 1, stride=stride, bias=False), BatchNorm2d(planes, sync=sync))


class _Plan(NamedTuple):
    block: type[nn.Module]
    depths: tuple[int, int, int, int]
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)


_PLANS: dict[str, _Plan] = {
    "resnet12": _Plan(FewShotBlock, (1, 1, 1, 1), (64, 160, 320, 640)),
    "resnet18": _Plan(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _Plan(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _Plan(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _Plan(Bottleneck, (3, 4, 23, 3)),
    "resnet152": _Plan(Bottleneck, (3, 8, 36, 3)),
}
