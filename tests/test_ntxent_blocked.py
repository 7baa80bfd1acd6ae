"""The CPU's blocked passes of NT-Xent and SupCon through second derivatives, against a whole matrix in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain_kernels.ntxent import blocked, nt_xent, sup_con


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def naive(
    z: Tensor, labels: Tensor, temperature: float, columns: Tensor, column_labels: Tensor, offset: int | None = 0
) -> Tensor:
    """L_out [A, n] by masks over the matrix of all similarities, in z's dtype; with the image as label NT-Xent."""
    rows, others = (x.flatten(0, 1) / x.flatten(0, 1).norm(dim=1, keepdim=True) for x in (z, columns))
    logits = rows @ others.T / temperature
    itself = torch.zeros_like(logits, dtype=torch.bool)
    if offset is not None:
        for view in range(len(z)):
            for image in range(len(labels)):
                itself[view * len(labels) + image, view * len(column_labels) + offset + image] = True
    positive = (labels.repeat(len(z))[:, None] == column_labels.repeat(len(columns))) & ~itself
    log_sum = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    losses = log_sum - (logits * positive).sum(1) / positive.sum(1).clamp(min=1)
    return losses.masked_fill(~positive.any(1), 0).view(len(z), -1)


def naive_nt_xent(z: Tensor, temperature: float, columns: Tensor | None = None, offset: int = 0) -> Tensor:
    columns = z if columns is None else columns
    images = torch.arange(columns.shape[1])
    return naive(z, images[offset : offset + z.shape[1]], temperature, columns, images, offset)


def derivatives(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Losses, gradients of a weighted sum of them, and the Hessian's product with given vectors."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    losses = loss(*inputs)
    weights = random(*losses.shape, seed=10).abs().add(0.1).to(losses.dtype)
    gradients = torch.autograd.grad((losses * weights).sum(), inputs, create_graph=True)
    vectors = [random(*x.shape, seed=11 + k).to(x.dtype) for k, x in enumerate(inputs)]
    along = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    return [losses.detach(), *(g.detach() for g in gradients), *torch.autograd.grad(along, inputs)]


def errors(ours: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative, in the Euclidean norm."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)]


@pytest.fixture(params=[(64, 48), (blocked.TILE, blocked.SECOND_TILE)], ids=["small tiles", "tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles meet every border with few rows; the real sizes are met too."""
    monkeypatch.setattr(blocked, "TILE", request.param[0])
    monkeypatch.setattr(blocked, "SECOND_TILE", request.param[1])


SHAPES = [(2, 2, 16), (2, 77, 33), (3, 64, 20), (2, 65, 257), (2, 600, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 2.0])
def test_nt_xent_through_second_derivatives(tile: None, shape: tuple[int, int, int], temperature: float) -> None:
    z = random(*shape) * torch.logspace(-3, 3, shape[1], dtype=torch.double)[:, None]
    truth = derivatives(lambda z: naive_nt_xent(z, temperature), z)
    for dtype, bound in ((torch.double, 1e-10), (torch.float, 1e-5)):
        # float32's own rounding of z is not the kernel's, and at a temperature of 0.01 it is amplified
        rounded = (
            truth if dtype == torch.double else derivatives(lambda z: naive_nt_xent(z, temperature), z.float().double())
        )
        ours = derivatives(lambda z: nt_xent(z, temperature, impl="blocked"), z.to(dtype))
        assert max(errors(ours, rounded)) < bound
        assert ours[0].dtype == ours[1].dtype == dtype


@pytest.mark.parametrize("offset", [0, 11, 60])
def test_rows_among_more_columns(tile: None, offset: int) -> None:
    columns, z = random(2, 130, 24), random(2, 70, 24, seed=1)
    truth = derivatives(lambda z, c: naive_nt_xent(z, 0.1, c, offset), z, columns)
    for dtype, bound in ((torch.double, 1e-10), (torch.float, 1e-5)):
        ours = derivatives(lambda z, c: nt_xent(z, 0.1, c, offset, "blocked"), z.to(dtype), columns.to(dtype))
        assert max(errors(ours, truth)) < bound
        fixed = derivatives(lambda z: nt_xent(z, 0.1, columns.to(z.dtype), offset, "blocked"), z.to(dtype))
        assert max(errors(fixed[:2], truth[:2])) < bound


def test_the_parts_of_all_ranks_are_the_whole() -> None:
    """Each rank's rows against all columns, emulated in one process: the sum has the whole's derivatives."""
    z = random(2, 90, 20)

    def parts(z: Tensor) -> Tensor:
        bounds = (0, 31, 64, 90)
        return torch.cat([nt_xent(z[:, a:b].clone(), 0.2, z, a, "blocked") for a, b in pairwise(bounds)], dim=1)

    assert max(errors(derivatives(parts, z), derivatives(lambda z: nt_xent(z, 0.2, impl="blocked"), z))) < 1e-12


@pytest.mark.parametrize("offset", [0, 20, None])
def test_sup_con_through_second_derivatives(tile: None, offset: int | None) -> None:
    labels = torch.tensor([-3, 10**12, 7, 0, 7])[torch.arange(100) % 5].clone()
    labels[::9] = torch.arange(1000, 1012)  # some stand alone
    columns, z = random(2, 100, 20), random(2, 50, 20, seed=1)
    own = labels[offset or 0 :][:50].clone()
    if offset is None:
        own[3] = 5  # no column has it: the loss is 0
    truth = derivatives(lambda z, c: naive(z, own, 0.1, c, labels, offset), z, columns)
    for dtype, bound in ((torch.double, 1e-10), (torch.float, 1e-5)):
        for impl in ("blocked", "reference"):
            ours = derivatives(
                lambda z, c, impl=impl: sup_con(z, own, 0.1, c, labels, offset, impl), z.to(dtype), columns.to(dtype)
            )
            assert max(errors(ours, truth)) < bound
    one = derivatives(lambda c: sup_con(c, labels, 0.1, impl="blocked"), columns)
    assert max(errors(one, derivatives(lambda c: naive(c, labels, 0.1, c, labels), columns))) < 1e-10


def test_derivatives_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TILE", 3)
    monkeypatch.setattr(blocked, "SECOND_TILE", 2)
    z, columns = random(2, 2, 3).requires_grad_(), random(2, 4, 3, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 0, 2])
    for function, inputs in (
        (lambda c: nt_xent(c, 0.3, impl="blocked"), (columns,)),
        (lambda z, c: nt_xent(z, 0.3, c, 1, "blocked"), (z, columns)),
        (lambda z, c: sup_con(z, labels[1:3], 0.3, c, labels, None, "blocked"), (z, columns)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_further_from_float64_than_a_naive_version(dtype: torch.dtype) -> None:
    z = random(2, 300, 64).to(dtype)
    truth = derivatives(lambda z: naive_nt_xent(z, 0.1), z.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours = derivatives(lambda z: nt_xent(z, 0.1, impl="blocked"), z)
    for mine, theirs in zip(
        errors(ours, truth), errors(derivatives(lambda z: naive_nt_xent(z, 0.1), z), truth), strict=True
    ):
        assert mine <= theirs
    assert errors(ours, truth)[0] < 1e-5


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_near_duplicates_at_a_temperature_of_one_hundredth(impl: str) -> None:
    z = random(1, 200, 32).repeat(2, 1, 1)
    z[1] *= 1 + 1e-6 * random(200, 32, seed=1)
    z[:, 1] = z[:, 0]
    z[:, 2] = -z[:, 0]
    z = z.float()
    truth = derivatives(lambda z: naive_nt_xent(z, 0.01), z.double())
    ours = derivatives(lambda z: nt_xent(z, 0.01, impl=impl), z)
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-4, atol=1e-4)


def test_small_probabilities_are_not_lost_beside_a_large_one() -> None:
    """Almost all of each softmax is on the positive, so loss and gradient are what float32 keeps of the rest."""
    base = random(1, 1200, 128)
    z = (base + 0.3 * torch.cat([random(1, 1200, 128, seed=1), random(1, 1200, 128, seed=2)])).float()
    truth = derivatives(lambda z: nt_xent(z, 0.05, impl="reference"), z.double())
    ours = errors(derivatives(lambda z: nt_xent(z, 0.05, impl="blocked"), z), truth)
    theirs = errors(derivatives(lambda z: nt_xent(z, 0.05, impl="reference"), z), truth)
    assert all(mine <= 2 * other for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rows_of_any_length_and_of_zeros(tile: None, scale: float) -> None:
    z = random(2, 80, 16).float()
    z[0, 3] = 0
    values = derivatives(lambda z: nt_xent(z, 0.1, impl="blocked"), z)
    expected = derivatives(lambda z: nt_xent(z, 0.1, impl="reference"), z)
    for ours, theirs in zip(values, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert not values[1][0, 3].any() and not values[2][0, 3].any()
    scaled = nt_xent((z * scale).requires_grad_(), 0.1, impl="blocked")
    torch.testing.assert_close(scaled, values[0], rtol=1e-5, atol=1e-5)


def test_not_a_number_is_not_lost() -> None:
    z = random(2, 80, 16).float()
    z[1, 5, 2] = torch.nan
    assert nt_xent(z, 0.1, impl="blocked").isnan().all()


def test_a_row_without_others() -> None:
    z = random(1, 1, 4).requires_grad_()
    loss = sup_con(z, torch.tensor([3]), 0.1, impl="blocked").sum()
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss == 0 and not gradient.any()


def test_the_exponential() -> None:
    x = np.linspace(-90, 0, 100_001, dtype=np.float32)[:, None]
    found = np.zeros(len(x), np.float32)
    blocked._add_row_sums(0, len(x), x, np.zeros(len(x), np.float32), found)
    exact, normal = np.exp(x[:, 0].astype(np.float64)), x[:, 0] >= -87
    assert np.abs(found[normal] / exact[normal] - 1).max() < 1.2e-7
    assert not found[~normal].any()


class _Storages(TorchDispatchMode):
    """The bytes of the tensors that are alive at most, and of the largest."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = {x.untyped_storage()._cdata: 0 for x in known}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.live:
                storage = x.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.live.values()))
                self.largest = max(self.largest, storage.nbytes())
        return result


def test_memory_is_linear_in_the_rows() -> None:
    z = random(2, 4096, 128).float().requires_grad_()
    with _Storages(z) as storages:
        gradient = torch.autograd.grad(nt_xent(z, 0.1).mean(), z, create_graph=True)[0]
        first = storages.peak
        torch.autograd.grad(gradient.square().sum(), z)
    assert storages.largest <= 8 * 2**20  # the matrix takes 256
    assert first <= 32 * 2**20
    assert storages.peak <= 64 * 2**20


def test_the_third_derivative_is_refused() -> None:
    z = random(2, 4, 3).requires_grad_()
    (first,) = torch.autograd.grad(nt_xent(z, 0.3, impl="blocked").sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


def test_auto_is_the_reference_where_there_is_little_and_blocked_where_there_is_much() -> None:
    little, much = random(2, 20, 8).float(), random(2, 400, 8).float()
    assert torch.equal(nt_xent(little, 0.1), nt_xent(little, 0.1, impl="reference"))
    assert torch.equal(nt_xent(much, 0.1), nt_xent(much, 0.1, impl="blocked"))


def test_an_implementation_for_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="impl='blocked' runs on the CPU and z is on meta"):
        nt_xent(torch.empty(2, 3, 4, device="meta"), 0.1, impl="blocked")
    with pytest.raises(ValueError, match=r"labels \[3\] and \[3\] do not fit z \[2, 4, 5\]"):
        sup_con(random(2, 4, 5), torch.zeros(3), 0.1)
