"""The SimCLR objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pydantic
import torch
from fasttrain_kernels import ntxent

from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.distributed import all_gather, rank
from fasttrain.errors import UsageError
from fasttrain.models import Encoded

if TYPE_CHECKING:
    from fasttrain.objectives import Objective


class NTXentConfig(Config):
    temperature: float = pydantic.Field(default=0.1, gt=0, allow_inf_nan=False)
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
        if encoded.projections is None:
            raise UsageError("NT-Xent needs projections and the encoder has no head: set model.head.layers=2")
        z = encoded.projections.unflatten(0, (-1, len(batch.labels)))  # [V, B, D]
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # before the gather, so that its adjoint sums in float32
        gathered = all_gather(z)  # [W, V, B, D]
        if len(gathered) == 1:
            return ntxent.nt_xent(z, temperature, impl=impl).mean()
        columns = gathered.transpose(0, 1).flatten(1, 2)  # [V, W B, D]
        return ntxent.nt_xent(z, temperature, columns, rank() * z.shape[1], impl).mean()

    return objective
