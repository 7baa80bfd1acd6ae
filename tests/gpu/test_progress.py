"""Distances and progress of models that lie in the host's memory, computed on the GPU: a CPU's, to rounding."""

from __future__ import annotations

import pytest
import torch

from fasttrain.evaluation.progress import distances, geodesic, progress, truth, uniform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")


@pytest.mark.parametrize("classes", [5, 1000])
def test_distances_and_progress_are_those_of_a_cpu(classes):
    draw = torch.Generator().manual_seed(0)
    models = (3 * torch.randn(150, 64, classes, generator=draw)).softmax(-1).half()
    labels = torch.randint(classes, (64,), generator=draw)
    start, end = uniform(64, classes), truth(labels, classes)
    for work in (
        lambda device: distances(models, floor=2**-25, device=device),
        lambda device: progress(models, start, end, floor=2**-25, device=device),
        lambda device: geodesic(models[0].to(device), end.to(device), 0.3),
    ):
        assert torch.allclose(work(GPU).cpu(), work(torch.device("cpu")), rtol=0, atol=1e-13)
