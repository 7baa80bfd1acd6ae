"""BatchNorm folded into the convolutions against the encoder in evaluation mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.folding import fold_batchnorm

ENCODERS = {
    "resnet12": ModelConfig(arch="resnet12", stem="none", width=0.125, head=HeadConfig(layers=2), classes=5),
    "resnet18": ModelConfig(arch="resnet18", stem="cifar", width=0.125, head=HeadConfig(layers=3), classes=5),
    "simsiam": ModelConfig(
        arch="resnet12", stem="none", width=0.125, head=HeadConfig(layers=3, predictor=16), classes=3, layer_heads=True
    ),
    "resnet34": ModelConfig(arch="resnet34", stem="imagenet", width=0.125, head=HeadConfig(layers=0)),
    "resnet50": ModelConfig(arch="resnet50", stem="cifar", width=0.125, checkpoint_activations=True),
    "resnet101": ModelConfig(arch="resnet101", stem="imagenet", width=0.0625, classes=3),
    "resnet152": ModelConfig(arch="resnet152", stem="imagenet", width=0.0625),
}


def _encoder(config: ModelConfig, dtype: torch.dtype = torch.double) -> Encoder:
    """An encoder none of whose BatchNorm tensors is a default."""
    torch.manual_seed(0)
    encoder = Encoder(config).to(dtype)
    for module in encoder.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                if module.bias is not None:
                    module.bias.normal_(std=0.2)
    return encoder


def _images(dtype: torch.dtype = torch.double, side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ENCODERS)
def test_equals_the_encoder_in_evaluation_mode(name, dtype, tolerance):
    encoder, images = _encoder(ENCODERS[name], dtype).eval(), _images(dtype)
    folded = fold_batchnorm(encoder.train())(images)
    expected = encoder.eval()(images)
    for whole, other in ((folded, expected), *zip(folded.layers, expected.layers, strict=True)):
        assert len(whole.stages) == len(other.stages)
        for a, b in zip((*whole.stages, *whole[2:6]), (*other.stages, *other[2:6]), strict=True):
            assert (a is None) == (b is None)
            assert a is None or _relative(a, b) < tolerance


@pytest.mark.parametrize("name", ["resnet12", "resnet18", "resnet50"])
def test_gradient_of_the_images(name):
    encoder, images = _encoder(ENCODERS[name]).eval(), _images().requires_grad_()
    (expected,) = torch.autograd.grad(encoder(images).projections.square().sum(), images)
    (found,) = torch.autograd.grad(fold_batchnorm(encoder)(images).projections.square().sum(), images)
    assert _relative(found, expected) < 1e-11


def test_leaves_the_encoder_alone_and_follows_its_weights():
    encoder, images = _encoder(ENCODERS["resnet18"]).train(), _images()
    calls = []
    encoder.backbone.conv1.register_forward_hook(lambda *_: calls.append(1))
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    folded = fold_batchnorm(encoder)
    folded(images)
    assert encoder.training and not folded.training and not list(folded.parameters()) and not calls
    assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())

    with torch.no_grad():
        encoder.backbone.layer2[0].bn1.running_var.mul_(2)
        encoder.backbone.layer3[0].conv1.weight.mul_(0.5)
    assert _relative(fold_batchnorm(encoder)(images).features, encoder.eval()(images).features) < 1e-12


def test_keeps_channels_last():
    encoder = _encoder(ENCODERS["resnet18"], torch.float32).to(memory_format=torch.channels_last)
    folded = fold_batchnorm(encoder)
    weights = [m.weight for m in folded.modules() if isinstance(m, nn.Conv2d)]
    # a 1x1 kernel counts as contiguous in both formats
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    stages = folded(_images(torch.float32).contiguous(memory_format=torch.channels_last)).stages
    assert stages[0].is_contiguous(memory_format=torch.channels_last)


def test_refuses_a_batchnorm_that_follows_no_convolution():
    encoder = _encoder(ENCODERS["resnet18"])
    encoder.backbone.layer1[0].relu = nn.BatchNorm2d(8)  # now conv1, bn1, BatchNorm
    with pytest.raises(ValueError, match="'relu'"):
        fold_batchnorm(encoder)
