"""Per-image losses [B] for an attacker to raise; float32 under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.errors import UsageError


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits [B, C])_label."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{i ≠ y} z_i − z_y of logits z [B, C]: positive exactly where the image is misclassified."""
    logits = _wide(logits)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - _of(logits, labels)


def lead(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """z_t − z_y of logits z [B, C] and target classes t [B]."""
    logits = _wide(logits)
    return _of(logits, targets) - _of(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020), −(z_y − max_{i ≠ y} z_i) / (z_π1 − z_π3), π sorting downwards.

    It is positive exactly where the image is misclassified, at most 1, and does not depend on the logits' scale.

    Raises:
        UsageError: fewer than 3 classes.
    """
    top = _sorted(logits, 3)
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """−(z_y − z_t) / (z_π1 − ½ (z_π3 + z_π4)) for target classes t [B] (Croce & Hein 2020).

    Raises:
        UsageError: fewer than 4 classes.
    """
    top = _sorted(logits, 4)
    return lead(logits, labels, targets) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def squared_distance(embeddings: Tensor, references: Tensor) -> Tensor:
    """‖φ(z) − φ_org(x)‖² of embeddings [B, D], summed over the dimensions (FARE; Schlarmann et al. 2024).

    Where model and reference agree, its gradient at the clean image is 0: start at a random point.
    """
    return (_wide(embeddings) - _wide(references)).square().sum(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _sorted(logits: Tensor, count: int) -> Tensor:
    """The ``count`` highest logits of each image, highest first."""
    if logits.shape[1] < count:
        raise UsageError(f"this DLR loss needs {count} classes and the model has {logits.shape[1]}: use cross-entropy")
    return _wide(logits).topk(count).values


__all__ = ["cross_entropy", "dlr", "dlr_targeted", "lead", "margin", "squared_distance"]
