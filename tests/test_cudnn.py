"""The chain of convolutions that cuDNN fuses, its kernels played by PyTorch's operations."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.models import Encoded, cudnn
from fasttrain.models.folding import fold_batchnorm
from fasttrain.models.frozen import IMAGE_CHANNELS, FrozenChain, in_two_terms, weight_of_two_terms
from tests.test_folding import CHAINS, ENCODERS, _encoder, _images, _relative


@pytest.fixture
def played(monkeypatch) -> list[tuple]:
    """What cuDNN was asked for, computed by PyTorch's operations, wherever the tensors lie."""
    asked = []

    def fused(x: Tensor, layer: cudnn.Constant, z: Tensor | None) -> Tensor:
        asked.append((x, layer, z))
        return cudnn.composed(x, layer, z)

    monkeypatch.setattr(cudnn, "fuses", lambda x: True)
    monkeypatch.setattr(cudnn, "fused", fused)
    monkeypatch.setattr(cudnn, "_verdicts", {})
    return asked


@pytest.mark.parametrize("name", sorted(set(CHAINS) - {"strided"}))
def test_chain_and_its_gradient(name, played, monkeypatch):
    torch.manual_seed(0)
    chain, x = CHAINS[name]().double(), torch.randn(3, 3, 11, 14, dtype=torch.double, requires_grad=True)
    x = x.to(memory_format=torch.channels_last)
    weights = torch.randn_like(chain(x))
    trials = 2 * len(chain.layers)
    assert len(played) == trials + len(chain.layers)  # each shape's trial runs it twice
    found = chain(x)
    (ours,) = torch.autograd.grad(found, x, weights)
    assert len(played) == trials + 2 * len(chain.layers), "a shape is tried once"
    monkeypatch.setattr(cudnn, "fuses", lambda x: False)
    expected = chain(x)
    (truth,) = torch.autograd.grad(expected, x, weights)
    assert _relative(found, expected) < 1e-14 and _relative(ours, truth) < 1e-13
    assert (expected == 0).any() and (expected > 0).any()


@pytest.mark.parametrize("seen", ["features", "stages", "a stage"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_folded_encoder_and_the_gradient_of_its_images(name, seen, played):
    encoder, images = _encoder(ENCODERS[name]).eval(), _images().requires_grad_()

    def values(encoded: Encoded) -> list[Tensor]:
        if seen == "features":
            return [encoded.features]
        return [encoded.stages[1]] if seen == "a stage" else [encoded.features, *encoded.stages]

    expected, found = encoder(images), fold_batchnorm(encoder)(images)
    assert all(_relative(a, b) < 1e-12 for a, b in zip(found.stages, expected.stages, strict=True)) and played
    losses = (sum(value.square().mean() for value in values(encoded)) for encoded in (expected, found))
    truth, ours = (torch.autograd.grad(loss, images)[0] for loss in losses)
    assert _relative(ours, truth) < 1e-11


def test_a_leaky_chain_is_composed(played):
    CHAINS["strided"]()(torch.randn(2, 3, 8, 8))
    assert not played


def _raises(x, layer, z):
    raise RuntimeError("GET was unable to find an engine")


FAULTS = {
    "raises": (_raises, "RuntimeError: GET was unable"),
    "forgets its bias": (lambda x, layer, z: cudnn.composed(x, layer._replace(bias=None), z), "from theirs"),
    "reads what was there": (lambda x, layer, z: torch.full_like(layer(x), torch.nan), "from theirs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_fails_its_trial_is_told_of_once_and_composed(fault, monkeypatch):
    broken, complaint = FAULTS[fault]
    monkeypatch.setattr(cudnn, "fuses", lambda x: True)
    monkeypatch.setattr(cudnn, "fused", broken)
    monkeypatch.setattr(cudnn, "_verdicts", {})
    torch.manual_seed(0)
    chain, x = CHAINS["identity"](), torch.randn(2, 3, 6, 6)
    with pytest.warns(RuntimeWarning, match=complaint) as told:
        found = chain(x)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(torch.randn(2, 3, 7, 7))
    monkeypatch.setattr(cudnn, "fuses", lambda x: False)
    assert torch.equal(found, chain(x))


def test_images_in_two_terms_lose_nothing_that_an_attack_changes():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    chain = FrozenChain([layer], sees_images=True)
    images = torch.rand(4, 3, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.full((1, 3, 1, 1), 4.0), torch.full((1, 3, 1, 1), -2.0)
    exact = chain.double()((images * scale + shift).double())
    chain.float()
    terms = in_two_terms(images, scale, shift, torch.bfloat16)
    assert terms.shape[1] == IMAGE_CHANNELS and terms.is_contiguous(memory_format=torch.channels_last)
    found = F.conv2d(terms.float(), weight_of_two_terms(layer.weight, torch.bfloat16).float(), layer.bias, padding=1)
    rounded = F.conv2d((images * scale + shift).bfloat16().float(), layer.weight, layer.bias, padding=1)
    assert _relative(found.relu().double(), exact) < 2e-5 < 1e-3 < _relative(rounded.relu().double(), exact)
    with torch.autocast("cpu", torch.bfloat16):  # what is left is the rounding of the bias and of the result
        assert _relative(chain(terms).double(), exact) < 4e-3
    (gradient,) = torch.autograd.grad(terms[:, :3].float().sum(), images)
    assert torch.equal(gradient, scale.expand_as(images))
