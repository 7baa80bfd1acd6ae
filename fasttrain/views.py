"""Views: what of a batch an objective gets to see."""

from __future__ import annotations

from collections.abc import Callable

from fasttrain.data import Batch
from fasttrain.models import Encoder

View = Callable[[Encoder, Batch], Batch]


def clean(encoder: Encoder, batch: Batch) -> Batch:
    """The batch as the loader made it."""
    return batch
