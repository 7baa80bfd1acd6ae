"""The supervised contrastive objective, and the one-sided InfoNCE of attacks, which is its special case."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.distributed import all_gather, rank
from fasttrain.errors import UsageError
from fasttrain.models import Encoded
from fasttrain.objectives.objective import Objective, OneSided
from fasttrain_kernels.ntxent import sup_con as sup_con_rows
from fasttrain_kernels.ntxent import sup_con_against


def sup_con(temperature: float) -> Objective:
    """SupCon on the projections (Khosla et al. 2020, L_out): the mean over this rank's V·B rows.

    With s(a, b) = cos(a, b) / τ, P(i) the rows other than i with i's label and j over all rows but i, of all ranks::

        ℓ(i) = −1/|P(i)| Σ_{p in P(i)} s(i, p) + log Σ_{j ≠ i} exp s(i, j)        (0 where P(i) is empty)

    An anchor without a positive (possible with one view) counts 0 and stays in the mean. With labels all different it
    is NT-Xent. Conventions elsewhere: SupContrast multiplies by τ / 0.07, pytorch-metric-learning leaves such anchors
    out of the mean. Over ranks as in :func:`~fasttrain.objectives.nt_xent`: exact where gradients are averaged.

    Raises:
        UsageError: an encoder without a projection head.
    """

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        z, precision = projections(encoded, len(batch.labels), "sup_con")
        columns, labels = across_ranks(z), all_gather(batch.labels).flatten()
        own = rank() * z.shape[1]
        return sup_con_rows(z, batch.labels, temperature, columns, labels, own, precision=precision).mean()

    return objective


def sup_con_one_sided(temperature: float) -> OneSided:
    """SupCon with the attacked view as anchor against the fixed views of all ranks, among which the anchor is not.

    ℓ(i) = −1/|P(i)| Σ_{p in P(i)} s(i, p) + log Σ_j exp s(i, j), j over the (V−1)·W·B fixed rows, P(i) of i's label.
    """

    def against(fixed: Encoded, batch: Batch):
        return _against(fixed, len(batch.labels), temperature, batch.labels, all_gather(batch.labels).flatten())

    return against


def info_nce(temperature: float) -> OneSided:
    """InfoNCE's one side (van den Oord et al. 2018): the attacked view i against the fixed views of all ranks.

    ℓ(i) = −s(i, i⁺) + log Σ_j exp s(i, j), with s(a, b) = cos(a, b) / τ, i⁺ the same image's fixed view (for V > 2 the
    mean over its V−1 fixed views) and j over all (V−1)·W·B fixed rows, the positive among them.
    """

    def against(fixed: Encoded, batch: Batch):
        images = len(batch.labels)
        own = torch.arange(images, device=batch.labels.device) + rank() * images
        return _against(fixed, images, temperature, own, all_gather(own).flatten())

    return against


def projections(encoded: Encoded, images: int, objective: str) -> tuple[Tensor, torch.dtype]:
    """Projections [V, B, D] in at least float32, cast before any gather so that its adjoint sums in float32.

    And the dtype that they were computed in: autocast's, where it is on.
    """
    if encoded.projections is None:
        raise UsageError(f"{objective} needs projections and the encoder has no head: set model.head.layers=2")
    z = encoded.projections.unflatten(0, (-1, images))
    return z.to(torch.promote_types(z.dtype, torch.float32)), z.dtype


def across_ranks(z: Tensor) -> Tensor:
    """[V, B, D] of each rank -> [V, W·B, D] of all; z itself where there is one rank."""
    gathered = all_gather(z)
    return z if len(gathered) == 1 else gathered.transpose(0, 1).flatten(1, 2)


def _against(fixed: Encoded, images: int, temperature: float, labels: Tensor, column_labels: Tensor):
    rows, precision = projections(fixed, images, "this attack")
    losses = sup_con_against(labels, temperature, across_ranks(rows.detach()), column_labels, precision=precision)
    return lambda attacked: losses(projections(attacked, images, "this attack")[0]).squeeze(0)
