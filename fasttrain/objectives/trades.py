"""TRADES: classify the clean image, and let the attacked one be classified like it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded
from fasttrain.objectives.objective import Objective, OneSided, Traits, with_traits


def trades(beta: float = 6.0) -> Objective:
    """A loss an image [B], of the clean images x and the attacked ones x', the views of a batch in this order::

        ℓ = CE(f(x), y) + β KL(f(x) ‖ f(x')),   KL(p ‖ q) = Σ_c p_c log(p_c / q_c)

    with f the softmax of the logits (Zhang et al. 2019, eq. 5, β = 1/λ). The gradient goes through both of KL's
    arguments, as in the authors' code, and x' is a constant. In training mode x and x' are encoded apart, each with
    BatchNorm statistics of its own, and each counts into the running ones, x' last: so does the code of ACL and DynACL;
    the authors' own encodes x once more, after x'. Computed in float32 (float64 for float64 logits).

    Raises:
        UsageError: an encoder without a classifier; a batch that is not of two views.
    """

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        log_probabilities = _log_probabilities(encoded)
        if len(log_probabilities) != 2 * len(batch.labels):
            raise UsageError(
                f"trades compares an image with its attacked self and the batch has {len(batch.images)} view(s), not "
                "those two: set view.kind=attack"
            )
        clean, attacked = log_probabilities.chunk(2)
        return F.nll_loss(clean, batch.labels, reduction="none") + beta * _divergence(clean, attacked)

    return with_traits(objective, Traits(passes=2))


def trades_one_sided() -> OneSided:
    """KL(f(x) ‖ f(x')) [B] of the fixed view x and the attacked x'. At x' = x its gradient is 0: start at random.

    Published attacks on it start a thousandth beside x, and some at x, where rounding leads the way.
    """

    def against(fixed: Encoded, batch: Batch):
        clean = _log_probabilities(fixed)
        return lambda attacked: _divergence(clean, _log_probabilities(attacked))

    return against


def _log_probabilities(encoded: Encoded) -> Tensor:
    if encoded.logits is None:
        raise UsageError("trades needs logits and the encoder has no classifier: set model.classes")
    return encoded.logits.to(torch.promote_types(encoded.logits.dtype, torch.float32)).log_softmax(1)


def _divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL [B] of log-probabilities [B, C]."""
    return (clean.exp() * (clean - attacked)).sum(1)
