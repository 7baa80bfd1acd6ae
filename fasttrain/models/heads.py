"""Projection heads."""

from __future__ import annotations

from typing import Literal

import pydantic
from torch import nn

from fasttrain.config import Config
from fasttrain.models.batchnorm import BatchNorm1d


class HeadConfig(Config):
    layers: Literal[0, 2, 3] = 2
    """Linear layers of the projection head: 2 (SimCLR), 3 (SimCLRv2), 0 for none."""
    width: int | None = pydantic.Field(default=None, ge=1)
    """Hidden width; null: the encoder's feature width."""
    out: int = pydantic.Field(default=128, ge=2)
    """Dimensions of the projection."""


def projection_head(config: HeadConfig, features: int, sync: bool = True) -> nn.Sequential:
    """SimCLR's head: (Linear, BN, ReLU) × (layers − 1), Linear, BN.

    As in Google's code, no Linear has a bias (BN would undo it) and the last BN has a gain but no bias.
    """
    width = config.width or features
    layers: list[nn.Module] = []
    for inputs in [features] + [width] * (config.layers - 2):
        layers += [nn.Linear(inputs, width, bias=False), BatchNorm1d(width, sync=sync), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *layers, nn.Linear(width, config.out, bias=False), BatchNorm1d(config.out, sync=sync, bias=False)
    )
