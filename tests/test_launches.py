"""What a step launches on a GPU is counted and held down: below some 10 µs of work a launch, the host sets the pace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttrain.data import Batch
from fasttrain.models import BatchNorm2d, Encoder, HeadConfig, ModelConfig
from fasttrain.objectives import gradient_penalty, nt_xent
from fasttrain.step import Term, TrainStep
from fasttrain_kernels.batchnorm import batch_norm
from tests.launches import Watch, as_on_a_gpu

passes = pytest.importorskip("fasttrain_kernels.batchnorm.triton")


def images(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("residual", [None, images(4, 16, 5, 5)])
@pytest.mark.parametrize(("total", "launches"), [(None, 3), (torch.clone, 5)])
def test_launches_of_batchnorm(total, launches: int, residual: Tensor | None) -> None:
    """A pass sums, joins and goes through; across ranks a kernel and the sum, here a copy, come before the second."""
    x, weight, bias, upstream = images(4, 16, 5, 5), torch.randn(16), torch.randn(16), images(4, 16, 5, 5)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    counted = []
    with as_on_a_gpu() as watch:
        y = batch_norm(*inputs, residual, relu=True, total=total)[0]
        counted.append(watch.total)
        first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
        counted.append(watch.total)
        torch.autograd.grad(first, inputs[:2], [t.detach() for t in first])
        counted.append(watch.total)
    assert counted == [launches, 2 * launches, 3 * launches] and not watch.waits, watch.launches


@pytest.mark.parametrize(
    ("rows", "channels", "least"),
    [(1024 * 32**2, 64, 900), (1024 * 4**2, 512, 900), (256 * 7**2, 2048, 900), (512, 2048, 512), (9, 8, 1), (0, 8, 0)],
)
def test_a_sum_is_split_over_a_whole_gpu(rows: int, channels: int, least: int) -> None:
    """ResNet-18's first and last stage, ResNet-50's last, a head; every tile of rows is in one stretch."""
    grids = []

    def launch(grid: tuple[int, int], sums: Tensor, rows: int, columns: int, stretch: int, *tile: int) -> None:
        grids.append(grid[0] * grid[1])
        assert (grid[0] - 1) * stretch * tile[0] < rows <= grid[0] * stretch * tile[0]
        assert (grid[1] - 1) * tile[1] < columns <= grid[1] * tile[1]

    passes._summed(2, torch.empty(rows, channels, device="meta"), launch)
    assert least <= sum(grids) <= 1024


@pytest.mark.parametrize(("momentum", "launches"), [(0.1, 3), (None, 4)])
def test_running_statistics_cost_no_launch_and_no_wait(momentum: float | None, launches: int) -> None:
    norm, x = BatchNorm2d(16, momentum=momentum), images(4, 16, 5, 5)
    with as_on_a_gpu() as watch:
        norm(x)
    assert watch.total == launches and not watch.waits, watch


def step(penalty: bool) -> Watch:
    """One of a ResNet-18 in bfloat16, forward and backward."""
    torch.manual_seed(0)
    config = ModelConfig(arch="resnet18", stem="cifar", width=0.125, head=HeadConfig(out=16))
    encoder = Encoder(config).to(memory_format=torch.channels_last)
    objective = gradient_penalty(nt_xent(0.5), 0.1) if penalty else nt_xent(0.5)
    module = TrainStep(encoder, [Term("loss", objective)])
    pixels = torch.rand(2, 4, 16, 16, 3).permute(0, 1, 4, 2, 3)
    batch = Batch(pixels, torch.zeros(4, dtype=torch.long), torch.arange(4))
    with as_on_a_gpu() as watch:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = module(batch)
        loss.backward()
    return watch


@pytest.mark.parametrize(("penalty", "most"), [(False, 350), (True, 750)])
def test_launches_of_a_resnet18_s_step(penalty: bool, most: int) -> None:
    watch = step(penalty)
    assert watch.total <= most and not watch.waits, (watch.total, watch.launches, watch.waits)
