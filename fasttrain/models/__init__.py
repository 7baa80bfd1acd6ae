"""Encoders: pixels in [0, 1] -> stage maps, features, projections, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import pydantic
import torch
from torch import Tensor, nn

from fasttrain.config import Config
from fasttrain.models.batchnorm import BatchNorm1d, BatchNorm2d, frozen_statistics
from fasttrain.models.heads import HeadConfig, StageHead, prediction_head, projection_head
from fasttrain.models.resnet import Architecture, ResNet, Stem, check_stem

Positive = Annotated[float, pydantic.Field(gt=0)]


class Encoded(NamedTuple):
    """What an encoder makes of N images; a member that its configuration leaves out is ``None``."""

    images: Tensor  # [N, 3, H, W] in [0, 1]
    stages: tuple[Tensor, ...]  # 4 maps [N, C, h, w]
    features: Tensor  # [N, F], the last map averaged over its pixels
    projections: Tensor | None  # [N, D]; None with head.layers=0
    logits: Tensor | None  # [N, classes]; None with classes=0
    predictions: Tensor | None = None  # [N, D], of the projections; None with head.predictor=0
    layers: tuple[Encoded, ...] = ()  # 4: what heads on stages 1 to 4 make; () without layer_heads
    encoder: Callable[[Tensor], Encoded] | None = None  # what made this, for objectives that look at other images too


class ModelConfig(Config):
    arch: Architecture = "resnet50"
    """Backbone: resnet12, 18, 34, 50, 101 or 152."""
    stem: Stem = "imagenet"
    """imagenet (7x7 stride 2, max-pool), cifar (3x3 stride 1), or none (resnet12, which has none)."""
    width: float = pydantic.Field(default=1.0, gt=0, le=16)
    """Factor on the channels of every stage and of the stem."""
    zero_init_residual: bool = True
    """Start each residual block as the identity: its last BatchNorm gain is 0 (SimCLR's choice)."""
    head: HeadConfig = HeadConfig()
    """Projection head."""
    classes: int = pydantic.Field(default=0, ge=0)
    """Outputs of a linear classifier on the features; 0 for none."""
    layer_heads: bool = False
    """A projection head (predictor, classifier) on each of the first three stages too, for layer-by-layer losses."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Pixel mean a channel, subtracted inside the model (default: ImageNet's)."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Pixel standard deviation a channel, divided by inside the model (default: ImageNet's)."""
    sync_bn: bool = True
    """BatchNorm statistics over the batch of all ranks instead of each rank's own."""
    checkpoint_activations: bool = False
    """Keep only each block's input and compute the block again in the backward pass: less memory, about 1/3 slower."""

    @pydantic.model_validator(mode="after")
    def _stem_fits(self) -> ModelConfig:
        check_stem(self.arch, self.stem)
        return self


class Encoder(nn.Module):
    """Normaliser, backbone, projection head and classifier: images [N, 3, H, W] in [0, 1] -> :class:`Encoded`.

    ``backbone`` bears torchvision's key names (the classifier is its ``fc``), so its ``state_dict`` loads strictly into
    torchvision's ResNet and back; ``head`` is the projection head, ``predictor`` SimSiam's, each or ``None``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(
            config.arch,
            config.stem,
            width=config.width,
            classes=config.classes,
            zero_init_residual=config.zero_init_residual,
            sync=config.sync_bn,
            checkpoint_activations=config.checkpoint_activations,
        )
        features = self.backbone.num_features
        self.head = projection_head(config.head, features, config.sync_bn) if config.head.layers else None
        self.predictor = prediction_head(config.head, config.sync_bn) if config.head.predictor else None
        stages = [self.backbone.layer1, self.backbone.layer2, self.backbone.layer3] if config.layer_heads else []
        self.layer_heads = nn.ModuleList(
            StageHead(config.head, stage[-1].last_norm.num_features, config.classes, config.sync_bn) for stage in stages
        )
        mean, std = torch.tensor(config.mean).view(1, 3, 1, 1), torch.tensor(config.std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Encoded:
        stages, features = self.backbone(self.normalised(images))
        projections = self.head(features) if self.head is not None else None
        predictions = self.predictor(projections) if self.predictor is not None else None
        logits = self.backbone.fc(features) if self.config.classes else None
        whole = Encoded(images, stages, features, projections, logits, predictions, encoder=self)
        return whole._replace(layers=(*self._layers(whole), whole)) if self.config.layer_heads else whole

    def normalised(self, images: Tensor) -> Tensor:
        """What the backbone sees of images."""
        return torch.addcmul(self.shift, images, self.scale)

    def _layers(self, whole: Encoded) -> Iterator[Encoded]:
        for depth, head in enumerate(self.layer_heads, start=1):
            features, projections, predictions, logits = head(whole.stages[depth - 1])
            yield Encoded(whole.images, whole.stages[:depth], features, projections, logits, predictions)


__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "Encoded",
    "Encoder",
    "HeadConfig",
    "ModelConfig",
    "ResNet",
    "frozen_statistics",
]
