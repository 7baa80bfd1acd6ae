"""Objectives: pure functions (encoded views, batch) -> a scalar, or one loss an image."""

from collections.abc import Callable

from torch import Tensor

from fasttrain.data import Batch
from fasttrain.models import Encoded
from fasttrain.objectives.nt_xent import NTXentConfig, nt_xent

Objective = Callable[[Encoded, Batch], Tensor]

__all__ = ["NTXentConfig", "Objective", "nt_xent"]
