"""Every implementation of the fused BatchNorm against PyTorch's composition in float64, through second derivatives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.models import BatchNorm2d, Encoder, ModelConfig
from fasttrain_kernels.batchnorm import Running, batch_norm
from tests.interpreter import needs_interpreter
from tests.ranks import run_ranks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
    ),
)
EPS = 1e-3
SHAPES = {
    "channels-last": (5, 20, 7, 3),
    "three channels": (40, 3, 2, 1),
    "several tiles": (9, 70, 11, 7),
    "one pixel": (6, 8, 1, 1),
    "features": (67, 5),
}
ROUNDING = {torch.double: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}
"Relative errors that any implementation may have; above, one may be no further off than PyTorch's composition."
TAILS = {"plain": (False, False), "relu": (True, False), "residual": (False, True), "both": (True, True)}


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """What a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def composition(x, weight, bias, residual=None, relu=False, eps=EPS):
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def arguments(shape: tuple[int, ...], residual: bool, last: bool = True) -> list[Tensor | None]:
    """x, w, b, residual and five directions in float64, their values bfloat16's, far from mean 0."""
    torch.manual_seed(0)
    x = 2 * torch.randn(shape, dtype=torch.double) + 3
    weight, bias = torch.randn(2, shape[1], dtype=torch.double)
    made = [x, weight + 1, bias, torch.randn_like(x) if residual else None, *torch.randn(5, *shape).double()]
    return [t if t is None else laid_out(t.bfloat16().double(), last) for t in made]


def laid_out(t: Tensor, last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format) if t.dim() == 4 else t


def passes(function, given: list[Tensor | None], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """y, first derivatives, and those of a function of all of these with cotangents that are neither 0 nor 1."""
    wide = torch.promote_types(dtype, torch.float32)
    given = [t if t is None else t.to(device, dtype if t.dim() > 1 else wide) for t in given]
    inputs = [t.requires_grad_() for t in given[:4] if t is not None]
    directions = given[4:]
    y = function(*given[:4])
    first = torch.autograd.grad(y, inputs, directions[0] + 0.1 * y, create_graph=True)
    score = (y * directions[1]).sum() + (first[0] * directions[2]).sum()
    score = score + first[1].square().sum() / 100 + (first[2] * given[2]).sum()
    if len(first) == 4:
        score = score + (first[3] * directions[3]).sum()
    second = torch.autograd.grad(score, inputs)
    return [t.detach().cpu() for t in (y, *first, *second)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and not INTERPRETED else "cpu"


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["reference", "native", "cpu", TRITON])
def test_all_derivatives_are_those_of_the_composition(impl: str, shape: str, tail: str) -> None:
    relu, residual = TAILS[tail]
    given = arguments(SHAPES[shape], residual)
    exact = passes(lambda *a: composition(*a, relu=relu), given, torch.double)

    def ours(*a: Tensor) -> Tensor:
        return batch_norm(*a, relu=relu, eps=EPS, impl=impl)[0]

    for dtype, rounding in ROUNDING.items():
        if impl == "triton" and dtype == torch.double:
            continue
        # Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds: up to twice the error, with its sign
        slack = 2.5 if impl == "triton" and INTERPRETED and dtype == torch.bfloat16 else 1
        found = passes(ours, given, dtype, device_of(impl))
        assert found[0].stride() == exact[0].stride() and found[0].dtype == dtype
        naive = passes(lambda *a: composition(*a, relu=relu), given, dtype)
        for mine, theirs in zip(errors(found, exact), errors(naive, exact), strict=True):
            assert mine < slack * max(1.1 * theirs, rounding)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("last", [True, False])
def test_any_layout_is_kept_and_right(tail: str, last: bool) -> None:
    relu, residual = TAILS[tail]
    given = arguments((4, 6, 5, 3), residual, last)
    given[4:] = [laid_out(t, not last) for t in given[4:]]  # upstream gradients come as they like
    exact = passes(lambda *a: composition(*a, relu=relu), given, torch.double)
    found = passes(lambda *a: batch_norm(*a, relu=relu, eps=EPS)[0], given, torch.float32)
    assert max(errors(found, exact)) < 1e-5
    assert found[0].is_contiguous() is not last


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("impl", ["native", "cpu"])
def test_finite_differences_agree(impl: str, tail: str) -> None:
    relu, residual = TAILS[tail]
    given = [t.requires_grad_() for t in arguments((3, 2, 2, 2), residual)[:4] if t is not None]

    def ours(*a: Tensor) -> Tensor:
        return batch_norm(*a, relu=relu, eps=EPS, impl=impl)[0]

    assert torch.autograd.gradcheck(ours, given)
    assert torch.autograd.gradgradcheck(ours, given)


@pytest.mark.parametrize("impl", ["native", "cpu", TRITON])
def test_statistics_do_not_lose_digits_to_the_mean(impl: str) -> None:
    x = 1000 + torch.randn(512, 7, 9, 8, generator=torch.Generator().manual_seed(0))
    x = laid_out(x, True)
    y, mean, var = (t.cpu() for t in batch_norm(x.to(device_of(impl)), eps=0, impl=impl))
    exact = x.double().var((0, 2, 3)), x.double().mean((0, 2, 3))
    assert ((var - exact[0]) / exact[0]).abs().max() < 1e-6
    assert ((mean - exact[1]) / exact[1]).abs().max() < 2e-7
    assert y.double().var((0, 2, 3), unbiased=False) == pytest.approx(torch.ones(7).double(), abs=1e-6)


@pytest.mark.parametrize("impl", ["reference", "native", "cpu", TRITON])
def test_what_is_not_a_number_stays_so_in_its_channel(impl: str) -> None:
    x = arguments((5, 20, 7, 3), False)[0].float()
    x[2, 7, 1, 1] = torch.nan
    y, mean, variance = (t.cpu().isnan() for t in batch_norm(x.to(device_of(impl)), impl=impl))
    of_channel = torch.arange(20) == 7
    assert torch.equal(y, of_channel.view(-1, 1, 1).expand_as(y))
    assert torch.equal(mean, of_channel) and torch.equal(variance, of_channel)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("impl", ["reference", "native", "cpu", TRITON])
def test_running_statistics_are_torchs(impl: str, momentum: float | None) -> None:
    theirs = nn.BatchNorm2d(20, momentum=momentum).double()
    state = (t.to(device_of(impl)) for t in (torch.zeros(20), torch.ones(20), torch.tensor(0)))
    running = Running(*state, momentum)
    for batch in range(3):
        x = (batch + 1) * arguments((5, 20, 7, 3), False)[0]
        theirs(x)
        batch_norm(x.to(device_of(impl), torch.float32), running=running, impl=impl)
    for ours, exact in zip(running[:3], theirs.buffers(), strict=True):
        torch.testing.assert_close(ours.cpu(), exact.to(ours.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["native", "cpu", TRITON])
def test_only_what_is_asked_for_has_a_gradient(impl: str) -> None:
    """The image gradient of a penalty alone; parameters alone; a frozen residual; an expanded upstream gradient."""
    x, weight, bias, residual, *_ = (
        t if t is None else t.to(device_of(impl), torch.float32) for t in arguments((6, 4, 3, 2), True)
    )
    x.requires_grad_(), weight.requires_grad_()
    y, *_ = batch_norm(x, weight, bias, residual, relu=True, eps=EPS, impl=impl)
    (alone,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = torch.autograd.grad(alone.square().sum(), [x, weight])
    expected = composition(x, weight, bias, residual, True)
    (first,) = torch.autograd.grad(expected.sum(), x, create_graph=True)
    for a, b in zip(second, torch.autograd.grad(first.square().sum(), [x, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    y, *_ = batch_norm(x.detach(), weight, bias, impl=impl, eps=EPS)
    (of_weight,) = torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)
    (again,) = torch.autograd.grad(of_weight.sum(), weight)
    unit = composition(x.detach(), None, None)
    y = weight.view(-1, 1, 1) * unit + bias.view(-1, 1, 1)
    torch.testing.assert_close(again, (6 * y * unit.square()).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_no_third_derivative_is_made_up() -> None:
    x = arguments((4, 3, 2, 2), False)[0].requires_grad_()
    (first,) = torch.autograd.grad(batch_norm(x)[0].pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(second.sum(), x)


SHARES = {"uneven": [1, 6], "one empty": [0, 7]}


def joined(dtype: torch.dtype, sizes: list[int], impl: str = "auto") -> list[Tensor]:
    """This rank's share of :func:`passes`, with parameters' gradients summed over ranks, and running statistics."""
    given = arguments((7, 20, 6, 6), True)
    mine = [t.split(sizes)[distributed.rank()] if t.dim() == 4 else t for t in given]

    running = Running(torch.zeros(20, dtype=dtype), torch.ones(20, dtype=dtype), torch.tensor(1), 0.3)

    def ours(*a: Tensor) -> Tensor:
        options = {"relu": True, "eps": EPS, "running": running, "total": distributed.all_reduce, "impl": impl}
        return batch_norm(*a, **options)[0]

    given = [laid_out(t, True).to(dtype) if t.dim() == 4 else t.to(dtype) for t in mine]
    inputs = [t.requires_grad_() for t in given[:4]]
    y = ours(*inputs)
    first = torch.autograd.grad(y, inputs, given[4] + 0.1 * y, create_graph=True)
    score = (y * given[5]).sum() + (first[0] * given[6]).sum() + (first[3] * given[7]).sum()
    second = torch.autograd.grad(score, inputs)
    images = [t.detach() for t in (y, first[0], first[3], second[0], second[3])]
    return images + [distributed.all_reduce(t.detach()) for t in (*first[1:3], *second[1:3])] + list(running[:3])


def on_ranks(impl: str) -> dict[tuple[str, str], list[Tensor]]:
    types = (torch.float32,) if impl == "triton" else (torch.float32, torch.double)
    return {(share, str(dtype)): joined(dtype, sizes, impl) for share, sizes in SHARES.items() for dtype in types}


INTERPRETER = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"))


@pytest.mark.parametrize("impl", ["native", "cpu", INTERPRETER])
def test_two_ranks_are_one_process(impl: str) -> None:
    ranks = run_ranks(2, on_ranks, impl)
    whole = joined(torch.double, [7])
    for (share, dtype), values in ((key, value) for found in ranks for key, value in found.items()):
        tolerance = 1e-12 if dtype == str(torch.double) else 1e-5
        rank = next(r for r, found in enumerate(ranks) if found[share, dtype] is values)
        for position, (ours, exact) in enumerate(zip(values, whole, strict=True)):
            exact = exact.split(SHARES[share])[rank] if position < 5 else exact
            torch.testing.assert_close(
                ours.double(), exact.double(), rtol=tolerance, atol=tolerance * whole[position].abs().max()
            )


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet12"])
def test_a_resnet_is_the_same_fused_or_not(arch: str) -> None:
    """A hook on a layer sees that layer's own output, as without fusing."""
    torch.manual_seed(0)
    config = ModelConfig(
        arch=arch, stem="none" if arch == "resnet12" else "cifar", width=0.125, zero_init_residual=False
    )
    encoder = Encoder(config).to(memory_format=torch.channels_last)
    images = laid_out(torch.rand(6, 3, 16, 16), True)
    fused = encoder(images).features.detach()
    seen = []
    for module in encoder.backbone.modules():
        if isinstance(module, BatchNorm2d):
            module.register_forward_hook(lambda _, __, y: seen.append((y < 0).any()))
    torch.testing.assert_close(encoder(images).features, fused, rtol=1e-4, atol=1e-5)
    assert len(seen) == sum(isinstance(m, BatchNorm2d) for m in encoder.backbone.modules()) and all(seen)


def test_another_activation_is_not_taken_for_relu() -> None:
    block = Encoder(ModelConfig(arch="resnet18", width=0.125)).backbone.layer1[0]
    block.relu = nn.SiLU()
    assert (block(torch.randn(4, 8, 5, 5)) < 0).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.randn(1, 3)}, "more than one value a channel"),
        ({"x": torch.randn(3)}, r"shape \[3\]"),
        ({"weight": torch.ones(2)}, "one a channel"),
        ({"residual": torch.randn(4, 3).double()}, "give x's"),
        ({"impl": "fast"}, "choose one of auto"),
        ({"x": torch.randn(4, 3, 5, 5), "impl": "cpu"}, "make it channels-last"),
    ],
)
def test_mistakes_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_norm(**{"x": torch.randn(4, 3)} | given)


@needs_interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run")
def test_triton_in_its_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout + run.stderr
