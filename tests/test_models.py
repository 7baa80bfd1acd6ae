"""The ResNets against torchvision's documented layout, and what an encoder promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttrain import distributed
from fasttrain.config import resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoder, ModelConfig, ResNet
from fasttrain.objectives import nt_xent
from tests.ranks import run_ranks

# torchvision's published parameter counts, 1000 classes
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def _torchvision_layout(arch: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of torchvision's ResNet, from its documentation, in its order."""
    layout: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, inputs: int, kernel: int) -> None:
        layout[f"{name}.weight"] = (out, inputs, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        for key in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{name}.{key}"] = (channels,)
        layout[f"{name}.num_batches_tracked"] = ()

    bottleneck = arch in ("resnet50", "resnet101", "resnet152")
    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    inputs = 64
    for stage, (depth, planes) in enumerate(zip(DEPTHS[arch], (64, 128, 256, 512), strict=True), start=1):
        out = planes * (4 if bottleneck else 1)
        for block in range(depth):
            name = f"layer{stage}.{block}"
            shapes = [(planes, inputs, 1), (planes, planes, 3), (out, planes, 1)]
            if not bottleneck:
                shapes = [(planes, inputs, 3), (planes, planes, 3)]
            for position, shape in enumerate(shapes, start=1):
                conv(f"{name}.conv{position}", *shape)
                norm(f"{name}.bn{position}", shape[0])
            if block == 0 and (stage > 1 or bottleneck):
                conv(f"{name}.downsample.0", out, inputs, 1)
                norm(f"{name}.downsample.1", out)
            inputs = out
    layout["fc.weight"], layout["fc.bias"] = (1000, inputs), (1000,)
    return layout


@pytest.mark.parametrize("arch", PARAMETERS)
def test_keys_shapes_and_counts_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):
        model = ResNet(arch, classes=1000)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == _torchvision_layout(arch)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[arch]
    strides = {
        name: module.stride[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1)
    }
    strided = "conv1" if arch in ("resnet18", "resnet34") else "conv2"  # v1.5: on a bottleneck's 3x3
    inner = {f"layer{stage}.0.{part}" for stage in (2, 3, 4) for part in (strided, "downsample.0")}
    assert strides == {name: 2 for name in {"conv1"} | inner}


@pytest.mark.parametrize(
    ("options", "sides", "channels"),
    [
        ({"arch": "resnet18"}, (16, 8, 4, 2), (64, 128, 256, 512)),
        ({"arch": "resnet18", "stem": "cifar", "width": 0.25}, (64, 32, 16, 8), (16, 32, 64, 128)),
        ({"arch": "resnet50", "stem": "cifar", "width": 0.125}, (64, 32, 16, 8), (32, 64, 128, 256)),
        ({"arch": "resnet50", "width": 2}, (16, 8, 4, 2), (512, 1024, 2048, 4096)),
        ({"arch": "resnet12", "stem": "none", "width": 0.5}, (32, 16, 8, 4), (32, 80, 160, 320)),
    ],
)
def test_stage_maps_and_features(options: dict, sides: tuple[int, ...], channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        encoder = Encoder(ModelConfig(**options, classes=7))
        images = torch.empty(2, 3, 64, 64)
        encoded = encoder(images)
    assert encoded.images is images
    assert [tuple(stage.shape) for stage in encoded.stages] == [
        (2, c, side, side) for c, side in zip(channels, sides, strict=True)
    ]
    assert encoded.features.shape == (2, channels[-1])
    assert encoded.projections.shape == (2, 128)
    assert encoded.logits.shape == (2, 7)


def test_resnet12_is_the_few_shot_literatures() -> None:
    with torch.device("meta"):
        full, half = ResNet("resnet12", "none"), ResNet("resnet12", "none", width=0.5)
    assert sum(p.numel() for p in full.parameters()) == 12_424_320  # "12.4 M" (Lee et al. 2019)
    assert {k: v.shape for k, v in half.state_dict().items() if k.startswith("layer4.0.conv")} == {
        "layer4.0.conv1.weight": (320, 160, 3, 3),
        "layer4.0.conv2.weight": (320, 320, 3, 3),
        "layer4.0.conv3.weight": (320, 320, 3, 3),
    }


def test_forward_is_the_formula() -> None:
    """A bottleneck stage with stride, in evaluation mode, by hand from the weights alone."""
    torch.manual_seed(0)
    model = ResNet("resnet50", "cifar", width=0.0625).double().eval()
    block = model.layer2[0]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, block.conv1.in_channels, 6, 6, dtype=torch.double)

    def norm(y: torch.Tensor, n: nn.BatchNorm2d) -> torch.Tensor:
        mean, var, gain, shift = (v.view(-1, 1, 1) for v in (n.running_mean, n.running_var, n.weight, n.bias))
        return gain * (y - mean) / (var + 1e-5).sqrt() + shift

    y = norm(torch.einsum("oc,nchw->nohw", block.conv1.weight[:, :, 0, 0], x), block.bn1).clamp(min=0)
    patches = nn.functional.unfold(y, 3, padding=1, stride=2)
    y = (block.conv2.weight.flatten(1) @ patches).unflatten(-1, (3, 3))
    y = norm(y, block.bn2).clamp(min=0)
    y = norm(torch.einsum("oc,nchw->nohw", block.conv3.weight[:, :, 0, 0], y), block.bn3)
    short = torch.einsum("oc,nchw->nohw", block.downsample[0].weight[:, :, 0, 0], x[:, :, ::2, ::2])
    torch.testing.assert_close(block(x), (y + norm(short, block.downsample[1])).clamp(min=0))


def test_initialisation() -> None:
    torch.manual_seed(0)
    plain = Encoder(ModelConfig(arch="resnet18", zero_init_residual=False)).backbone
    weight = plain.layer3[1].conv2.weight  # fan out 256·9
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert plain.layer3[1].bn2.weight.min() == 1
    identity = Encoder(ModelConfig(arch="resnet18", zero_init_residual=True)).backbone
    gains = [module.weight.abs().sum() for name, module in identity.named_modules() if name.endswith("bn2")]
    assert len(gains) == 8 and not any(gains)
    x = torch.rand(2, 64, 4, 4)
    assert torch.equal(identity.layer1[1](x), x)


def test_head_is_simclrs() -> None:
    two = Encoder(ModelConfig(arch="resnet18"))
    assert [type(m).__name__ for m in two.head] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [m.bias is None for m in two.head if not isinstance(m, nn.ReLU)] == [True, False, True, True]
    three = Encoder(resolve(ModelConfig, {"arch": "resnet18", "head": {"layers": 3, "width": 96, "out": 32}}))
    assert [tuple(m.weight.shape) for m in three.head if isinstance(m, nn.Linear)] == [(96, 512), (96, 96), (32, 96)]
    none = Encoder(resolve(ModelConfig, {"arch": "resnet18", "head": {"layers": 0}}))
    encoded = none(torch.rand(2, 3, 32, 32))
    assert none.head is None and encoded.projections is None and encoded.logits is None


def test_normaliser_is_inside() -> None:
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.125)).eval()
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(encoder(images).features, encoder.backbone((images - mean) / std)[1])
    assert not any("scale" in key or "shift" in key for key in encoder.state_dict())


@pytest.mark.parametrize("options", [{"stem": "imagenet"}, {"stem": "cifar"}, {"arch": "resnet12", "stem": "none"}])
@pytest.mark.parametrize("images_too", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_channels_last_holds_to_the_end(options: dict, images_too: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    # not narrower: oneDNN's double backward of a strided 1x1 convolution from 8 to 16 channels overruns its memory
    config = ModelConfig(**{"arch": "resnet18", "width": 0.25, **options})
    encoder = Encoder(config).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 64, 64)
    if images_too:
        images = images.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        encoded = encoder(images.requires_grad_())
    assert all(stage.is_contiguous(memory_format=torch.channels_last) for stage in encoded.stages)
    assert encoder.backbone.layer1[0].bn1.running_mean.dtype == torch.float32
    (gradient,) = torch.autograd.grad(encoded.projections.float().square().sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters() if parameter.grad is not None)


def _step(encoder: Encoder, images: torch.Tensor) -> list[torch.Tensor]:
    """First derivatives, those of a gradient penalty, and the statistics after one step."""
    images = images.clone().requires_grad_()
    loss = encoder(images).features.pow(3).sum()
    parameters = list(encoder.backbone.parameters())
    first = torch.autograd.grad(loss, [images, *parameters], create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), parameters)
    return [value.detach() for value in (*first, *second, *encoder.backbone.buffers())]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_checkpointed_activations_change_nothing(arch: str) -> None:
    images = torch.rand(3, 3, 16, 16, dtype=torch.double)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(
            arch=arch, stem="cifar", width=0.0625, zero_init_residual=False, checkpoint_activations=checkpointed
        )
        encoder = Encoder(config).double()
        results.append(_step(encoder, images))
        assert encoder.backbone.bn1.num_batches_tracked == 1
        assert encoder.backbone.layer4[0].bn1.num_batches_tracked == 1
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-10, atol=1e-12)


def _penalised_step(images: torch.Tensor) -> list[torch.Tensor]:
    """NT-Xent with a gradient penalty on this rank's share of images [V, B, 3, H, W]: loss, gradients, statistics."""
    rank, world = distributed.rank(), distributed.world_size()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(
            arch="resnet18", stem="cifar", width=0.0625, zero_init_residual=False, checkpoint_activations=checkpointed
        )
        encoder = Encoder(config).double()
        mine = images.chunk(world, dim=1)[rank]
        x = mine.flatten(0, 1).requires_grad_()
        labels = torch.zeros(mine.shape[1], dtype=torch.long)
        loss = nt_xent(0.3)(encoder(x), Batch(mine, labels, labels))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        # the collectives' adjoints summed the ranks' losses, so gradient / world is that of their mean
        total = loss + world * 1e3 * (gradient / world).square().sum()
        parameters = torch.autograd.grad(total, list(encoder.parameters()))
        averaged = [distributed.all_reduce(value.detach()) / world for value in (loss, total, *parameters)]
        results += [*averaged, *encoder.buffers()]
    return results


def test_two_ranks_equal_one_through_the_whole_encoder() -> None:
    images = torch.rand(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    one = _penalised_step(images)
    assert one[1] > 1.1 * one[0]  # the penalty counts
    for ranks in run_ranks(2, _penalised_step, images):
        for ours, expected in zip(ranks, one, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_checkpointing_keeps_fewer_activations() -> None:
    kept = []
    for checkpointed in (False, True):
        encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", checkpoint_activations=checkpointed))
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(torch.rand(4, 3, 32, 32))
        weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        kept.append(sum(size for pointer, size in saved.items() if pointer not in weights))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": "resnet19"}, "arch='resnet19'"),
        ({"arch": "resnet12"}, "stem=imagenet: resnet12"),
        ({"arch": "resnet50", "stem": "none"}, "stem=none: resnet50"),
        ({"width": 0}, "width=0"),
        ({"std": [0.2, 0.0, 0.2]}, r"std\.1=0\.0"),
        ({"head": {"layers": 4}}, r"head\.layers=4"),
        ({"classes": -1}, "classes=-1"),
    ],
)
def test_mistakes_name_the_value(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(ModelConfig, values)
