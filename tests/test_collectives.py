"""The collectives: values, and derivatives of first and second order against one process."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from fasttrain import distributed
from fasttrain.errors import UsageError
from tests.ranks import run_ranks


def _parts(world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator, dtype=torch.double) for _ in range(world)]


def _scalar(parts: torch.Tensor, rank: int) -> torch.Tensor:
    """A loss [world, 3, 4] -> scalar that mixes the ranks and is not the same on two of them."""
    return (parts.sum(0).sin() * parts[rank].exp()).sum() + (parts[0] * parts[-1]).pow(3).mean() * (rank + 1)


def _second_order() -> dict[str, list[torch.Tensor]]:
    rank, world = distributed.rank(), distributed.world_size()
    found = {}
    for collective in ("all_gather", "all_reduce"):
        x = _parts(world)[rank].requires_grad_()
        if collective == "all_gather":
            loss = _scalar(distributed.all_gather(x), rank)
        else:
            loss = (distributed.all_reduce(x.sin()) * x.exp()).sum() * (rank + 1)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(3).sum(), x)
        found[collective] = [loss.detach(), gradient.detach(), second]
    return found


def test_derivatives_equal_one_process() -> None:
    world = 3
    x = torch.stack(_parts(world)).requires_grad_()
    weights = torch.arange(1, world + 1, dtype=torch.double).view(-1, 1, 1)
    losses = {
        "all_gather": torch.stack([_scalar(x, rank) for rank in range(world)]),
        "all_reduce": (x.sin().sum(0) * x.exp() * weights).sum((1, 2)),
    }
    ranks = run_ranks(world, _second_order)
    for collective, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)  # a rank's gradient is that of the sum
        (second,) = torch.autograd.grad(gradient.pow(3).sum(), x)
        for rank, found in enumerate(ranks):
            for ours, one_process in zip(found[collective], (loss, gradient, second), strict=True):
                torch.testing.assert_close(ours, one_process[rank].detach(), rtol=1e-12, atol=1e-12)


def test_without_a_group_there_is_one_rank() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(distributed.all_gather(x), x[None])
    assert torch.equal(distributed.all_reduce(x), x)


def _agreements() -> tuple[str, int, list[int]]:
    def work() -> None:
        if distributed.rank() == 1:
            raise UsageError("no room on the disk")

    with pytest.raises(UsageError) as caught:
        distributed.agree(work)
    ranks = distributed.all_gather_object(distributed.rank())
    return str(caught.value), distributed.on_rank_zero(lambda: 7 + distributed.rank()), ranks


def test_ranks_agree() -> None:
    for message, from_rank_zero, ranks in run_ranks(2, _agreements):
        assert message.endswith("no room on the disk")
        assert from_rank_zero == 7
        assert ranks == [0, 1]


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("seven")
    dist.barrier()


def _hang() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_the_helper_reports_failures_and_hangs() -> None:
    with pytest.raises(RuntimeError, match="ArithmeticError: seven"):
        run_ranks(2, _fail_on_one)
    with pytest.raises(TimeoutError, match="no answer from ranks"):
        run_ranks(2, _hang, timeout=5)
