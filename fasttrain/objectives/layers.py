"""An objective on every stage of the encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded
from fasttrain.objectives.objective import Objective, traits, with_traits


def layer_by_layer(of: Objective, alpha: Sequence[float]) -> Objective:
    """Σ_k α_k L_k over the encoder's 4 stages (Campbell et al. 2020, eq. 4), L_k the objective at stage k.

    Each stage has its own head on its globally averaged map (``model.layer_heads=true``); the fourth is the encoder's
    own. The paper would have α grow with k. A stage with α_k = 0 costs nothing.

    Raises:
        UsageError: an encoder without heads on its stages; no stage with a weight; an objective with a penalty.
    """
    if traits(of).image_gradient:
        raise UsageError("a penalty on every layer is layer_by_layer_penalty, not layer_by_layer of a penalty")
    if not any(alpha):
        raise UsageError("layers.alpha is all 0: give at least one stage a weight")

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        return sum(a * at_layer(of, k)(encoded, batch) for k, a in enumerate(alpha) if a)

    return with_traits(objective, traits(of))


def at_layer(of: Objective, k: int) -> Objective:
    """``of`` on the head of stage ``k`` (0 to 3)."""

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        if not encoded.layers:
            raise UsageError("layer-by-layer losses need a head on every stage: set model.layer_heads=true")
        return of(encoded.layers[k], batch)

    return objective
