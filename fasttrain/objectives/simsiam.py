"""SimSiam: positive pairs alone, a predictor and a stop-gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded
from fasttrain.objectives.objective import Objective, OneSided, Traits, with_traits
from fasttrain.objectives.sup_con import projections
from fasttrain_kernels.ntxent.reference import unit_rows


def simsiam() -> Objective:
    """SimSiam (Chen & He 2021), a loss an image [B], between −1 and 1::

        ℓ = −½ cos(p₁, sg z₂) − ½ cos(p₂, sg z₁)

    with z the projections, p the predictor's predictions and sg the stop-gradient; for V views the mean over the
    ordered pairs of views, −1/(V(V−1)) Σ_{a≠b} cos(p_a, sg z_b). The loss is the mean over images. Some papers leave
    out the ½. A gradient of this loss, and a penalty on it, holds z fixed wherever sg stands.

    Raises:
        UsageError: an encoder without a predictor, a batch of one view.
    """

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        images = len(batch.labels)
        p, z = _directions(_predictions(encoded), images), _targets(encoded, images)
        views = len(p)
        if views < 2:
            raise UsageError("simsiam compares views of an image and the batch has 1: use the two-view augmentation")
        return -(p * (z.sum(0) - z)).sum((0, 2)) / (views * (views - 1))

    return with_traits(objective, Traits(stops_gradients=True))


def simsiam_one_sided() -> OneSided:
    """−cos(p, sg z) of the attacked view's prediction and the fixed view's projection [B] (their mean for V > 2).

    The symmetric loss's other half, −cos(p_fixed, sg z), gives the attacked view no gradient.
    """

    def against(fixed: Encoded, batch: Batch):
        images = len(batch.labels)
        target = _targets(fixed, images).mean(0)
        return lambda attacked: -(_directions(_predictions(attacked), images) * target).sum((0, 2))

    return against


def _predictions(encoded: Encoded) -> Tensor:
    if encoded.predictions is None:
        raise UsageError("simsiam needs a predictor and the encoder has none: set model.head.predictor=512")
    return encoded.predictions


def _targets(encoded: Encoded, images: int) -> Tensor:
    return unit_rows(projections(encoded, images, "simsiam")[0].detach())


def _directions(rows: Tensor, images: int) -> Tensor:
    """Unit rows [V, B, D] in at least float32."""
    return unit_rows(rows.unflatten(0, (-1, images)).to(torch.promote_types(rows.dtype, torch.float32)))
