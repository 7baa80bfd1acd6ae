"""Cross-rank BatchNorm against torch's own over the joined batch, through second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.models import BatchNorm1d, BatchNorm2d, frozen_statistics
from tests.ranks import run_ranks

CHANNELS = 3


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def _norm(kind: type[nn.Module], **options) -> nn.Module:
    norm = kind(CHANNELS, **options).double()
    with torch.no_grad():
        if norm.weight is not None:
            norm.weight.copy_(_random(CHANNELS, seed=1) + 1.5)
        if norm.bias is not None:
            norm.bias.copy_(_random(CHANNELS, seed=2))
    return norm


def _derivatives(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, first derivatives, and those of a penalty on all of them; x may be a share of the batch."""
    x = x.clone().requires_grad_()
    parameters = [p for p in norm.parameters() if p.requires_grad]
    y = norm(x)
    loss = (y.sin() * (1 + x.square())).sum()
    first = torch.autograd.grad(loss, [x, *parameters], create_graph=True)
    # parameters' gradients are joined over ranks before the penalty, as the joined batch has them
    penalty = first[0].pow(3).sum() + (first[0] * y).sum()
    for gradient in first[1:]:
        penalty = penalty + distributed.all_reduce(gradient).square().sum() / distributed.world_size()
    second = torch.autograd.grad(penalty, [x, *parameters])
    joined = [distributed.all_reduce(gradient) for gradient in (*first[1:], *second[1:])]
    return [value.detach() for value in (y, first[0], second[0], *joined, *norm.buffers())]


CASES = {
    "2d": (BatchNorm2d, nn.BatchNorm2d, (7, CHANNELS, 4, 2), {}),
    "2d, cumulative": (BatchNorm2d, nn.BatchNorm2d, (7, CHANNELS, 4, 2), {"momentum": None}),
    "2d, no parameters": (BatchNorm2d, nn.BatchNorm2d, (7, CHANNELS, 4, 2), {"affine": False}),
    "1d": (BatchNorm1d, nn.BatchNorm1d, (7, CHANNELS), {"momentum": 0.3, "eps": 0.1}),
    "1d, no state": (BatchNorm1d, nn.BatchNorm1d, (7, CHANNELS), {"track_running_stats": False}),
    "1d, no bias": (BatchNorm1d, None, (7, CHANNELS), {"bias": False}),
}
SHARES = {"equal": [3, 4], "uneven": [1, 6], "one empty": [0, 7]}


def _batch(shape: tuple[int, ...]) -> Tensor:
    return 3 * _random(*shape) + 10  # far from mean 0, where E[x²] − E[x]² would lose digits


def _on_ranks() -> dict[tuple[str, str], list[Tensor]]:
    rank = distributed.rank()
    found = {}
    for case, (kind, _, shape, options) in CASES.items():
        for share, sizes in SHARES.items():
            found[case, share] = _derivatives(_norm(kind, **options), _batch(shape).split(sizes)[rank])
    local = _norm(BatchNorm2d, sync=False)
    x = _batch((7, CHANNELS, 4, 2))
    found["not synchronised", ""] = [local(x.chunk(2)[rank]).detach()]
    layout = _norm(BatchNorm2d)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        images = x.contiguous(memory_format=memory_format).requires_grad_()
        y = layout(images)
        (gradient,) = torch.autograd.grad(y.sin().sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(3).sum(), images)
        kept = [t.is_contiguous(memory_format=memory_format) for t in (y, gradient, second)]
        found["layout", str(memory_format)] = [torch.tensor(kept), y.detach(), gradient.detach(), second]
    found["autocast", ""] = _half_precision(x[rank::2])
    return found


def _half_precision(x: Tensor) -> list[Tensor]:
    """bfloat16 x through a float32 norm, and the same numbers through a float64 norm."""
    values = []
    for dtype in (torch.bfloat16, torch.double):
        images = x.bfloat16().to(dtype).requires_grad_()
        norm = _norm(BatchNorm2d).to(torch.float32 if dtype == torch.bfloat16 else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = norm(images)
        (gradient,) = torch.autograd.grad(y.double().sin().sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(gradient.double().pow(3).sum(), images)
        values += [y.detach(), gradient.detach(), second, norm.running_mean, norm.running_var]
    return values


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str], list[Tensor]]]:
    return run_ranks(2, _on_ranks)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_torch_on_the_joined_batch(ranks, case: str, share: str) -> None:
    kind, torchs, shape, options = CASES[case]
    reference = _norm(torchs or kind, **options)  # torch before 2.13 has no bias=False; ours is then its one-rank path
    expected = _derivatives(reference, _batch(shape))
    sizes = SHARES[share]
    for rank, found in enumerate(ranks):
        values = found[case, share]
        assert len(values) == len(expected)
        for position, (ours, whole) in enumerate(zip(values, expected, strict=True)):
            mine = whole.split(sizes)[rank] if position < 3 else whole
            torch.testing.assert_close(ours, mine, rtol=1e-12, atol=1e-11)


def test_without_sync_each_rank_uses_its_own_batch(ranks) -> None:
    for rank, found in enumerate(ranks):
        mine = _batch((7, CHANNELS, 4, 2)).chunk(2)[rank]
        torch.testing.assert_close(found["not synchronised", ""][0], _norm(nn.BatchNorm2d)(mine).detach())


def test_memory_layout_is_kept(ranks) -> None:
    for found in ranks:
        (last, *a), (contiguous, *b) = (found["layout", str(f)] for f in (torch.channels_last, torch.contiguous_format))
        assert last.all() and contiguous.all()
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def _close_to_half_precision(values: list[Tensor]) -> None:
    half, exact = values[:5], values[5:]
    assert [v.dtype for v in half] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for ours, expected, tolerance in zip(half, exact, [4e-3, 0.01, 0.05, 1e-6, 1e-5], strict=True):
        assert (ours.double() - expected).abs().max() < tolerance * expected.abs().max()


def test_statistics_are_float32_under_autocast(ranks) -> None:
    for found in ranks:
        _close_to_half_precision(found["autocast", ""])
    _close_to_half_precision(_half_precision(_batch((7, CHANNELS, 4, 2))))  # one rank: torch's kernels


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1]])
def test_one_rank_is_torchs_own(case: str) -> None:
    """Bit for bit but for second derivatives, which are ours on a CPU in training: those to rounding in float64."""
    kind, torchs, shape, options = CASES[case]
    ours, theirs = _norm(kind, **options), _norm(torchs, **options)
    for seed in range(4):
        x = _random(*shape, seed=seed)
        if seed == 3:
            ours.eval(), theirs.eval()
        (y, first, *others), (y_torch, first_torch, *others_torch) = _derivatives(ours, x), _derivatives(theirs, x)
        assert torch.equal(y, y_torch) and torch.equal(first, first_torch)
        torch.testing.assert_close(others, others_torch, rtol=1e-12, atol=1e-11)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert torch.equal(a, b)


def test_state_is_torchs() -> None:
    ours, theirs = _norm(BatchNorm2d), _norm(nn.BatchNorm2d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours(_batch((7, CHANNELS, 4, 2)))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(theirs.running_var, ours.running_var) and theirs.num_batches_tracked == 1


def test_statistics_can_be_frozen() -> None:
    norm, x = _norm(BatchNorm2d), _batch((7, CHANNELS, 4, 2))
    before = [buffer.clone() for buffer in norm.buffers()]
    with frozen_statistics():
        frozen = norm(x)
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))
    assert torch.equal(frozen, norm(x))
    assert norm.num_batches_tracked == 1


def test_wrong_rank_of_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 4D"):
        BatchNorm2d(3)(torch.randn(2, 3))
