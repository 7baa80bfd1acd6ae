"""The SimCLR objective."""

from __future__ import annotations

import pydantic
import torch

from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.distributed import rank
from fasttrain.models import Encoded
from fasttrain.objectives.objective import Objective
from fasttrain.objectives.sup_con import across_ranks, projections
from fasttrain_kernels import ntxent


class NTXentConfig(Config):
    temperature: float = pydantic.Field(default=0.1, gt=0)
    """Temperature of NT-Xent: SimCLR uses 0.1 on ImageNet, 0.5 on CIFAR-10."""


def nt_xent(temperature: float, impl: ntxent.Implementation = "auto") -> Objective:
    """NT-Xent on the projections (Chen et al. 2020): the mean over this rank's V·B rows, against those of all ranks.

    A row's own similarity is left out of its denominator, which holds the V·W·B − 1 others of the *global* batch (W
    ranks of B images each, B equal on all). With V = 2 it is SimCLR's loss; Google's code reports twice this mean.

    Gradients are exact for the global mean L = (1/W) Σ_r L_r where the gradients of the ranks are averaged, as
    DeepSpeed does: the gather's adjoint brings home what the other ranks' losses say of this rank's projections, so
    rank r holds ∂(Σ_s L_s)/∂θ through its own images, and the average over ranks is ∂L/∂θ.

    Raises:
        UsageError: an encoder without a projection head.
    """

    def objective(encoded: Encoded, batch: Batch) -> torch.Tensor:
        z, precision = projections(encoded, len(batch.labels), "nt_xent")
        return ntxent.nt_xent(z, temperature, across_ranks(z), rank() * z.shape[1], impl, precision).mean()

    return objective
