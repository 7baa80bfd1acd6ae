"""Objectives against pytorch-metric-learning's, an independent implementation (extra ``bench``)."""

from __future__ import annotations

import pytest
import torch

from fasttrain.data import Batch
from fasttrain.models import Encoded
from fasttrain.objectives import nt_xent, sup_con

losses = pytest.importorskip("pytorch_metric_learning.losses", reason="needs pip install -e '.[bench]'")


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("name", ["nt_xent", "sup_con"])
def test_loss_and_gradient_are_the_librarys(name, temperature):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2 * 12, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (12,), generator=generator)
    batch = Batch(torch.zeros(2, 12, 3, 1, 1), labels, torch.arange(12))

    def ours(z):
        objective = nt_xent(temperature) if name == "nt_xent" else sup_con(temperature)
        return objective(Encoded(batch.images.flatten(0, 1), (), z, z, None), batch)

    def theirs(z):
        library = losses.NTXentLoss(temperature) if name == "nt_xent" else losses.SupConLoss(temperature)
        return library(z, (batch.index if name == "nt_xent" else labels).repeat(2))

    gradients = []
    for loss in (ours, theirs):
        leaf = z.clone().requires_grad_()
        value = loss(leaf)
        gradients.append(torch.autograd.grad(3 * value, leaf)[0])
    torch.testing.assert_close(ours(z), theirs(z), rtol=1e-7, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
