"""Projection heads, SimSiam's predictor, and heads on the stages before the last."""

from __future__ import annotations

from typing import ClassVar, Literal

import pydantic
from torch import Tensor, nn

from fasttrain.config import Config, Where
from fasttrain.models.batchnorm import BatchNorm1d


class HeadConfig(Config):
    layers: Literal[0, 2, 3] = 2
    """Linear layers of the projection head: 2 (SimCLR), 3 (SimCLRv2), 0 for none."""
    width: int | None = pydantic.Field(default=None, ge=1)
    """Hidden width; null: the encoder's feature width."""
    out: int = pydantic.Field(default=128, ge=2)
    """Dimensions of the projection."""
    predictor: int = pydantic.Field(default=0, ge=0)
    """Hidden width of SimSiam's predictor on the projection, usually out/4; 0 for none."""

    reads: ClassVar[dict[str, Where]] = {"width": Where("layers"), "out": Where("layers")}

    @pydantic.model_validator(mode="after")
    def _predictor_has_projections(self) -> HeadConfig:
        if self.predictor and not self.layers:
            raise ValueError(f"predictor={self.predictor} predicts projections and layers=0 makes none: set layers=3")
        return self


def projection_head(config: HeadConfig, features: int, sync: bool = True) -> nn.Sequential:
    """SimCLR's head: (Linear, BN, ReLU) × (layers − 1), Linear, BN.

    As in Google's code, no Linear has a bias (BN would undo it) and the last BN has a gain but no bias. With a
    predictor it is SimSiam's projector (usually of 3 layers): there the last BN has neither.
    """
    width = config.width or features
    layers: list[nn.Module] = []
    for inputs in [features] + [width] * (config.layers - 2):
        layers += [nn.Linear(inputs, width, bias=False), BatchNorm1d(width, sync=sync), nn.ReLU(inplace=True)]
    last = {"affine": False} if config.predictor else {"bias": False}
    return nn.Sequential(*layers, nn.Linear(width, config.out, bias=False), BatchNorm1d(config.out, sync=sync, **last))


def prediction_head(config: HeadConfig, sync: bool = True) -> nn.Sequential:
    """SimSiam's predictor, a bottleneck: Linear, BN, ReLU, Linear (Chen & He 2021). The last has a bias, no BN."""
    return nn.Sequential(
        nn.Linear(config.out, config.predictor, bias=False),
        BatchNorm1d(config.predictor, sync=sync),
        nn.ReLU(inplace=True),
        nn.Linear(config.predictor, config.out),
    )


class StageHead(nn.Module):
    """A stage's map [N, C, h, w] -> its average over pixels [N, C], and projections, predictions and logits of that.

    The same heads as the encoder's own; one that the configuration leaves out gives ``None``.
    """

    def __init__(self, config: HeadConfig, channels: int, classes: int, sync: bool = True) -> None:
        super().__init__()
        self.head = projection_head(config, channels, sync) if config.layers else None
        self.predictor = prediction_head(config, sync) if config.predictor else None
        self.fc = nn.Linear(channels, classes) if classes else None

    def forward(self, stage: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        features = stage.mean((2, 3))
        projections = self.head(features) if self.head is not None else None
        predictions = self.predictor(projections) if self.predictor is not None else None
        logits = self.fc(features) if self.fc is not None else None
        return features, projections, predictions, logits
