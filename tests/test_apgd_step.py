"""Every implementation of APGD's step against the reference, on random losses and gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.attacks import L2, Linf, apgd
from fasttrain.attacks.apgd import checkpoint_windows
from fasttrain.attacks.losses import squared_distance
from fasttrain.models import Encoder, ModelConfig
from fasttrain.models.folding import fold_batchnorm
from fasttrain_kernels.apgd import State, apgd_step, initial_state
from tests.interpreter import needs_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SHAPES = [(3, 3, 7, 9), (1, 3, 20, 30), (4, 1, 1, 1)]
EPS = {"linf": 0.05, "l2": 0.7}


def _implementations() -> list:
    triton = pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
    )
    return ["reference", "cpu", pytest.param("triton", marks=triton)]


def _run(impl: str, norm: str, shape: tuple[int, ...], memory_format, dtype: torch.dtype, steps: int) -> list[State]:
    """All states of an attack whose losses and gradients are random, with ties between losses."""
    generator = torch.Generator().manual_seed(1)
    device = "cuda" if impl == "triton" and not INTERPRETED else "cpu"

    def random(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.double).to(device, dtype)

    images = (1.4 * random(*shape) - 0.2).clamp(0, 1).contiguous(memory_format=memory_format)
    start = (images + EPS[norm] * (random(*shape) - 0.5) / 10).clamp(0, 1).contiguous(memory_format=memory_format)
    states = [initial_state(start, 2 * EPS[norm])]
    for i, window in enumerate(checkpoint_windows(steps)):
        loss = (4 * random(shape[0])).round() / 4 + i / 30 * (random(shape[0]) > 0.5)
        gradient = random(*shape) - 0.5
        gradient = gradient * (gradient.abs() > 0.05)  # some are exactly 0
        if i == 3:
            gradient[0] = 0
        states.append(
            apgd_step(states[-1], loss, gradient, images, EPS[norm], norm, first=i == 0, window=window, impl=impl)
        )
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("impl", _implementations()[1:])
def test_equals_the_reference(impl, norm, shape, memory_format, dtype):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernel is for float32")
    steps = 9 if impl == "triton" else 40
    found, expected = (_run(name, norm, shape, FORMATS[memory_format], dtype, steps) for name in (impl, "reference"))
    halvings = 0
    for ours, theirs in zip(found, expected, strict=True):
        for field, a, b in zip(State._fields, ours, theirs, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, field
            tolerance = 0 if norm == "linf" or a.dim() == 1 else {torch.float32: 3e-6, torch.float64: 1e-13}[dtype]
            assert torch.allclose(a.cpu(), b, rtol=0, atol=tolerance), field
        assert ours.x.stride() == theirs.x.stride() or 1 in shape
        halvings += int(theirs.halved.sum())
    assert halvings > len(found[0].halved)


class _NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU's result."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        refused = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.item", "aten.equal")
        assert not str(function).startswith(refused), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.5)])
def test_attack_on_a_folded_network_never_waits_and_finds_what_the_plain_one_does(threat):
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.125)).eval()
    images = torch.rand(9, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    found = []
    for network in (fold_batchnorm(encoder), encoder):
        targets = network(images).features.detach()

        def loss(x: Tensor, network=network, targets=targets) -> Tensor:
            return squared_distance(network(x).features, targets)

        with _NoWaiting():
            x = apgd(threat, 10)(loss, images)
        assert x.is_contiguous(memory_format=torch.channels_last)
        found.append(squared_distance(encoder(x).features, targets).mean().item())
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("impl", _implementations())
def test_gradient_in_another_memory_format_and_nan(impl, norm):
    device = "cuda" if impl == "triton" and not INTERPRETED else "cpu"
    torch.manual_seed(0)
    images = torch.rand(4, 3, 6, 5, device=device).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(4, 3, 6, 5, device=device)
    state = initial_state(images, 0.1)
    loss = torch.tensor([1.0, torch.nan, 2.0, -torch.inf], device=device)
    found = apgd_step(state, loss, gradient.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), images, 0.3, norm,
                      first=True, impl=impl)  # fmt: skip
    expected = apgd_step(state, loss, gradient, images, 0.3, norm, first=True, impl="reference")
    for field, a, b in zip(State._fields, found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6, equal_nan=True), field


def test_what_an_implementation_does_not_take():
    images = torch.rand(3, 3, 4, 4)
    others = torch.zeros(3), torch.zeros_like(images), images, 0.1, "linf"
    with pytest.raises(ValueError, match="impl='cuda'"):
        apgd_step(initial_state(images, 0.1), *others, impl="cuda")
    sideways = images.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    with pytest.raises(ValueError, match="use impl='auto'"):
        apgd_step(initial_state(sideways, 0.1), *others, impl="cpu")
    found = apgd_step(initial_state(sideways, 0.1), *others)
    assert torch.equal(found.x, apgd_step(initial_state(images, 0.1), *others).x)
    half = images.bfloat16()
    found = apgd_step(initial_state(half, 0.1), torch.zeros(3), torch.zeros_like(half), half, 0.1, "linf")
    assert found.x.dtype == torch.bfloat16


def test_number_of_threads_changes_nothing():
    images = torch.rand(7, 3, 5, 5)
    loss, gradient = torch.rand(7), torch.randn(7, 3, 5, 5)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(apgd_step(initial_state(images, 0.1), loss, gradient, images, 0.1, "l2", impl="cpu").x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_interpreter
@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run")
def test_triton_interpreted():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
