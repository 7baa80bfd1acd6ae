"""Encoders that do not follow their holder: into training mode, or at all."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from fasttrain.models import Encoder

M = TypeVar("M", bound=nn.Module)


def keep_in_evaluation(module: M) -> M:
    """``module`` in evaluation mode for good: a ``train()`` of what holds it does not reach it.

    Of an encoder its BatchNorms then use their running statistics and leave them as they are; their gains and biases
    train like any weight.
    """
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    return module


def frozen_copy(encoder: Encoder) -> Encoder:
    """φ_org: a copy that stays as the encoder is now, in evaluation mode, without gradients."""
    return keep_in_evaluation(copy.deepcopy(encoder).requires_grad_(False))


def freeze_backbone(encoder: Encoder) -> None:
    """Let the heads of ``encoder`` alone train, its classifier ``backbone.fc`` among them.

    Everything else of the backbone gets no gradient, so that no optimiser moves or decays it, and its BatchNorms use
    their running statistics and leave them as they are, in training mode too.
    """
    keep_in_evaluation(encoder.backbone).requires_grad_(False)
    if encoder.config.classes:
        encoder.backbone.fc.requires_grad_()


__all__ = ["freeze_backbone", "frozen_copy", "keep_in_evaluation"]
