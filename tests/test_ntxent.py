"""NT-Xent against a double loop, finite differences, float64, and one process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fasttrain import distributed, objectives
from fasttrain.config import resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded
from fasttrain_kernels.ntxent import nt_xent, sup_con, sup_con_against
from tests.ranks import run_ranks


def _double_loop(z: np.ndarray, temperature: float) -> np.ndarray:
    """[V, N] losses by the definition, a pair at a time."""
    views, n, _ = z.shape
    rows = [(view, image) for view in range(views) for image in range(n)]
    losses = np.zeros((views, n))
    for i in rows:
        similarity = {
            j: float(np.dot(z[i], z[j]) / np.linalg.norm(z[i]) / np.linalg.norm(z[j]) / temperature)
            for j in rows
            if j != i
        }
        top = max(similarity.values())
        log_sum = top + math.log(sum(math.exp(s - top) for s in similarity.values()))
        positives = [s for j, s in similarity.items() if j[1] == i[1]]
        losses[i] = log_sum - sum(positives) / len(positives)
    return losses


def _random(*shape: int, dtype: torch.dtype = torch.double, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 7, 5), (2, 16, 33), (3, 5, 4)])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 7.0])
def test_equals_a_double_loop(shape: tuple[int, int, int], temperature: float) -> None:
    z = _random(*shape)
    expected = torch.from_numpy(_double_loop(z.numpy(), temperature))
    torch.testing.assert_close(nt_xent(z, temperature), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nt_xent(z.float(), temperature), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("views", [2, 3])
def test_rows_are_a_part_of_the_columns(views: int) -> None:
    columns = _random(views, 9, 5)
    everything = nt_xent(columns, 0.2)
    for offset, n in ((0, 4), (4, 3), (7, 2)):
        losses = nt_xent(columns[:, offset : offset + n].clone(), 0.2, columns, offset)
        torch.testing.assert_close(losses, everything[:, offset : offset + n], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("views", [2, 3])
def test_first_and_second_derivatives(views: int) -> None:
    z, columns = _random(views, 2, 3).requires_grad_(), _random(views, 4, 3, seed=1).requires_grad_()
    weights = torch.rand(views, 2, generator=torch.Generator().manual_seed(2), dtype=torch.double) + 0.5
    for function, inputs in (
        (lambda z: nt_xent(z, 0.3) * weights, (z,)),
        (lambda z, columns: nt_xent(z, 0.3, columns, 1) * weights, (z, columns)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_under_autocast(dtype: torch.dtype) -> None:
    z = _random(2, 32, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = nt_xent(z, 0.05)
    assert losses.dtype == torch.float32
    (gradient,) = torch.autograd.grad(losses.mean(), z)
    exact = z.detach().double().requires_grad_()
    expected = nt_xent(exact, 0.05)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), exact)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]


def test_stable_at_temperature_one_hundredth_with_duplicates() -> None:
    z = _random(1, 8, 16, dtype=torch.float32).repeat(2, 1, 1)  # both views equal: the positive is the maximum
    z[:, 1] = z[:, 0] * (1 + 1e-6)  # and two images all but equal
    z[:, 2] = -z[:, 0]
    z.requires_grad_()
    losses = nt_xent(z, 0.01)
    expected = torch.from_numpy(_double_loop(z.detach().double().numpy(), 0.01))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    assert gradient.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_any_length_of_row(scale: float) -> None:
    z = _random(2, 6, 8, dtype=torch.float32)
    torch.testing.assert_close(nt_xent(z * scale, 0.1), nt_xent(z, 0.1), rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_counts_as_orthogonal_and_gets_no_gradient() -> None:
    z = _random(2, 4, 5)
    z[0, 1] = 0
    z.requires_grad_()
    losses = nt_xent(z, 0.5)
    assert losses[0, 1].item() == pytest.approx(math.log(7))  # seven others, all at similarity 0
    (gradient,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), z)
    assert gradient[0, 1].abs().max() == 0
    assert gradient.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_random(2, 3, 4), 0.0), "temperature=0.0"),
        ((_random(2, 3, 4), -1.0), "temperature=-1.0"),
        ((_random(2, 3, 4), math.nan), "temperature=nan"),
        ((_random(1, 3, 4), 0.1), "at least 2 views"),
        ((_random(6, 4), 0.1), r"\[6, 4\]"),
        ((_random(2, 3, 4), 0.1, _random(2, 9, 5)), r"\[2, 9, 5\]"),
        ((_random(2, 3, 4), 0.1, _random(2, 9, 4), 7), "offset=7"),
        ((_random(2, 3, 4), 0.1, None, 0, "fast"), "impl='fast'"),
        ((_random(2, 3, 4), 0.1, None, 0, "auto", torch.int8), r"precision=torch\.int8: give a floating-point dtype"),
    ],
)
def test_mistakes_name_the_value(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(*arguments)


def _encoded(projections: torch.Tensor | None) -> Encoded:
    return Encoded(torch.empty(0), (), torch.empty(0), projections, None)


def _batch(images: int) -> Batch:
    return Batch(torch.empty(0), torch.zeros(images, dtype=torch.long), torch.arange(images))


def _network(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ weight) * x.square().sum(-1, keepdim=True)


def _penalised(x: torch.Tensor, weight: torch.Tensor, world: int) -> torch.Tensor:
    """Loss of rows x [V·B, 6] plus the squared gradient with respect to x of the mean loss over all ranks."""
    loss = objectives.nt_xent(0.2)(_encoded(_network(x, weight)), _batch(len(x) // 2))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + world * 0.5 * (gradient / world).square().sum()


def _on_ranks(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    rank, world = distributed.rank(), distributed.world_size()
    mine = x.chunk(world, dim=1)[rank].flatten(0, 1).requires_grad_()  # of [V, B, 6]
    weight = weight.clone().requires_grad_()
    loss = objectives.nt_xent(0.2)(_encoded(_network(mine, weight)), _batch(len(mine) // 2))
    (plain,) = torch.autograd.grad(loss, weight)
    (penalised,) = torch.autograd.grad(_penalised(mine, weight, world), weight)
    return [distributed.all_reduce(value.detach()) / world for value in (loss, plain, penalised)]


def test_two_ranks_equal_one_through_second_derivatives() -> None:
    x, weight = _random(2, 6, 6), _random(6, 5, seed=1)
    for ranks, one in zip(run_ranks(2, _on_ranks, x, weight), [_on_ranks(x, weight)] * 2, strict=True):
        for ours, expected in zip(ranks, one, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_objective_is_the_mean_over_view_major_rows() -> None:
    z = _random(2, 5, 4)
    loss = objectives.nt_xent(0.4)(_encoded(z.flatten(0, 1)), _batch(5))
    assert loss.item() == pytest.approx(_double_loop(z.numpy(), 0.4).mean())


def test_objective_refuses_what_it_cannot_use() -> None:
    with pytest.raises(UsageError, match=r"head\.layers"):
        objectives.nt_xent(0.1)(_encoded(None), _batch(2))
    with pytest.raises(UsageError, match=r"temperature=-0\.1"):
        resolve(objectives.NTXentConfig, {"temperature": -0.1})


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_sup_con_against_fixed_columns_is_sup_con(impl):
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(2, 9, 5, generator=generator, dtype=torch.double)
    labels, column_labels = torch.tensor([3, 0, 3, 7]), torch.tensor([0, 7, 3, 3, 1, 0, 7, 5, 3])
    losses = sup_con_against(labels, 0.3, columns, column_labels, impl)
    for _ in range(2):
        z = torch.randn(1, 4, 5, generator=generator, dtype=torch.double, requires_grad=True)
        expected, found = sup_con(z, labels, 0.3, columns, column_labels, None, impl), losses(z)
        assert torch.allclose(found, expected, rtol=1e-13, atol=0)
        truth, ours = (torch.autograd.grad(loss.sum(), z)[0] for loss in (expected, found))
        assert torch.allclose(ours, truth, rtol=1e-11, atol=1e-14)
    with pytest.raises(ValueError, match="temperature=0"):
        sup_con_against(labels, 0.0, columns, column_labels)
