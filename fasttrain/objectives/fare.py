"""FARE: fine-tuning that keeps the embedding of an attacked image where the clean one was."""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded, Encoder
from fasttrain.models.reference import frozen_copy
from fasttrain.objectives.objective import Objective, OneSided


class FareConfig(Config):
    alpha: float = pydantic.Field(default=0.1, ge=0)
    """Weight of the clean images' term; 0 (FARE as published): it is reported, and trains nothing."""
    against: Literal["distance", "cross_entropy"] = "distance"
    """What the attack raises: the embedding distance, or the cross-entropy of a linear classifier on the features."""
    batchnorm: Literal["eval", "train"] = "eval"
    """Of the encoder that trains: eval (running statistics, constant, as in the reference) or train (each batch's)."""


class Reference(nn.Module):
    """Batch -> the batch with ``targets`` φ_org(x) [V·B, F], one forward: ``prepare`` of a :class:`TrainStep`.

    φ_org is a copy of ``encoder`` as it is now, always in evaluation mode, never trained, saved with the run; so is the
    classifier, a linear one on its features, if there is one.
    """

    def __init__(self, encoder: Encoder, classifier: nn.Linear | None = None) -> None:
        super().__init__()
        self.encoder = frozen_copy(encoder)
        self.classifier = classifier.requires_grad_(False) if classifier is not None else None

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        # not folded: in low precision the clean term would then begin at the rounding between two forms of one network
        return batch._replace(targets=self.encoder(batch.images.flatten(0, 1)).features)


def fare() -> Objective:
    """‖φ(x) − φ_org(x₀)‖², a loss an image [V·B], summed over the F features, not averaged.

    φ(x) are the features of the images that the term's view shows, φ_org(x₀) the batch's ``targets``. On the
    adversarial and on the clean view, weighed 1 and α, it is the fine-tuning loss::

        L = mean_i ‖φ(zᵢ) − φ_org(xᵢ)‖² + α mean_i ‖φ(xᵢ) − φ_org(xᵢ)‖²

    Without the second term it is FARE (Schlarmann et al., ICML 2024). Computed in float32 (float64 for float64
    features). Others average over the features too, which divides loss and gradient by F, or weigh the terms 1 − α, α.

    Raises:
        UsageError: a batch without targets.
    """
    return lambda encoded, batch: _distances(encoded, batch)


def fare_one_sided() -> OneSided:
    """The same distance, for an attack to raise; clean and attacked embeddings agree at first, so start at random."""
    return lambda fixed, batch: lambda attacked: _distances(attacked, batch)


def surrogate_one_sided(classifier: nn.Module) -> OneSided:
    """Cross-entropy of ``classifier`` (features [B, F] -> logits [B, C]), for an attack to raise.

    A weaker attack than the distance (by 35 % of the final distance, on one network), and one that needs labels.
    """

    def against(fixed: Encoded | None, batch: Batch):
        return lambda attacked: F.cross_entropy(_wide(classifier(attacked.features)), batch.labels, reduction="none")

    return against


def _distances(encoded: Encoded, batch: Batch) -> Tensor:
    if batch.targets is None:
        raise UsageError("fare compares with a reference encoder and the batch has no targets: run launch/finetune.py")
    return (_wide(encoded.features) - _wide(batch.targets)).square().sum(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
