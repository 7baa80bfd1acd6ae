"""Supervised classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded
from fasttrain.objectives.objective import Objective, OneSided


def cross_entropy() -> Objective:
    """Cross-entropy of the logits, a loss a row [V·B]: ℓ(i) = log Σ_c exp a_ic − a_iy, every view with its label.

    Computed in float32 (float64 for float64 logits). The mean over rows, then ranks, is that of the global batch.

    Raises:
        UsageError: an encoder without a classifier.
    """

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        return _losses(encoded, batch.labels)

    return objective


def cross_entropy_one_sided() -> OneSided:
    """The attacked view's cross-entropy [B]; the other views play no part in it."""

    def against(fixed: Encoded, batch: Batch):
        return lambda attacked: _losses(attacked, batch.labels)

    return against


def _losses(encoded: Encoded, labels: Tensor) -> Tensor:
    if encoded.logits is None:
        raise UsageError("cross_entropy needs logits and the encoder has no classifier: set model.classes")
    logits = encoded.logits.to(torch.promote_types(encoded.logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.repeat(len(logits) // len(labels)), reduction="none")
